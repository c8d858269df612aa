"""Compare every guarded metric of every mode with the references of the gate. Pure: records in, records out.

| against | a metric is worse where |
|---|---|
| served | it is significantly above the same mode of the served release, beyond its tolerance |
| anchor | so above the model of the anchor, or not shown to be less than `margin` above it (one-sided 95% bound) |
| raw | so above the raw embeddings |

Significance is at 95%, by Holm's procedure over all modes, metrics and references. A model that is served already was
judged when it was new: its metrics are compared with those that are served, in case the embeddings have changed, and
with nothing else. What follows is left to `tasks.gate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metrics.significance import LEVEL, holm, p_worse, subjects_needed, upper_bound
from reports.text import cell_name, metric_name
from schemas.metrics import RAW, MetricId
from schemas.models import uses_batch
from schemas.releases import Release
from schemas.reports import (
    FEWEST_FALSE_MATCHES,
    Against,
    Estimate,
    Evaluation,
    GuardedResult,
    GuardOutcome,
    ModeResult,
    Population,
)
from schemas.settings import GateSettings, Guard

LEAKAGE = "leakage cannot be excluded, since its training subjects are unknown"
SAME_MODEL = Estimate(value=0.0, reason="the same model")


def judge(
    evaluation: Evaluation,
    population: Population,
    guards: Sequence[Guard],
    settings: GateSettings,
    served: Release | None,
    anchor: Release | None,
) -> list[GuardedResult]:
    """Return every comparison of every mode, in the order served, anchor, raw."""
    found = []
    for mode, result in population.modes.items():
        if mode != RAW:
            one = _Mode(result, population, evaluation, settings, served, anchor)
            found += [comparison for guard in guards for comparison in one.comparisons(guard)]
    return _significant(found)


def must_compare(mode: str, cell: str, metric: MetricId, settings: GateSettings, reference: Release | None) -> bool:
    """Return whether a comparison with a release cannot be left out: this metric of this mode was measured there."""
    if reference is None or settings.unmeasured == "promote" or mode not in reference.models:
        return False
    known = [one for one in reference.gate.judged if (one.mode, one.cell, one.metric) == (mode, cell, metric)]
    return any(one.value is not None for one in known) if known else was_measured(reference, mode)


def was_measured(release: Release, mode: str | None = None) -> bool:
    """Return whether the gated metric of a mode was measured for a release, or that of any of its modes."""
    values = [release.gated.get(one) for one in ([mode] if mode else release.models)]
    return any(value is not None and value.value is not None for value in values)


def name_of(cell: str, metric: MetricId) -> str:
    """Name a guarded metric for people."""
    return f"{cell_name(cell)} {metric_name(metric)}"


@dataclass(frozen=True)
class _Mode:
    """The comparisons of one mode."""

    result: ModeResult
    population: Population
    evaluation: Evaluation
    settings: GateSettings
    served: Release | None
    anchor: Release | None

    def comparisons(self, guard: Guard) -> list[GuardedResult]:
        mode, cell, metric = self.result.mode, guard.cell, guard.metric
        to_served = self.result.difference_to_served(cell, metric)
        found = []
        if self.served is not None and mode in self.served.models:
            if self._has_model_of(self.served):
                known = _known(to_served)
                return [
                    self._compared(guard, "served", self.served.release, to_served)
                    if known
                    else self._result(guard, "served", self.served.release, SAME_MODEL, outcome="same model")
                ]
            if _known(to_served) or must_compare(mode, cell, metric, self.settings, self.served):
                found.append(self._compared(guard, "served", self.served.release, to_served))
        if self.anchor is not None and mode in self.anchor.models:
            found += self._against_anchor(guard, self.anchor, to_served)
        has_anchor = any(one.against == "anchor" for one in found)
        to_raw = self.result.difference_to_raw(cell, metric)
        found.append(self._compared(guard, "raw", RAW, to_raw, power=not has_anchor))
        return found

    def _against_anchor(self, guard: Guard, anchor: Release, to_served: Estimate | None) -> list[GuardedResult]:
        mode, cell, metric = self.result.mode, guard.cell, guard.metric
        if self._has_model_of(anchor):
            return [self._result(guard, "anchor", anchor.release, SAME_MODEL, outcome="same model")]
        reference, difference = anchor.release, self.result.difference_to_anchor(cell, metric)
        if self.served is not None and uses_batch(mode, anchor.models[mode].statistic):
            reference, difference = self.served.release, to_served  # the statistic of a batch needs all of its rows
        if not _known(difference) and not must_compare(mode, cell, metric, self.settings, anchor):
            return []
        return [self._compared(guard, "anchor", reference, difference)]

    def _compared(
        self, guard: Guard, against: Against, reference: str, difference: Estimate | None, *, power: bool = False
    ) -> GuardedResult:
        value = self._value(guard)
        if value is None or value.value is None or difference is None or difference.value is None:
            return self._result(guard, against, None, Estimate(value=None, reason=self._missing(guard, against)))
        few = self._few_false_matches(guard)
        if few is not None and _may_differ(difference):
            return self._result(guard, against, reference, difference, outcome="undecided", needed=few)
        if against != "anchor" and not power:
            return self._result(guard, against, reference, difference, outcome="not worse")
        base = max(value.value - difference.value, 0.0)
        excess = difference
        if against == "anchor" and (found := self.result.relative_difference_to_anchor(guard.cell, guard.metric)):
            excess = _scaled(found, base)  # its interval knows that the metric of the anchor is an estimate, too
        limit = max(self.settings.margin * base, guard.tolerance)
        bound, subjects = upper_bound(excess), self.population.n_subjects
        needed = subjects_needed(subjects, excess, limit)
        outcome: GuardOutcome = "not worse"
        if bound > limit and against == "anchor":
            enough = needed is not None and needed <= subjects
            outcome = "worse" if enough or p_worse(excess, limit) < LEVEL else "undecided"
        return self._result(
            guard,
            against,
            reference,
            difference,
            outcome=outcome,
            bound=bound / base if base else None,
            needed=needed if bound > limit else None,
        )

    def _few_false_matches(self, guard: Guard) -> int | None:
        """Return None, or on how many subjects there would be enough: impostor pairs grow with their square."""
        found = self.result.false_matches(guard.cell, guard.metric)
        if found is None or found >= FEWEST_FALSE_MATCHES:
            return None
        return math.ceil(self.population.n_subjects * math.sqrt(FEWEST_FALSE_MATCHES / max(found, 1)))

    def _missing(self, guard: Guard, against: Against) -> str:
        value, name = self._value(guard), name_of(guard.cell, guard.metric)
        if value is None:
            return LEAKAGE
        if value.value is None or against == "raw":
            return f"{name} is not estimable"
        unread = self.evaluation.served_unread if against == "served" else self.evaluation.anchor_unread
        return unread or f"{name}: the two releases have too few held-out subjects in common"

    def _value(self, guard: Guard) -> Estimate | None:
        known = self.result.training_subjects_known
        return self.result.cells[guard.cell].estimate(guard.metric) if known else None

    def _has_model_of(self, release: Release) -> bool:
        return release.models[self.result.mode].digest == self.result.model_digest

    def _result(
        self,
        guard: Guard,
        against: Against,
        reference: str | None,
        difference: Estimate,
        *,
        outcome: GuardOutcome = "not compared",
        bound: float | None = None,
        needed: int | None = None,
    ) -> GuardedResult:
        value = self._value(guard)
        return GuardedResult(
            mode=self.result.mode,
            cell=guard.cell,
            metric=guard.metric,
            tolerance=guard.tolerance,
            value=value.value if value else None,
            against=against,
            reference=reference,
            difference=difference,
            outcome=outcome,
            relative_bound=bound,
            subjects_needed=needed,
        )


def _known(difference: Estimate | None) -> bool:
    return difference is not None and difference.value is not None


def _scaled(relative: Estimate, base: float) -> Estimate:
    value, low, high = (None if one is None else base * one for one in (relative.value, relative.low, relative.high))
    return Estimate(value=value, low=low, high=high)


def _may_differ(difference: Estimate) -> bool:
    return any(end for end in (difference.low, difference.value, difference.high))


def _is_open(one: GuardedResult) -> bool:
    """Return whether a comparison may still turn out significant: it rests on enough false matches."""
    return one.outcome == "not worse" or (one.outcome == "undecided" and one.relative_bound is not None)


def _significant(found: Sequence[GuardedResult]) -> list[GuardedResult]:
    """Return the comparisons with those marked that are significantly worse than their reference.

    One family, so that an equal model is found worse in at most 2.5% of all runs. An anchor that is served is tested as
    the served release.
    """
    judged = list(found)
    served = {one.reference for one in judged if one.against == "served"}
    at = [
        number
        for number, one in enumerate(judged)
        if _is_open(one) and not (one.against == "anchor" and one.reference in served)
    ]
    worse = holm([p_worse(judged[number].difference, judged[number].tolerance) for number in at])
    for number, is_worse in zip(at, worse, strict=True):
        if is_worse:
            judged[number] = judged[number].replaced(outcome="worse")
    return judged
