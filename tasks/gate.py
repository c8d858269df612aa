"""Gate: whether a release is served. Pure decisions over the figures of an evaluation.

Every mode is judged in every guarded figure over the subjects that no model has seen. It is worse with confidence where
the 95% interval of the paired difference to its reference lies wholly above the tolerance; one such figure keeps the
release back. The reference is the same mode of the release served until now, or raw where that mode is not served. What
was measured of the served release must be measured of the next one too: without a comparison the release is rejected,
unless the settings say otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.text import cell_name, metric_name, points
from schemas.metrics import ALL, HELD_OUT, RAW, MetricId
from schemas.releases import Release
from schemas.reports import Estimate, Evaluation, GateDecision, GatedMetric, GuardedResult, ModeResult, Population
from schemas.settings import GateSettings, Guard

NOBODY = "there are fewer than two labelled subjects that no model has seen"
UNTOLD = "its model does not tell whom it was trained on"
WAY_OUT = "; mend the labels or the model, or set [gate] unmeasured = 'promote'"


@dataclass(frozen=True)
class Gated:
    """The figure that is judged first, and its value per mode, raw included; no figures where nothing was measured."""

    metric: GatedMetric
    figures: dict[str, Estimate]

    @property
    def name(self) -> str:
        """The metric in words, such as 'frontal–profile EER'."""
        return _name(self.metric.cell, self.metric.metric)


def gated(evaluation: Evaluation, settings: GateSettings) -> Gated:
    """Return the figure that is judged first, over all pairs where its cell is empty.

    A mode whose model does not tell whom it was trained on has no figure.
    """
    population = evaluation.populations.get(HELD_OUT)
    first = settings.figures[0] if population is None else guarded(population, settings)[0]
    metric = GatedMetric(population=HELD_OUT, cell=first.cell, metric=first.metric)
    modes = population.modes if population is not None else {}
    return Gated(metric, {mode: figure for mode, one in modes.items() if (figure := _figure(one, first))})


def guarded(population: Population, settings: GateSettings) -> list[Guard]:
    """Return what is judged: the guarded figures, in all pairs where a cell has no genuine or no impostor pair."""
    figures: dict[tuple[str, MetricId], Guard] = {}
    for figure in settings.figures:
        cell = figure.cell if _has_pairs(population, figure.cell) else ALL
        figures.setdefault((cell, figure.metric), figure.model_copy(update={"cell": cell}))
    return list(figures.values())


def decide(evaluation: Evaluation, settings: GateSettings, served: Release | None) -> GateDecision:
    """Decide on promotion, in one sentence with the number and the interval.

    Args:
        evaluation: the figures.
        settings: what is guarded, with which tolerance.
        served: the release served until now, or None for the first.
    """
    population = evaluation.populations.get(HELD_OUT)
    if population is None:
        if served is not None and _was_measured(served) and settings.unmeasured == "keep":
            return GateDecision(promoted=False, reason=_incomparable(served, NOBODY))
        return GateDecision(promoted=True, reason=f"promoted without a measurement: {NOBODY}")
    figures = guarded(population, settings)
    moved = _moved(population, settings)
    modes = [result for mode, result in population.modes.items() if mode != RAW]
    unread = evaluation.served_unread
    judged = [_judge(result, figure, settings, served, unread) for result in modes for figure in figures]
    for one in judged:
        surely = one.difference.value if one.difference.low is None else one.difference.low
        if surely is not None and surely > one.tolerance:
            reason = f"rejected: {_sentence(one)}, worse than the tolerance of {100 * one.tolerance:g} points"
            return GateDecision(promoted=False, reason=reason + moved, compared_with=one.reference, judged=judged)
    for one in judged:
        if served is not None and one.difference.value is None and _must_compare(one.mode, one, settings, served):
            reason = _incomparable(served, f"{one.mode}: {one.difference.reason}")
            return GateDecision(promoted=False, reason=reason + moved, judged=judged)
    references = {one.reference for one in judged if one.reference is not None}
    return GateDecision(
        promoted=True,
        reason=_praise(judged, figures) + moved,
        compared_with=references.pop() if len(references) == 1 else None,
        judged=judged,
    )


def _judge(
    result: ModeResult, figure: Guard, settings: GateSettings, served: Release | None, unread: str | None
) -> GuardedResult:
    now = _figure(result, figure)
    reference, difference = RAW, result.difference_to_raw(figure.cell, figure.metric)
    if served is not None and result.mode in served.models:
        before = result.difference_to_served(figure.cell, figure.metric)
        if (before is not None and before.value is not None) or _must_compare(result.mode, figure, settings, served):
            reference, difference = served.release, before
    reason = UNTOLD
    if now is not None:
        name = _name(figure.cell, figure.metric)
        reason = f"{name} is not estimable"
        if now.value is not None and reference != RAW:
            reason = unread or f"{name} has too few subjects in common that the models of both have not seen"
    if now is None or now.value is None or difference is None or difference.value is None:
        difference = Estimate(value=None, reason=reason)
    return GuardedResult(
        mode=result.mode,
        cell=figure.cell,
        metric=figure.metric,
        tolerance=figure.tolerance,
        value=now.value if now else None,
        reference=reference if difference.value is not None else None,
        difference=difference,
    )


def _must_compare(mode: str, figure: Guard | GuardedResult, settings: GateSettings, served: Release) -> bool:
    """Return whether only a comparison with the served release will do: it was measured in this figure of this mode."""
    if settings.unmeasured == "promote" or mode not in served.models:
        return False
    for one in served.gate.judged:
        if (one.mode, one.cell, one.metric) == (mode, figure.cell, figure.metric):
            return one.value is not None
    return _was_measured(served, mode)


def _was_measured(served: Release, mode: str | None = None) -> bool:
    figures = [served.gated.get(one) for one in ([mode] if mode else served.models)]
    return any(figure is not None and figure.value is not None for figure in figures)


def _incomparable(served: Release, why: str) -> str:
    return f"rejected: it cannot be compared with {served.release}, which is served and was measured: {why}{WAY_OUT}"


def _praise(judged: Sequence[GuardedResult], figures: Sequence[Guard]) -> str:
    """Say of each mode how it does in the first figure, and of the others that they were looked at."""
    parts, harmless = [], []
    for one in judged:
        if one.difference.value is None:
            parts.append(f"{one.mode}: {one.difference.reason}")
        elif (one.cell, one.metric) == (figures[0].cell, figures[0].metric):
            parts.append(_sentence(one))
        else:
            harmless.append(_name(one.cell, one.metric))
    if harmless:
        parts.append(f"nothing is worse beyond its tolerance in {' or '.join(dict.fromkeys(harmless))}")
    measured = any(one.difference.value is not None for one in judged)
    return ("promoted: " if measured else "promoted without a measurement: ") + "; ".join(dict.fromkeys(parts))


def _sentence(one: GuardedResult) -> str:
    assert one.value is not None
    assert one.difference.value is not None
    name, change = _name(one.cell, one.metric), points(one.difference.value)
    sentence = f"{one.mode}: {name} {one.value:.2%}, {change} points against {one.reference}"
    if one.difference.low is None or one.difference.high is None:
        return sentence
    return f"{sentence} (95% interval {points(one.difference.low)} to {points(one.difference.high)})"


def _moved(population: Population, settings: GateSettings) -> str:
    """Say which cells of the settings are empty."""
    cells = dict.fromkeys(figure.cell for figure in settings.figures)
    empty = [cell_name(cell) for cell in cells if not _has_pairs(population, cell)]
    return f"; there are no {' or '.join(empty)} pairs, so all pairs were judged instead" if empty else ""


def _has_pairs(population: Population, cell: str) -> bool:
    found = population.modes[RAW].cells.get(cell)
    return cell == ALL or (found is not None and found.n_genuine > 0 and found.n_impostor > 0)


def _figure(result: ModeResult, figure: Guard) -> Estimate | None:
    return result.cells[figure.cell].estimate(figure.metric) if result.training_subjects_known else None


def _name(cell: str, metric: MetricId) -> str:
    return f"{cell_name(cell)} {metric_name(metric)}"
