"""Gate: whether a release is promoted, and why in one sentence. Pure decisions over the metrics of an evaluation.

`tasks.judgement` compares the guarded metrics of each mode over held-out subjects. A release is rejected where one is

- worse than the served release, the anchor or raw;
- not compared with what was measured of the served release or the anchor, unless `unmeasured = "promote"`;
- undecided, since there are too few subjects or false matches, unless `undecided = "promote"`.

Where nothing is served yet, only "worse than raw" rejects, and too few subjects are a warning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.text import cell_name, counted, points, points_interval, relative
from schemas.metrics import ALL, HELD_OUT, RAW, MetricId
from schemas.releases import Release
from schemas.reports import (
    Estimate,
    Evaluation,
    GateDecision,
    GatedMetric,
    GuardedResult,
    Population,
)
from schemas.settings import GateSettings, Guard
from tasks.judgement import judge, must_compare, name_of, was_measured

NOT_MEASURED = "there are fewer than two labelled held-out subjects"
WAY_OUT = "fix the labels or the model, or set [gate] unmeasured = 'promote'"

MORE_SUBJECTS = "label or hold out more subjects, or set [gate] undecided = 'promote'"


@dataclass(frozen=True)
class Gated:
    """The first guarded metric, and its value per mode, raw included; no values where nothing was measured."""

    metric: GatedMetric
    values: dict[str, Estimate]

    @property
    def name(self) -> str:
        """The metric in words, such as 'frontal–profile EER'."""
        return name_of(self.metric.cell, self.metric.metric)


def gated(evaluation: Evaluation, settings: GateSettings) -> Gated:
    """Return the first guarded metric, over all pairs where its cell is empty.

    A mode whose training subjects are unknown has no value.
    """
    population = evaluation.populations.get(HELD_OUT)
    first = settings.guarded[0] if population is None else guarded(population, settings)[0]
    metric = GatedMetric(population=HELD_OUT, cell=first.cell, metric=first.metric)
    values = {}
    for mode, result in population.modes.items() if population is not None else ():
        value = result.cells[first.cell].estimate(first.metric) if result.training_subjects_known else None
        if value is not None:
            values[mode] = value
    return Gated(metric, values)


def guarded(population: Population, settings: GateSettings) -> list[Guard]:
    """Return the guarded metrics; over all pairs where a cell has no genuine or no impostor pair."""
    found: dict[tuple[str, MetricId], Guard] = {}
    for guard in settings.guarded:
        cell = guard.cell if _has_pairs(population, guard.cell) else ALL
        found.setdefault((cell, guard.metric), Guard(cell=cell, metric=guard.metric, tolerance=guard.tolerance))
    return list(found.values())


def decide(
    evaluation: Evaluation, settings: GateSettings, served: Release | None, anchor: Release | None = None
) -> GateDecision:
    """Decide on promotion; every comparison is recorded, and the reason is one sentence.

    Args:
        evaluation: the metrics.
        settings: what is guarded, with which tolerance and margin.
        served: the release served until now, or None for the first.
        anchor: the release that none may be inferior to (`schemas.releases.anchor_of`).
    """
    population = evaluation.populations.get(HELD_OUT)
    if population is None:
        if served is not None and was_measured(served) and settings.unmeasured == "keep":
            return GateDecision(promoted=False, reason=_not_comparable(served, NOT_MEASURED))
        return GateDecision(promoted=True, reason=f"without a measurement: {NOT_MEASURED}")
    guards = guarded(population, settings)
    judged = judge(evaluation, population, guards, settings, served, anchor)
    promoted, reason = _decision(judged, settings, guards[0], population.n_subjects, served, anchor)
    compared_with = RAW if all(one.against == "raw" for one in judged) else None
    if served is not None and any(one.against == "served" and one.difference.value is not None for one in judged):
        compared_with = served.release
    return GateDecision(
        promoted=promoted,
        reason=reason + _replaced_cells(population, settings),
        compared_with=compared_with,
        anchor=anchor.release if anchor is not None else None,
        judged=judged,
        held_out_subjects=population.n_subjects,
    )


def _decision(
    judged: Sequence[GuardedResult],
    settings: GateSettings,
    first: Guard,
    subjects: int,
    served: Release | None,
    anchor: Release | None,
) -> tuple[bool, str]:
    measured_on = f"; on {counted(subjects, 'held-out subject')}"
    for one in judged:
        if one.outcome == "worse":
            return False, _why_worse(one, judged, settings) + measured_on
    for one in judged:
        reference = {"served": served, "anchor": anchor, "raw": None}[one.against]
        if (
            reference is not None
            and one.outcome == "not compared"
            and must_compare(one.mode, one.cell, one.metric, settings, reference)
        ):
            return False, _not_comparable(reference, f"{one.mode}: {one.difference.reason}", one.against)
    open_ = [one for one in judged if one.outcome == "undecided" and one.against != "raw"]
    if open_ and settings.undecided == "reject":
        return False, f"cannot decide: {_why_undecided(open_, subjects, settings)}; {MORE_SUBJECTS}"
    compared = any(one.difference.value is not None for one in judged)
    reason = _why_promoted(judged, first) + (measured_on if compared else "")
    if not open_:
        open_ = [one for one in judged if one.against == "raw" and (one.subjects_needed or 0) > subjects]
    return True, reason + (f"; warning: {_why_undecided(open_, subjects, settings)}" if open_ else "")


def _not_comparable(reference: Release, why: str, against: str = "served") -> str:
    if against == "anchor":
        return (
            f"it cannot be compared with the anchor {reference.release}: {why}; choose another with "
            f"`frontalis anchor`, or {WAY_OUT}"
        )
    return f"it cannot be compared with {reference.release}, which is served and was measured: {why}; {WAY_OUT}"


def _why_worse(one: GuardedResult, judged: Sequence[GuardedResult], settings: GateSettings) -> str:
    if one.against == "anchor" and one.relative_bound is not None and one.relative_bound > settings.margin:
        return f"{_sentence(one)}, more than [gate] margin = {settings.margin:g} allows"
    family = sum(other.outcome in ("worse", "not worse") for other in judged)
    holm = f" (Holm over {family} comparisons)" if family > 1 else ""
    return f"{_sentence(one)}, significantly worse than the tolerance of {100 * one.tolerance:g} points{holm}"


def _why_undecided(found: Sequence[GuardedResult], subjects: int, settings: GateSettings) -> str:
    """Say which metric needs the most subjects, and how many."""
    one = max(found, key=lambda each: each.subjects_needed or 0)
    held_out = f"{counted(subjects, 'held-out subject')} are too few"
    if one.subjects_needed:
        held_out += f", about {one.subjects_needed:,} are needed"
    if one.relative_bound is None:
        return f"{one.mode}: {name_of(one.cell, one.metric)} rests on fewer than 30 false matches; {held_out}"
    whom = "raw" if one.against == "raw" else f"the anchor {one.reference}"
    return (
        f"{one.mode}: {name_of(one.cell, one.metric)} may be up to {relative(one.relative_bound)} above {whom} (95%), "
        f"more than [gate] margin = {settings.margin:g} allows; {held_out}"
    )


def _why_promoted(judged: Sequence[GuardedResult], first: Guard) -> str:
    """Describe the first guarded metric of each mode in full, and name the others."""
    parts, others = [], []
    with_reference = {one.mode for one in judged if one.against != "raw" and one.difference.value is not None}
    for one in judged:
        if one.outcome == "same model":
            parts.append(f"{one.mode}: the model of {one.reference}")
        elif one.outcome == "not compared":
            parts.append(f"{one.mode}: {one.difference.reason}")
        elif (one.cell, one.metric) != (first.cell, first.metric):
            others.append(name_of(one.cell, one.metric))
        elif one.against != "raw" or one.mode not in with_reference:
            parts.append(_sentence(one))
    if others:
        names = " or ".join(dict.fromkeys(others))
        parts.append(f"not significantly worse (95%) in {names}")
    measured = any(one.outcome != "not compared" for one in judged)
    return ("" if measured else "without a measurement: ") + "; ".join(dict.fromkeys(parts))


def _sentence(one: GuardedResult) -> str:
    assert one.value is not None
    assert one.difference.value is not None
    change, between = points(one.difference.value), points_interval(one.difference)
    reference = f"the anchor {one.reference}" if one.against == "anchor" else one.reference
    found = f"{one.mode}: {name_of(one.cell, one.metric)} {one.value:.2%}, {change} points against {reference}" + (
        f" (95% interval {between})" if between else ""
    )
    if one.against == "anchor" and one.relative_bound is not None:
        found += f", at most {relative(one.relative_bound)} above it (95%)"
    return found


def _replaced_cells(population: Population, settings: GateSettings) -> str:
    """Name the cells of the settings that are empty."""
    cells = dict.fromkeys(guard.cell for guard in settings.guarded)
    empty = [cell_name(cell) for cell in cells if not _has_pairs(population, cell)]
    return f"; there are no {' or '.join(empty)} pairs, so all pairs are compared instead" if empty else ""


def _has_pairs(population: Population, cell: str) -> bool:
    found = population.modes[RAW].cells.get(cell)
    return cell == ALL or (found is not None and found.n_genuine > 0 and found.n_impostor > 0)
