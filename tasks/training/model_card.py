"""The model card as Markdown, beside the checkpoint: training data, settings and error rates."""

from collections.abc import Mapping, Sequence

from schemas.metrics import EER, FRONTAL_PROFILE, MetricId
from schemas.models import ModelCard
from schemas.reports import Estimate

SHOWN = {
    EER: "EER",
    MetricId("fnmr@1e-2"): "FNMR at FMR 1e-2",
    MetricId("fnmr@1e-3"): "FNMR at FMR 1e-3",
    MetricId("fnmr_global@1e-3"): "FNMR at the FMR 1e-3 of all pairs",
}


def card_markdown(card: ModelCard) -> str:
    """Return the card of a trained model as Markdown: architecture, data, error rates beside raw, versions.

    It holds no time and no duration, so that the same training gives the same file.
    """
    metrics = card.metrics
    scale = f" {card.mean_norm:.6g}" if card.mean_norm is not None else ""
    alphas = metrics.get("alpha")
    lines = [
        f"# {card.architecture}, {card.mode}, D = {card.embedding_dim}",
        "",
        f"- arguments: {card.arguments}",
        f"- input: normalisation {card.normalisation}{scale}",
        f"- training data: {card.training_data}",
        f"- split: {card.split.model_dump() if card.split else 'unknown'}",
        f"- subjects: {metrics.get('subjects')}, rows: {metrics.get('rows')}, "
        f"of further views to train on: {metrics.get('augmented_rows')}, left out: {metrics.get('left_out') or 'none'}",
        f"- loss: {metrics.get('loss')}, seed {metrics.get('seed')}",
        f"- steps: {metrics.get('steps')}; the learnt change is scaled by {_share(metrics.get('change_scaled_by'))}, "
        f"chosen by {metrics.get('chosen_on')} on {metrics.get('chosen_on_subjects')} subjects; "
        f"shown to be better than raw there: {metrics.get('improved')}",
        *_second_source(metrics),
        f"- share of the identity branch: {_alphas(alphas) if isinstance(alphas, list) else 'n/a'}",
        "",
        *_lengths(metrics),
    ]
    rates, difference = metrics.get("rates"), metrics.get("difference")
    if isinstance(rates, dict) and rates:
        lines += [
            f"Measured on the {metrics.get('measured_on')} subjects, in percent:",
            "",
            f"| pairs | mode | {' | '.join(SHOWN.values())} |",
            f"|---|---|{'---|' * len(SHOWN)}",
        ]
        for mode, cells in rates.items():
            assert isinstance(cells, dict)
            for cell, values in cells.items():
                assert isinstance(values, dict)
                lines.append(f"| {cell} | {mode} | {' | '.join(_percent(values.get(name)) for name in SHOWN)} |")
    if isinstance(difference, dict) and difference:
        lines += ["", "Difference to raw in percentage points, 95% interval by the paired bootstrap over subjects:", ""]
        lines += [f"| pairs | {' | '.join(SHOWN.values())} |", f"|---|{'---|' * len(SHOWN)}"]
        for cell, values in difference.items():
            assert isinstance(values, dict)
            lines.append(f"| {cell} | {' | '.join(_change_interval(values.get(name)) for name in SHOWN)} |")
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions.items()), ""]
    return "\n".join(lines)


def _share(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "nothing: it gives raw embeddings"


def _second_source(metrics: Mapping[str, object]) -> list[str]:
    if metrics.get("frontal_only_subjects") != 0 or metrics.get("chosen_by_cell") != FRONTAL_PROFILE:
        return []
    return [
        "- no training subject has frontal pictures only: a second source of such subjects may lessen harm to frontal "
        "pairs"
    ]


def _lengths(metrics: Mapping[str, object]) -> list[str]:
    """Return the table of the lengths that were scored."""
    lengths = metrics.get("lengths")
    if not isinstance(lengths, list):
        return []
    lines = [
        f"Lengths of the change, by {metrics.get('chosen_on')}. The smallest score + standard error is taken; "
        "raw scores 0.",
        "",
        f"| change scaled by | score | standard error | {metrics.get('chosen_by_cell')} EER, percent of raw |",
        "|---|---|---|---|",
    ]
    for one in lengths:
        share = "raw" if one["share"] is None else f"{one['share']:g}"
        change = change_percent(Estimate.model_validate(one["eer"]))
        lines.append(f"| {share} | {one['score']:+.4f} | {one['error']:.4f} | {change} |")
    return [*lines, ""]


def change_percent(relative: Estimate) -> str:
    """Return a relative change in percent, such as `-17.1% [-20.8, -13.1]`; `n/e` where it is not estimable."""
    if relative.value is None:
        return "n/e"
    if relative.low is None or relative.high is None:
        return f"{100 * relative.value:+.1f}%"
    return f"{100 * relative.value:+.1f}% [{100 * relative.low:+.1f}, {100 * relative.high:+.1f}]"


def change_interval(difference: Estimate | None) -> str:
    """Return a difference in percentage points, such as `-1.20 [-2.00, -0.40]`; `n/e` where it is not estimable."""
    if difference is None or difference.value is None:
        return "n/e"
    if difference.low is None or difference.high is None:
        return f"{100 * difference.value:+.2f}"
    return f"{100 * difference.value:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def _change_interval(value: object) -> str:
    return change_interval(None if value is None else Estimate.model_validate(value))


def _alphas(values: Sequence[object]) -> str:
    return ", ".join(f"{value:.3f}" for value in values if isinstance(value, float)) or "n/a"


def _percent(value: object) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else "n/e"
