"""The model card in words: whom a checkpoint was trained on and how it measured, as Markdown beside the file."""

from schemas.models import ModelCard


def card_markdown(card: ModelCard) -> str:
    """Return the card of a trained model as Markdown: what it is, its data, its figures beside raw, its versions."""
    metrics = card.metrics
    lines = [
        f"# {card.architecture}, {card.mode}, D = {card.embedding_dim}",
        "",
        f"- arguments: {card.arguments}",
        f"- input: normalisation {card.normalisation}",
        f"- training data: {card.training_data}",
        f"- split: {card.split.model_dump() if card.split else 'unknown'}",
        f"- subjects: {metrics.get('subjects')}, rows: {metrics.get('rows')}",
        f"- best step: {metrics.get('best_step')} (0 would be raw)",
        "",
        "| cell | mode | EER % | FNMR % at FMR 1e-2 | FNMR % at FMR 1e-3 |",
        "|---|---|---|---|---|",
    ]
    figures = metrics.get("figures")
    assert isinstance(figures, dict)
    for mode, cells in figures.items():
        assert isinstance(cells, dict)
        for cell, values in cells.items():
            assert isinstance(values, dict)
            shown = [_percent(values.get(name)) for name in ("eer", "fnmr@1e-2", "fnmr@1e-3")]
            lines.append(f"| {cell} | {mode} | {' | '.join(shown)} |")
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions.items()), ""]
    return "\n".join(lines)


def _percent(value: object) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else "n/e"
