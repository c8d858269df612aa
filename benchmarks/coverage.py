"""How often 95% intervals hold the truth: of one mode, its difference to raw, and the difference of two retrainings.

    python -m benchmarks.coverage [--subjects 35 60 100 350] [--experiments 200]

Each experiment draws new subjects: a mean vector each, and rows around it with noise that differs by channel and by
subject. A model weighs the channels down that are noisy; a retraining differs from it by a small random matrix. The
truth is that of 10,000 other subjects. Balanced: 6 rows a subject. Not balanced: 3 to 60 rows; the effective number of
subjects says what they are worth.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from metrics.allpairs import AllPairs, all_pairs
from metrics.bootstrap import bootstrap, paired_bootstrap
from metrics.variance import effective_subjects
from schemas.metrics import ALL, EER, MetricId
from schemas.reports import Estimate

DIMENSION = 24
FMRS = (1e-2, 1e-3)
METRICS = (EER, *(MetricId.at("fnmr", fmr) for fmr in FMRS))
WHAT = ("one mode", "model − raw", "retraining")
RESAMPLES = 300

_random = np.random.default_rng(7)
_NOISE = np.exp(_random.normal(0, 0.6, DIMENSION))
_RAW = np.eye(DIMENSION)
_MODEL = np.diag(1 / np.sqrt(1 + _NOISE**2)) + 0.05 * _random.normal(size=(DIMENSION, DIMENSION))
_RETRAINED = _MODEL + 0.04 * _random.normal(size=(DIMENSION, DIMENSION))


@dataclass(frozen=True)
class Coverage:
    """Of how many intervals, which share held the truth, and their mean width."""

    intervals: int
    covered: float
    width: float


def compare(rng: np.random.Generator, subjects: int, balanced: bool) -> list[AllPairs]:
    """Return all pairs of new subjects by raw, the model and its retraining."""
    rows = np.full(subjects, 6)
    if not balanced:
        rows = np.clip(3 / np.sqrt(rng.uniform(size=subjects)), 3, 60).astype(np.int64)
    owner = np.repeat(np.arange(subjects), rows)
    spread = 0.75 * np.exp(0.25 * rng.normal(size=subjects))
    noise = _NOISE * spread[owner][:, None] * rng.normal(size=(len(owner), DIMENSION))
    features = rng.normal(size=(subjects, DIMENSION))[owner] + noise
    return [all_pairs(features @ model, owner, fmr_points=FMRS) for model in (_RAW, _MODEL, _RETRAINED)]


def rates(result: AllPairs) -> dict[MetricId, Estimate]:
    """Return the metrics of all pairs, without intervals."""
    found = result.overall.estimates()
    return {metric: found[metric] for metric in METRICS}


def truth(populations: int = 5, subjects: int = 2000) -> dict[str, dict[MetricId, float]]:
    """Return the metrics of the model and the two differences, as the mean over large populations."""
    rng = np.random.default_rng(1)
    values = np.mean(
        [
            [[rates(result)[metric].value or 0.0 for metric in METRICS] for result in compare(rng, subjects, True)]
            for _ in range(populations)
        ],
        axis=0,
    )
    raw, model, retrained = values
    rows = (model, model - raw, retrained - model)
    return {what: dict(zip(METRICS, row.tolist(), strict=True)) for what, row in zip(WHAT, rows, strict=True)}


def coverage(
    known: dict[str, dict[MetricId, float]], subjects: int, balanced: bool, experiments: int, seed: int = 0
) -> tuple[dict[tuple[str, MetricId], Coverage], float]:
    """Return coverage by what is estimated and metric, and the mean effective number of subjects."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, MetricId], list[tuple[bool, float]]] = {}
    effective = []
    for number in range(experiments):
        raw, model, retrained = compare(rng, subjects, balanced)
        effective.append(effective_subjects(model.overall.counts.genuine.sum(axis=1)))
        intervals = (
            bootstrap(model, resamples=RESAMPLES, seed=number),
            paired_bootstrap(raw, model, resamples=RESAMPLES, seed=number),
            paired_bootstrap(model, retrained, resamples=RESAMPLES, seed=number),
        )
        for what, of_cells in zip(WHAT, intervals, strict=True):
            for metric in METRICS:
                one = of_cells[ALL][metric]
                if one.low is not None and one.high is not None:
                    held = one.low <= known[what][metric] <= one.high
                    found.setdefault((what, metric), []).append((held, one.high - one.low))
    return {
        key: Coverage(len(seen), float(np.mean([held for held, _ in seen])), float(np.mean([one for _, one in seen])))
        for key, seen in found.items()
    }, float(np.mean(effective))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subjects", type=int, nargs="+", default=[35, 60, 100, 350])
    parser.add_argument("--experiments", type=int, default=200)
    arguments = parser.parse_args()
    known = truth()
    print("| subjects | effective | interval of | EER | FNMR@1e-2 | FNMR@1e-3 |\n|---:|---:|---|---:|---:|---:|")
    for balanced in (True, False):
        for subjects in arguments.subjects:
            found, effective = coverage(known, subjects, balanced, arguments.experiments, seed=subjects)
            for what in WHAT:
                cells = [found.get((what, metric)) for metric in METRICS]
                shown = " | ".join("" if one is None else f"{one.covered:.1%}" for one in cells)
                print(f"| {subjects} | {effective:.0f} | {what} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
