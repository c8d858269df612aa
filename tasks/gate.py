"""Gate: whether a release is promoted. Pure decisions over the metrics of an evaluation.

Each guarded metric of each mode is compared over held-out subjects: with the same mode of the served release or, where
that mode is not served, with raw. It is significantly worse where the 95% interval (paired bootstrap) of the difference
is wholly above the tolerance; one such metric rejects the release. What was measured of the served release must be
measured of the next one too: without a comparison the release is rejected, unless the settings say otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.text import cell_name, counted, metric_name, points, points_interval
from schemas.metrics import ALL, HELD_OUT, RAW, MetricId
from schemas.releases import Release
from schemas.reports import (
    Estimate,
    Evaluation,
    GateDecision,
    GatedMetric,
    GuardedResult,
    GuardOutcome,
    ModeResult,
    Population,
)
from schemas.settings import GateSettings, Guard

NOT_MEASURED = "there are fewer than two labelled held-out subjects"
LEAKAGE = "leakage cannot be excluded, since its training subjects are unknown"
WAY_OUT = "fix the labels or the model, or set [gate] unmeasured = 'promote'"


@dataclass(frozen=True)
class Gated:
    """The first guarded metric, and its value per mode, raw included; no values where nothing was measured."""

    metric: GatedMetric
    values: dict[str, Estimate]

    @property
    def name(self) -> str:
        """The metric in words, such as 'frontal–profile EER'."""
        return _name(self.metric.cell, self.metric.metric)


def gated(evaluation: Evaluation, settings: GateSettings) -> Gated:
    """Return the first guarded metric, over all pairs where its cell is empty.

    A mode whose training subjects are unknown has no value.
    """
    population = evaluation.populations.get(HELD_OUT)
    first = settings.guarded[0] if population is None else guarded(population, settings)[0]
    metric = GatedMetric(population=HELD_OUT, cell=first.cell, metric=first.metric)
    modes = population.modes if population is not None else {}
    return Gated(metric, {mode: value for mode, one in modes.items() if (value := _value(one, first))})


def guarded(population: Population, settings: GateSettings) -> list[Guard]:
    """Return the guarded metrics; over all pairs where a cell has no genuine or no impostor pair."""
    found: dict[tuple[str, MetricId], Guard] = {}
    for guard in settings.guarded:
        cell = guard.cell if _has_pairs(population, guard.cell) else ALL
        found.setdefault((cell, guard.metric), Guard(cell=cell, metric=guard.metric, tolerance=guard.tolerance))
    return list(found.values())


def decide(evaluation: Evaluation, settings: GateSettings, served: Release | None) -> GateDecision:
    """Decide on promotion; every comparison is recorded, and the reason is one sentence.

    Args:
        evaluation: the metrics.
        settings: what is guarded, with which tolerance.
        served: the release served until now, or None for the first.
    """
    population = evaluation.populations.get(HELD_OUT)
    if population is None:
        if served is not None and _was_measured(served) and settings.unmeasured == "keep":
            return GateDecision(promoted=False, reason=_not_comparable(served, NOT_MEASURED))
        return GateDecision(promoted=True, reason=f"without a measurement: {NOT_MEASURED}")
    guards = guarded(population, settings)
    subjects = population.n_subjects
    measured_on = f"; on {counted(subjects, 'held-out subject')}"
    replaced = _replaced_cells(population, settings)
    results = [
        _compare(result, guard, settings, served, evaluation.served_unread)
        for mode, result in population.modes.items()
        if mode != RAW
        for guard in guards
    ]
    for one in results:
        if one.outcome == "worse":
            reason = f"{_sentence(one)}, significantly worse than the tolerance of {100 * one.tolerance:g} points"
            return GateDecision(
                promoted=False,
                reason=reason + measured_on + replaced,
                compared_with=one.reference,
                judged=results,
                held_out_subjects=subjects,
            )
    for one in results:
        if served is not None and one.outcome == "not compared" and _must_compare(one.mode, one, settings, served):
            reason = _not_comparable(served, f"{one.mode}: {one.difference.reason}")
            return GateDecision(promoted=False, reason=reason + replaced, judged=results, held_out_subjects=subjects)
    references = {one.reference for one in results if one.reference is not None}
    return GateDecision(
        promoted=True,
        reason=_why_promoted(results, guards[0]) + (measured_on if references else "") + replaced,
        compared_with=references.pop() if len(references) == 1 else None,
        judged=results,
        held_out_subjects=subjects,
    )


def _compare(
    result: ModeResult, guard: Guard, settings: GateSettings, served: Release | None, served_unread: str | None
) -> GuardedResult:
    value, name = _value(result, guard), _name(guard.cell, guard.metric)
    reference, difference = RAW, result.difference_to_raw(guard.cell, guard.metric)
    if served is not None and result.mode in served.models:
        to_served = result.difference_to_served(guard.cell, guard.metric)
        known = to_served is not None and to_served.value is not None
        if known or _must_compare(result.mode, guard, settings, served):
            reference, difference = served.release, to_served
    if value is None or value.value is None or difference is None or difference.value is None:
        reason = f"{name} is not estimable"
        if value is None:
            reason = LEAKAGE
        elif value.value is not None and reference != RAW:
            reason = served_unread or f"{name}: the two releases have too few held-out subjects in common"
        difference = Estimate(value=None, reason=reason)
    return GuardedResult(
        mode=result.mode,
        cell=guard.cell,
        metric=guard.metric,
        tolerance=guard.tolerance,
        value=value.value if value else None,
        reference=reference if difference.value is not None else None,
        difference=difference,
        outcome=_outcome(difference, guard.tolerance),
    )


def _outcome(difference: Estimate, tolerance: float) -> GuardOutcome:
    if difference.value is None:
        return "not compared"
    lowest = difference.value if difference.low is None else difference.low
    return "worse" if lowest > tolerance else "not worse"


def _must_compare(mode: str, guard: Guard | GuardedResult, settings: GateSettings, served: Release) -> bool:
    """Return whether only a comparison with the served release will do: this metric of this mode was measured there."""
    if settings.unmeasured == "promote" or mode not in served.models:
        return False
    for one in served.gate.judged:
        if (one.mode, one.cell, one.metric) == (mode, guard.cell, guard.metric):
            return one.value is not None
    return _was_measured(served, mode)


def _was_measured(served: Release, mode: str | None = None) -> bool:
    values = [served.gated.get(one) for one in ([mode] if mode else served.models)]
    return any(value is not None and value.value is not None for value in values)


def _not_comparable(served: Release, why: str) -> str:
    return f"it cannot be compared with {served.release}, which is served and was measured: {why}; {WAY_OUT}"


def _why_promoted(results: Sequence[GuardedResult], first: Guard) -> str:
    """Describe the first guarded metric of each mode in full, and name the others."""
    parts, others = [], []
    for one in results:
        if one.outcome == "not compared":
            parts.append(f"{one.mode}: {one.difference.reason}")
        elif (one.cell, one.metric) == (first.cell, first.metric):
            parts.append(_sentence(one))
        else:
            others.append(_name(one.cell, one.metric))
    if others:
        names = " or ".join(dict.fromkeys(others))
        parts.append(f"not significantly worse (95% paired bootstrap) in {names}")
    measured = any(one.outcome != "not compared" for one in results)
    return ("" if measured else "without a measurement: ") + "; ".join(dict.fromkeys(parts))


def _sentence(one: GuardedResult) -> str:
    assert one.value is not None
    assert one.difference.value is not None
    name, change = _name(one.cell, one.metric), points(one.difference.value)
    between = points_interval(one.difference)
    return f"{one.mode}: {name} {one.value:.2%}, {change} points against {one.reference}" + (
        f" (95% interval {between})" if between else ""
    )


def _replaced_cells(population: Population, settings: GateSettings) -> str:
    """Name the cells of the settings that are empty."""
    cells = dict.fromkeys(guard.cell for guard in settings.guarded)
    empty = [cell_name(cell) for cell in cells if not _has_pairs(population, cell)]
    return f"; there are no {' or '.join(empty)} pairs, so all pairs are compared instead" if empty else ""


def _has_pairs(population: Population, cell: str) -> bool:
    found = population.modes[RAW].cells.get(cell)
    return cell == ALL or (found is not None and found.n_genuine > 0 and found.n_impostor > 0)


def _value(result: ModeResult, guard: Guard) -> Estimate | None:
    return result.cells[guard.cell].estimate(guard.metric) if result.training_subjects_known else None


def _name(cell: str, metric: MetricId) -> str:
    return f"{cell_name(cell)} {metric_name(metric)}"
