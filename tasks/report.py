"""The report of a release: one HTML file that tells whether it helped, and shows why.

`render_report` turns a `ReportInput` into a page that needs nothing else: no script, no font, no network, and a content
security policy that forbids them. Every text that comes from data is escaped, and printed so that it cannot deceive.
Drawing is left to `tasks.plots`, wording to `tasks.wording`, layout to the template beside; who writes the page and
where is up to the flow.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from schemas.reports import ALL, RAW, Estimate, Evaluation, ModeResult, Population, ReportInput
from tasks import plots
from tasks.plots import Panel
from tasks.theme import inline_svg, mode_role, mode_rules, plot_rules, png_file, svg_file, variables, visible
from tasks.wording import (
    NOT_ESTIMABLE,
    Judgement,
    cell_name,
    difference_of,
    figure_of,
    interval,
    judge,
    metric_name,
    percent,
    percent_of,
    points,
    points_interval,
)

_TEMPLATES = Path(__file__).parent / "templates"
_MAIN_CELLS = (ALL, "frontal-frontal", "frontal-profile", "profile-profile")
_MAIN_METRICS = ("eer", "fnmr@1e-2", "fnmr@1e-3")
_SIGNS: dict[Judgement, str] = {"better": "▼", "worse": "▲", "no difference": "=", "no interval": "?"}
_MARKS = {RAW: "●", "per_sample": "■", "batch_stat": "▲"}


@dataclass(frozen=True)
class Shown:
    """An estimate as a table shows it; `note` is the number of the footnote that says why there is no value."""

    value: str
    between: str | None = None
    note: int | None = None
    reason: str | None = None
    difference: str | None = None
    difference_between: str | None = None
    judgement: Judgement | None = None

    @property
    def sign(self) -> str:
        """Return the sign of the judgement, which tells it without colour."""
        return _SIGNS[self.judgement] if self.judgement else ""


@dataclass(frozen=True)
class ModeName:
    """A mode in a table: its name, its mark in the figures and the role of its colour."""

    name: str
    mark: str
    role: str


@dataclass
class Table:
    """Rows of estimates, in groups, with the footnotes that they need."""

    caption: str
    heads: list[str]
    groups: list[tuple[str, str, list[tuple[ModeName, list[Shown]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self, estimate: Estimate | None, difference: Estimate | None = None) -> Shown:
        """Format an estimate, and its difference to raw where there is one; number the reason of a missing one."""
        if estimate is None:
            return Shown("\N{EN DASH}")
        if estimate.value is None:
            reason = estimate.reason or "not estimable"
            if reason not in self.notes:
                self.notes.append(reason)
            return Shown(NOT_ESTIMABLE, note=self.notes.index(reason) + 1, reason=reason)
        if difference is None or difference.value is None:
            return Shown(percent(estimate.value), interval(estimate))
        return Shown(
            percent(estimate.value),
            interval(estimate),
            difference=points(difference.value),
            difference_between=points_interval(difference),
            judgement=judge(difference),
        )


@dataclass(frozen=True)
class FigureView:
    """A figure of the page: small panels under one title and one sentence of explanation."""

    key: str
    title: str
    caption: str
    panels: list[Panel]


def render_report(report: ReportInput) -> str:
    """Return the report as one self-contained HTML page; write it as UTF-8.

    The page follows the reader's light or dark theme, fits a screen 360 pixels wide and prints. The same input gives
    the same page.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
    )
    style = _style()
    population = _population(report.evaluation, report.gated.population)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),  # noqa: S704  our own file and palette
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        created=_moment(report.created),
        population=population,
        verdict=_verdict_table(report, population),
        gated_name=f"{metric_name(report.gated.metric)}, {cell_name(report.gated.cell)}",
        tables=[_main_table(one, report) for one in report.evaluation.populations.values() if one.modes],
        details=_detail_tables(population, report.evaluation.fmrs) if population else [],
        search=_search_table(population) if population else None,
        accuracy=_accuracy_rows(population) if population else [],
        figures=[
            (one, [Markup(inline_svg(panel.figure, panel.name, panel.alt)) for panel in one.panels])  # noqa: S704
            for one in _figures(report)
        ],
        weights=report.weights,
        quality_share=percent(report.quality.rows_features / report.quality.rows_read)
        if report.quality.rows_read
        else None,
        provenance=[(key, _plain(value)) for key, value in report.provenance.items()],
    )


def plot_files(report: ReportInput) -> dict[str, bytes]:
    """Return each panel of the report as a file: name (`det-all.svg`, `det-all.png` …) → content.

    SVG files follow the viewer's light or dark theme; PNG files are light.
    """
    files = {}
    for one in _figures(report):
        for panel in one.panels:
            files[f"{panel.name}.svg"] = svg_file(panel.figure, panel.name, panel.alt)
            files[f"{panel.name}.png"] = png_file(panel.figure)
    return files


def markdown_table(evaluation: Evaluation) -> str:
    """Return the main figures of the first population as a Markdown table, such as Prefect shows as an artifact."""
    population = _population(evaluation, "held_out")
    if population is None:
        return "No figures: no labelled rows were evaluated.\n"
    table = _table(population, _present(population, _MAIN_CELLS), _metrics(evaluation))
    heads = ["pose pair", "mode", *(f"{head}, %" for head in table.heads)]
    lines = [_markdown_row(heads), _markdown_row(["---"] * len(heads), escape=False)]
    for title, _, rows in table.groups:
        for mode, cells in rows:
            lines.append(_markdown_row([title, mode.name, *(_markdown_cell(cell) for cell in cells)]))
    notes = [f"{number}. {_escape_markdown(note)}" for number, note in enumerate(table.notes, 1)]
    people = f"{population.n_subjects:,} subjects, {population.n_rows:,} rows"
    left_out = f"; {population.left_out_subjects:,} subjects left out" if population.left_out_subjects else ""
    head = f"{_escape_markdown(population.name)}: {people}{left_out}. 95% intervals in brackets, then mode − raw."
    return "\n".join([head, "", *lines, *([""] if notes else []), *notes, ""])


def _population(evaluation: Evaluation, wanted: str) -> Population | None:
    """Return the wanted population, or else the first that was measured."""
    measured = {name: one for name, one in evaluation.populations.items() if one.modes}
    return measured.get(wanted) or next(iter(measured.values()), None)


def _present(population: Population, cells: Sequence[str]) -> list[str]:
    return [cell for cell in cells if any(cell in mode.cells for mode in population.modes.values())]


def _metrics(evaluation: Evaluation) -> list[str]:
    return [one for one in _MAIN_METRICS if one == "eer" or one.removeprefix("fnmr@") in evaluation.fmrs]


def _shown_cells(report: ReportInput, population: Population) -> list[str]:
    cells = _MAIN_CELLS if report.gated.cell in _MAIN_CELLS else (*_MAIN_CELLS, report.gated.cell)
    return _present(population, cells)


def _verdict_table(report: ReportInput, population: Population | None) -> Table | None:
    if population is None or population.name != report.gated.population:
        return None
    return _table(population, [report.gated.cell], [report.gated.metric])


def _main_table(population: Population, report: ReportInput) -> tuple[Population, Table]:
    return population, _table(population, _shown_cells(report, population), _metrics(report.evaluation))


def _table(population: Population, cells: Sequence[str], metrics: Sequence[str]) -> Table:
    """Build the table of modes within pose pairs, with differences to raw."""
    table = Table(f"Modes by pose pair, population {population.name}", [metric_name(metric) for metric in metrics])
    for cell in cells:
        rows, sizes = [], ""
        for mode in population.modes.values():
            result = mode.cells.get(cell)
            if result is None:
                continue
            sizes = f"{result.n_genuine:,} genuine, {result.n_impostor:,} impostor pairs"
            shown = [table.show(figure_of(result, metric), difference_of(mode, cell, metric)) for metric in metrics]
            rows.append((_mode_name(mode.mode, population), shown))
        table.groups.append((cell_name(cell), sizes, rows))
    return table


def _detail_tables(population: Population, fmrs: Sequence[str]) -> list[Table]:
    """Build the folded table: every pose pair, AUC, d′ and every operating point."""
    heads = ["AUC", "d\N{PRIME}", "EER", *(f"FNMR at {percent_of(fmr)}" for fmr in fmrs)]
    table = Table("Every pose pair and operating point", heads)
    cells = dict.fromkeys(cell for mode in population.modes.values() for cell in mode.cells)
    for cell in cells:
        rows, sizes = [], ""
        for mode in population.modes.values():
            result = mode.cells.get(cell)
            if result is None:
                continue
            sizes = f"{result.n_genuine:,} genuine, {result.n_impostor:,} impostor pairs"
            d_prime = Shown("\N{EN DASH}" if result.d_prime is None else f"{result.d_prime:.2f}")
            shown = [table.show(result.auc), d_prime, table.show(result.eer)]
            shown += [table.show(result.fnmr.get(fmr)) for fmr in fmrs]
            rows.append((_mode_name(mode.mode, population), shown))
        table.groups.append((cell_name(cell), sizes, rows))
    return [table]


def _search_table(population: Population) -> tuple[str, Table] | None:
    """Build the table of 1:N search and the sentence that says what was searched for in what."""
    found = [mode for mode in population.modes.values() if mode.identification]
    if not found:
        return None
    one = found[0].identification
    assert one is not None
    ranks = _keys(mode.identification.rank for mode in found if mode.identification)
    served = _keys(mode.identification.served_rank for mode in found if mode.identification)
    recall = _keys(mode.identification.recall for mode in found if mode.identification)
    fpirs = _keys(mode.identification.fnir for mode in found if mode.identification)
    heads = [f"rank {key}" for key in ranks] + [f"rank {key}, served index" for key in served]
    heads += [f"recall@{key} of the index" for key in recall]
    heads += [f"FNIR at FPIR {percent_of(key)}" for key in fpirs]
    table = Table("Search, 1:N", heads)
    rows = []
    for mode in found:
        result = mode.identification
        assert result is not None
        shown = [table.show(result.rank.get(key)) for key in ranks]
        for figures, keys in ((result.served_rank, served), (result.recall, recall)):
            values = [figures.get(key) for key in keys]
            shown += [Shown("\N{EN DASH}" if value is None else percent(value)) for value in values]
        shown += [table.show(result.fnir.get(key)) for key in fpirs]
        rows.append((_mode_name(mode.mode, population), shown))
    table.groups.append(("", "", rows))
    sentence = (
        f"{one.n_mated:,} {one.probes} probes with a mate and {one.n_non_mated:,} without, searched for in a "
        f"{one.gallery} gallery of {one.n_gallery:,} rows of {one.n_gallery_subjects:,} subjects."
    )
    return sentence, table


def _keys(figures: Any) -> list[str]:
    return sorted({key for one in figures for key in one}, key=float)


def _accuracy_rows(population: Population) -> list[dict[str, Any]]:
    return [
        {
            "protocol": pairs.protocol,
            "mode": _mode_name(mode.mode, population),
            "accuracy": None
            if pairs.accuracy_mean is None
            else percent(pairs.accuracy_mean)
            + ("" if pairs.accuracy_sd is None else f" ± {percent(pairs.accuracy_sd)}"),
            "reason": pairs.reason or "not estimable",
            "eer": None if pairs.eer is None else percent(pairs.eer),
            "pairs": f"{pairs.n_pairs:,}",
            "missing": f"{pairs.missing:,}",
            "folds": pairs.n_folds,
        }
        for mode in population.modes.values()
        for pairs in mode.pairs
    ]


def _mode_name(mode: str, population: Population) -> ModeName:
    return ModeName(mode, _MARKS.get(mode, "◆"), mode_role(mode, list(population.modes)))


def _figures(report: ReportInput) -> list[FigureView]:
    """Draw every figure for which there are measurements, in the order of the page."""
    population = _population(report.evaluation, report.gated.population)
    modes: dict[str, ModeResult] = population.modes if population else {}
    cells = _shown_cells(report, population) if population else []
    fmrs = report.evaluation.fmrs
    point = "1e-3" if "1e-3" in fmrs or not fmrs else fmrs[0]
    threshold = f"the one threshold at which {percent_of(point)} of all impostor pairs match"
    figures = [
        FigureView(
            "differences",
            "Better or worse than raw",
            "Each mark is a mode's error minus that of the raw embeddings: left of the line is better. A filled mark "
            "is a difference, its 95% interval clear of the line; a hollow one may be chance.",
            plots.differences(modes, cells, _metrics(report.evaluation)),
        ),
        FigureView(
            "det",
            "Errors at every threshold",
            "How many genuine pairs are missed (up) for how many impostor pairs are let in (right), on normal-deviate "
            "axes: the lower curve is better. Marks stand at FMR 0.1% and 1%, with 95% intervals.",
            plots.det_curves(modes, cells),
        ),
        FigureView(
            "scores",
            "Scores",
            "Filled: two pictures of one person. Outline: pictures of two people. A pair right of the dotted line, "
            f"{threshold}, is a match: the less the two overlap the better.",
            plots.score_histograms(modes, cells, point),
        ),
        FigureView(
            "poses",
            "Missed genuine pairs by pose",
            f"FNMR with {threshold}: a strong colour marks poses that are served badly. n counts genuine pairs; the "
            "colours mean the same every night.",
            plots.pose_heat_maps(modes, point),
        ),
        FigureView(
            "search",
            "Search",
            "Left, how often the right person is among the first k found: higher is better. Right, how often a person "
            "who is in the gallery is missed when so many strangers are let in: lower is better.",
            plots.identification_curves(modes),
        ),
        FigureView(
            "weights",
            "Channel weights",
            "Channels by falling weight, with the spread over the sampled rows as a band; numbers name the channels "
            "that count most. A flat line means that all channels are treated alike.",
            plots.channel_weights(report.weights),
        ),
        FigureView(
            "trend",
            "Release after release",
            f"{metric_name(report.gated.metric)}, {cell_name(report.gated.cell)}, the figure that decides, with 95% "
            "intervals: lower is better. Hollow marks are releases that were not promoted.",
            plots.trend_lines(report.trend),
        ),
    ]
    return [one for one in figures if one.panels]


def _style() -> str:
    colours = variables()
    return (
        f":root {{ {colours['light']} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {colours['dark']} }} }}\n"
        f"{(_TEMPLATES / 'report.css').read_text(encoding='utf-8')}\n{plot_rules()}\n{mode_rules()}\n"
    )


def _moment(moment: datetime) -> tuple[str, str]:
    """Return a time for machines and for people, in UTC where its zone is known."""
    if moment.tzinfo is None:
        return moment.isoformat(), f"{moment:%d %B %Y, %H:%M}"
    moment = moment.astimezone(UTC)
    return moment.isoformat(), f"{moment:%d %B %Y, %H:%M} UTC"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _markdown_row(cells: Sequence[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(_escape_markdown(cell) if escape else cell for cell in cells) + " |"


def _markdown_cell(cell: Shown) -> str:
    if cell.note:
        return f"{cell.value} ({cell.note})"
    parts = [cell.value, f"({cell.between})" if cell.between else ""]
    parts.append(f"{cell.sign} {cell.difference} {cell.judgement}" if cell.difference else "")
    return " ".join(filter(None, parts))


def _escape_markdown(text: str) -> str:
    """Return `text` so that neither Markdown nor HTML within it means anything."""
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|~!" else character for character in escaped)
