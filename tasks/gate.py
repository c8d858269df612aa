"""Gate: whether a release is served. Pure decisions over the figures of an evaluation.

A release is promoted unless some mode's gated metric is worse than the reference beyond the tolerance, with confidence:
the 95% interval of the paired difference lies wholly above the tolerance. The reference is the same mode of the release
served until now, or raw where there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.reports import ALL, RAW, Estimate, Evaluation, GateDecision, GatedMetric, ModeResult
from schemas.settings import GateSettings
from tasks.evaluate import HELD_OUT
from tasks.wording import cell_name, metric_name, points

Differences = Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True)
class Gated:
    """What is gated, and its value per mode, raw included; no figures where nothing could be measured."""

    metric: GatedMetric
    figures: dict[str, Estimate]

    @property
    def name(self) -> str:
        """The metric in words, such as 'frontal–profile EER'."""
        return f"{cell_name(self.metric.cell)} {metric_name(self.metric.metric)}"


def gated(evaluation: Evaluation, settings: GateSettings) -> Gated:
    """Return the gated metric over the subjects that no model has seen.

    The cell is that of the settings where it has genuine and impostor pairs, else all pairs.
    """
    population = evaluation.populations.get(HELD_OUT)
    if population is None:
        return Gated(GatedMetric(population=HELD_OUT, cell=settings.cell, metric=settings.metric), {})
    wanted = population.modes[RAW].cells.get(settings.cell)
    cell = settings.cell if wanted is not None and wanted.n_genuine and wanted.n_impostor else ALL
    figures = {mode: _figure(result, cell, settings.metric) for mode, result in population.modes.items()}
    return Gated(GatedMetric(population=HELD_OUT, cell=cell, metric=settings.metric), figures)


def decide(evaluation: Evaluation, settings: GateSettings, served: str | None) -> GateDecision:
    """Decide on promotion, in one sentence with the number and the interval.

    Args:
        evaluation: the figures.
        settings: cell, metric and tolerance.
        served: name of the release served until now, or None for the first.
    """
    measured = gated(evaluation, settings)
    population = evaluation.populations.get(HELD_OUT)
    if population is None:
        return GateDecision(
            promoted=True, reason="promoted without a measurement: no labelled subjects that the models have not seen"
        )
    sentences = []
    for mode, result in population.modes.items():
        if mode == RAW:
            continue
        reference, difference = _difference(result, measured.metric.cell, settings.metric, served)
        now = measured.figures[mode]
        if difference.value is None or now.value is None:
            sentences.append(f"{mode}: {measured.name} is not estimable")
            continue
        sentence = f"{mode}: {measured.name} {now.value:.2%}, {points(difference.value)} points to {reference}"
        if difference.low is not None and difference.high is not None:
            sentence += f" (95% interval {points(difference.low)} to {points(difference.high)})"
        surely = difference.value if difference.low is None else difference.low
        if surely > settings.tolerance:
            return GateDecision(
                promoted=False,
                reason=f"kept back: {sentence}, worse than the tolerance of {100 * settings.tolerance:g} points",
                compared_with=reference,
            )
        sentences.append(sentence)
    return GateDecision(promoted=True, reason="promoted: " + "; ".join(sentences), compared_with=served or RAW)


def _figure(result: ModeResult, cell: str, metric: str) -> Estimate:
    return result.cells[cell].eer if metric == "eer" else result.cells[cell].fnmr[metric.removeprefix("fnmr@")]


def _difference(result: ModeResult, cell: str, metric: str, served: str | None) -> tuple[str, Estimate]:
    """Return the reference and the paired difference to it: the served release where it can be compared, else raw."""
    before = result.versus_served.get(cell, {}).get(metric)
    if served is not None and before is not None and before.value is not None:
        return served, before
    return RAW, result.difference.get(cell, {}).get(metric, Estimate(value=None, reason="not estimable"))
