"""The report of a release: one HTML file that says whether the models helped, with the evidence.

`render_report` turns a `ReportInput` into a page that needs nothing else: no script, no font, no network, and a content
security policy that forbids them. Text from data is escaped, and its control characters are written out.
Plots are drawn by `reports.plots`, wording is in `reports.text`, layout in `templates/`. The caller writes the page.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.expansion import expansion_table
from reports.tables import (
    Shown,
    Table,
    accuracy_rows,
    detail_table,
    filled,
    gate_tiles,
    index_rows,
    pose_table,
    present,
    search_table,
    stage_rows,
    threshold_table,
    versus_rows,
)
from reports.text import (
    cell_name,
    changes_in_words,
    metric_name,
    percent,
    percent_of,
    visible,
)
from reports.theme import mode_rules, variables
from schemas.metrics import EER, HELD_OUT, MAIN_CELLS, MetricId
from schemas.reports import Evaluation, ModeResult, Population, ReportInput, StageCost

if TYPE_CHECKING:
    from reports.drawing import Plot

_TEMPLATES = Path(__file__).parent / "templates"


_STAGE_HEADS = ("stage", "seconds", "CPU seconds", "rows", "rows/s", "peak MB")


_MAIN_METRICS = (EER, MetricId("fnmr_global@1e-2"), MetricId("fnmr_global@1e-3"))


@dataclass(frozen=True)
class FigureView:
    """A figure of the page: small plots under one title and one sentence of explanation."""

    key: str
    title: str
    caption: str
    plots: "list[Plot]"


def render_report(report: ReportInput, drawn: Sequence[FigureView] | None = None) -> str:
    """Return the report as one self-contained HTML page; write it as UTF-8.

    The page follows the reader's light or dark theme, fits a screen 360 pixels wide and prints. The same input gives
    the same page. Pass `drawn` if the figures are drawn already, by `draw`.
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
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        created=_moment(report.created),
        population=population,
        tiles=gate_tiles(population, report.gated) if population and population.name == report.gated.population else [],
        gated_name=f"{metric_name(report.gated.metric)}, {cell_name(report.gated.cell)}",
        tables=[_main_table(one, report) for one in report.evaluation.populations.values() if one.modes],
        other_poses=_other_poses(population, report) if population else None,
        thresholds=threshold_table(population, report.evaluation.fmrs) if population else None,
        detail=detail_table(population, report.evaluation.fmrs) if population else None,
        search=search_table(population) if population else None,
        expansion=expansion_table(population) if population else None,
        indexes=index_rows(report.evaluation),
        versus=versus_rows(population) if population else [],
        accuracy=accuracy_rows(population) if population else [],
        figures=[
            (one, [(plot.alt, base64.b64encode(plot.svg).decode()) for plot in one.plots])
            for one in (draw(report) if drawn is None else drawn)
        ],
        weights=report.weights,
        quality_share=percent(report.quality.rows_features / report.quality.rows_read)
        if report.quality.rows_read
        else None,
        changes=changes_in_words(report.gate.changes) if report.gate.changes else None,
        stages=stage_rows(report.stages),
        stage_heads=_STAGE_HEADS,
        provenance=[(key, _plain(value)) for key, value in report.provenance.items()],
    )


def markdown_table(evaluation: Evaluation) -> str:
    """Return the main metrics of the held-out population as a Markdown table, for a Prefect artifact."""
    population = _population(evaluation, HELD_OUT)
    if population is None:
        return "Nothing was measured: no labelled rows were evaluated.\n"
    table = pose_table(population, present(population, MAIN_CELLS), _metrics(evaluation))
    heads = ["pose pair", "mode", *(f"{head}, %" for head in table.heads)]
    lines = [_markdown_row(heads), _markdown_row(["---"] * len(heads), escape=False)]
    for title, _, rows in table.groups:
        for mode, cells in rows:
            lines.append(_markdown_row([title, mode.name, *(_markdown_cell(cell) for cell in cells)]))
    notes = [f"{number}. {_escape_markdown(note)}" for number, note in enumerate(table.notes, 1)]
    people = f"{population.n_subjects:,} subjects, {population.n_rows:,} rows"
    left_out = f"; {population.left_out_subjects:,} subjects excluded" if population.left_out_subjects else ""
    head = f"{_escape_markdown(population.name)}: {people}{left_out}. 95% intervals in brackets, then mode − raw. "
    head += "FNMR is at one threshold per mode, found at the global FMR."
    return "\n".join([head, "", *lines, *([""] if notes else []), *notes, ""])


def markdown_stages(stages: Sequence[StageCost]) -> str:
    """Return what the stages of a run took as a Markdown table, for a Prefect artifact."""
    lines = [_markdown_row(_STAGE_HEADS), _markdown_row(["---"] * len(_STAGE_HEADS), escape=False)]
    return "\n".join([*lines, *map(_markdown_row, stage_rows(stages)), ""])


def _population(evaluation: Evaluation, wanted: str) -> Population | None:
    """Return the wanted population, or else the first that was measured."""
    measured = {name: one for name, one in evaluation.populations.items() if one.modes}
    return measured.get(wanted) or next(iter(measured.values()), None)


def _metrics(evaluation: Evaluation) -> list[MetricId]:
    return [one for one in _MAIN_METRICS if one.fmr is None or one.fmr_text in evaluation.fmrs]


def _shown_cells(report: ReportInput, population: Population) -> list[str]:
    cells = MAIN_CELLS if report.gated.cell in MAIN_CELLS else (*MAIN_CELLS, report.gated.cell)
    return present(population, cells)


def _main_table(population: Population, report: ReportInput) -> tuple[Population, Table]:
    return population, pose_table(population, _shown_cells(report, population), _metrics(report.evaluation))


def _other_poses(population: Population, report: ReportInput) -> Table | None:
    """Return the table of the pose pairs that the main table leaves out, None where there are none."""
    shown = _shown_cells(report, population)
    others = [cell for cell in filled(population) if cell not in shown]
    return pose_table(population, others, _metrics(report.evaluation)) if others else None


def draw(report: ReportInput) -> list[FigureView]:
    """Draw every figure for which there are measurements, in the order of the page."""
    from reports import plots  # matplotlib is not loaded by a run in which nothing changed

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
            "Each mark is a mode's error minus that of the raw embeddings: left of the line is better. A mark is "
            "filled where its 95% interval excludes zero; the difference of a hollow one may be chance.",
            plots.differences(modes, cells, _metrics(report.evaluation)),
        ),
        FigureView(
            "det",
            "DET curves",
            "False non-match rate over false match rate at every threshold, on normal-deviate axes: the lower curve is "
            "better. Marks are at the pose pair's own FMR 0.1% and 1%, with 95% intervals. A curve ends where fewer "
            "than 30 impostor pairs match.",
            plots.det_curves(modes, cells),
        ),
        FigureView(
            "scores",
            "Scores",
            "Filled: genuine pairs. Outline: impostor pairs. A pair at or right of the dotted line matches; it is "
            f"{threshold}. Less overlap is better.",
            plots.score_histograms(modes, cells, point),
        ),
        FigureView(
            "poses",
            "FNMR by pose pair",
            f"FNMR at {threshold}. A stronger colour is a higher error. n is the number of genuine pairs. The "
            "colour scale is the same in every report.",
            plots.pose_heat_maps(modes, point),
        ),
        FigureView(
            "search",
            "Identification",
            "Left: the share of mated probes whose subject is among the first k; higher is better. "
            "Right: FNIR over FPIR; lower is better.",
            plots.identification_curves(modes),
        ),
        FigureView(
            "weights",
            "Channel weights",
            "Channels by falling weight, with the standard deviation over the sampled rows as a band. The numbers are "
            "the channels of largest weight. A flat line means that all channels have the same weight.",
            plots.channel_weights(report.weights),
        ),
        FigureView(
            "trend",
            "Trend",
            f"{metric_name(report.gated.metric)}, {cell_name(report.gated.cell)}, the gated metric, with 95% "
            "intervals: lower is better. Hollow marks are rejected releases.",
            plots.trend_lines(report.trend),
        ),
    ]
    return [one for one in figures if one.plots]


def _style() -> str:
    colours = variables()
    return (
        f":root {{ {colours['light']} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {colours['dark']} }} }}\n"
        f"{(_TEMPLATES / 'report.css').read_text(encoding='utf-8')}\n{mode_rules()}\n"
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
    parts.append(f"{cell.sign} {cell.difference} {cell.verdict}" if cell.difference else "")
    return " ".join(filter(None, parts))


def _escape_markdown(text: str) -> str:
    """Return `text` so that neither Markdown nor HTML within it means anything."""
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|~!" else character for character in escaped)
