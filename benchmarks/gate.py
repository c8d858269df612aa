"""How often the gate errs: equal models rejected, harm promoted, and drift over twenty runs. Before and after its rule.

    python -m benchmarks.gate                                          # the tables, about 5 minutes on one core
    python -m benchmarks.gate --measure SHARDS MODEL MODEL …           # the spreads it rests on, from real retrainings

A model of subjects, not of pairs. In metric m, subject s has under model k the error rate

    f_m · h_k · g_s · d_sk,

g_s the difficulty of the subject, the same for all models, d_sk what retraining changes for it; both lognormal of mean
1. h_k is the true harm: 1 for an equal model. The spreads are set so that the standard errors over subjects, of a rate
and of the difference of two retrainings, are those measured on real embeddings. Intervals are those of means over
subjects. Decisions are those of `tasks.gate` itself; "before" is the rule it replaced: rejected where the 95% interval
of the difference to the served release is wholly above the tolerance (0 for frontal–profile, 0.2 points for
frontal–frontal).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from metrics.allpairs import all_pairs
from metrics.bootstrap import bootstrap, paired_bootstrap
from metrics.variance import Influence
from models.checkpoint import load
from models.inference import Reweighter
from schemas.metrics import EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, HELD_OUT, POSE_CLASSES, RAW, MetricId
from schemas.releases import ModelRef, Release
from schemas.reports import CellResult, Estimate, Evaluation, GateDecision, ModeResult, Population
from schemas.settings import ColumnNames, GateSettings
from tasks.gate import decide
from tasks.training.rows import read_training_rows

SUBJECTS = (35, 100, 350)
HARMS = (0.05, 0.10, 0.20)
RUNS, STEP = 20, 0.02  # of the drift: every candidate is truly worse than what is served by this much
MODE = "per_sample"
FNMR = MetricId("fnmr_global@1e-2")


@dataclass(frozen=True)
class Metric:
    """A guarded metric: its rate, and spreads over subjects, all relative to the rate.

    `difficulty` is the standard deviation of g, `retraining` that of the difference of two models, `to_raw` that of the
    difference to raw, whose rate is `raw` times as large. Divided by √n they are standard errors on n subjects.
    """

    cell: str
    metric: MetricId
    rate: float
    difficulty: float
    retraining: float
    to_raw: float
    raw: float


# Rates and spreads by `--measure` on the 33 CFP subjects (fr512) that three seeds of the default training hold out, but
# for raw's frontal–frontal FNMR, 0.85 ± 0.11 of the model's there: here the models do frontal pairs no harm.
METRICS = (
    Metric(FRONTAL_PROFILE, EER, 0.097, 0.75, 0.122, 0.39, 1.18),
    Metric(FRONTAL_FRONTAL, FNMR, 0.020, 2.63, 0.341, 0.65, 1.0),
)


def lognormal(rng: np.random.Generator, spread: float, size: int) -> np.ndarray:
    """Draw from the lognormal distribution of mean 1 and this standard deviation."""
    sigma = np.sqrt(np.log1p(spread**2))
    return rng.lognormal(-(sigma**2) / 2, sigma, size)


@dataclass
class World:
    """One set of subjects, and every model on it: error rates by metric and subject."""

    rng: np.random.Generator
    subjects: int
    difficulty: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.difficulty = [lognormal(self.rng, one.difficulty, self.subjects) for one in METRICS]

    def model(self, harms: tuple[float, ...] = (1.0, 1.0), *, raw: bool = False) -> list[np.ndarray]:
        """Return the error rates of a new model by metric and subject."""
        rates = []
        for metric, difficulty, harm in zip(METRICS, self.difficulty, harms, strict=True):
            # Var(g (d - d')) = E g² · 2 Var d; to raw, Var d is that of this model and the rest of raw's.
            square = 1 + metric.difficulty**2
            own = metric.retraining**2 / 2 / square
            spread = max(metric.to_raw**2 / square - own, own) if raw else own
            rate = metric.rate * (metric.raw if raw else harm)
            rates.append(rate * difficulty * lognormal(self.rng, np.sqrt(spread), self.subjects))
        return rates


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean over subjects with its 95% interval, as `metrics.variance` has it."""
    return _influence(values).interval(float(values.mean()), 0.95)


def relative(values: np.ndarray, base: np.ndarray) -> Estimate:
    """Return the relative difference of two means over subjects with its 95% interval, that of the log of the ratio."""
    mean, base_mean = float(values.mean()), float(base.mean())
    on_log = _influence(values).divided_by(mean).minus(_influence(base).divided_by(base_mean))
    return on_log.interval_of_ratio(mean / base_mean - 1, 0.95)


def _influence(values: np.ndarray) -> Influence:
    return Influence((values - values.mean()) / (len(values) - 1), (), 1.0)


def percentile_low(values: np.ndarray) -> float:
    """Return the lower end of the interval that the former rule had."""
    return float(values.mean() - 1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def evaluation(world: World, candidate: list[np.ndarray], **references: list[np.ndarray]) -> Evaluation:
    """Return the evaluation of a candidate, with its paired differences to `raw`, `served` and `anchor`."""
    cells = {one.cell: _cell(one, estimate(rates)) for one, rates in zip(METRICS, candidate, strict=True)}
    differences = {
        name: {
            one.cell: {one.metric: estimate(rates - other)}
            for one, rates, other in zip(METRICS, candidate, reference, strict=True)
        }
        for name, reference in references.items()
    }
    mode = ModeResult.model_construct(
        mode=MODE,
        model_digest="candidate",
        training_subjects_known=True,
        cells=cells,
        difference=differences.get("raw", {}),
        versus_served=differences.get("served", {}),
        versus_anchor=differences.get("anchor", {}),
        relative_to_anchor={
            one.cell: {one.metric: relative(rates, other)}
            for one, rates, other in zip(METRICS, candidate, references["anchor"], strict=True)
        },
    )
    raw = ModeResult.model_construct(mode=RAW, model_digest=None, training_subjects_known=True, cells=cells)
    population = Population.model_construct(name=HELD_OUT, n_subjects=world.subjects, modes={RAW: raw, MODE: mode})
    return Evaluation.model_construct(populations={HELD_OUT: population}, served_unread=None, anchor_unread=None)


def _cell(metric: Metric, value: Estimate) -> CellResult:
    plenty = 10**6  # impostor pairs: every rate rests on enough false matches
    return CellResult.model_construct(
        n_genuine=plenty, n_impostor=plenty, eer=value, fnmr={}, fnmr_global={FNMR.fmr_text: value}
    )


def release(name: str) -> Release:
    """Return a release with a model of its own, whose guarded metrics were measured."""
    model = ModelRef(path="", file_digest="", digest=name, statistic="frozen", dim=1)
    gate = GateDecision(promoted=True, reason="")
    return Release.model_construct(
        release=name, models={MODE: model}, gated={MODE: Estimate(value=METRICS[0].rate)}, gate=gate
    )


Rule = Callable[[World, list[np.ndarray], list[np.ndarray], list[np.ndarray], list[np.ndarray]], str]


def before(
    world: World,
    candidate: list[np.ndarray],
    served: list[np.ndarray],
    anchor: list[np.ndarray],
    raw: list[np.ndarray],
) -> str:
    """The former rule."""
    lows = [percentile_low(new - old) for new, old in zip(candidate, served, strict=True)]
    worse = any(low > tolerance for low, tolerance in zip(lows, (0.0, 0.002), strict=True))
    return "rejected" if worse else "promoted"


def after(
    world: World,
    candidate: list[np.ndarray],
    served: list[np.ndarray],
    anchor: list[np.ndarray],
    raw: list[np.ndarray],
) -> str:
    """The rule of `tasks.gate`."""
    found = evaluation(world, candidate, raw=raw, served=served, anchor=anchor)
    decision = decide(found, GateSettings(), release("served"), release("served" if anchor is served else "anchor"))
    if decision.promoted:
        return "promoted"
    return "undecided" if decision.reason.startswith("cannot decide") else "rejected"


RULES: dict[str, Rule] = {"before": before, "after": after}


def outcomes(subjects: int, harms: tuple[float, float], repeats: int, seed: int) -> dict[str, dict[str, float]]:
    """Return, by rule, the shares of outcomes for a candidate of this true harm; served is the anchor."""
    rng = np.random.default_rng(seed)
    counts = {name: {"promoted": 0, "rejected": 0, "undecided": 0} for name in RULES}
    for _ in range(repeats):
        world = World(rng, subjects)
        served, raw, candidate = world.model(), world.model(raw=True), world.model(harms)
        for name, rule in RULES.items():
            counts[name][rule(world, candidate, served, served, raw)] += 1
    return {name: {what: count / repeats for what, count in found.items()} for name, found in counts.items()}


def drift(subjects: int, step: float, repeats: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return, by rule, mean and 95th percentile of the true relative change of what is served after `RUNS` runs.

    Each candidate is truly worse by `step` than the release that is served then, in both metrics.
    """
    rng = np.random.default_rng(seed)
    ends: dict[str, list[float]] = {name: [] for name in RULES}
    for _ in range(repeats):
        world = World(rng, subjects)
        raw, first = world.model(raw=True), world.model()
        for name, rule in RULES.items():
            served, harm = first, 1.0
            for _ in range(RUNS):
                worse = harm * (1 + step)
                candidate = world.model((worse, worse))
                if rule(world, candidate, served, first, raw) == "promoted":
                    served, harm = candidate, worse
            ends[name].append(harm - 1)
    return {name: (float(np.mean(found)), float(np.quantile(found, 0.95))) for name, found in ends.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--chains", type=int, default=200)
    parser.add_argument("--measure", nargs="+", metavar="SHARDS MODEL", help="shards, then two or more checkpoints")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], arguments.measure[1:])
        return
    print("| subjects | true harm in | | promoted, before | promoted, after | rejected, after | cannot decide, after |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for subjects in SUBJECTS:
        cases = [("neither", 0.0, (1.0, 1.0))]
        cases += [("frontal–profile EER", harm, (1 + harm, 1.0)) for harm in HARMS]
        cases += [("frontal–frontal FNMR", harm, (1.0, 1 + harm)) for harm in HARMS]
        for number, (what, harm, harms) in enumerate(cases):
            found = outcomes(subjects, harms, arguments.repeats, seed=100 * subjects + number)
            shares = [
                found["before"]["promoted"],
                *(found["after"][one] for one in ("promoted", "rejected", "undecided")),
            ]
            print(
                f"| {subjects} | {what} | {harm:+.0%} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True
            )
    print(f"\n| subjects | true change after {RUNS} runs of {STEP:+.0%}, before: mean (95th percentile) | after |")
    print("|---:|---:|---:|")
    for subjects in SUBJECTS:
        ends = drift(subjects, STEP, arguments.chains, seed=subjects)
        shown = [f"{mean:+.1%} ({high:+.1%})" for mean, high in (ends["before"], ends["after"])]
        print(f"| {subjects} | {' | '.join(shown)} |", flush=True)


def measure(source: str, checkpoints: list[str]) -> None:
    """Print rates and spreads over the subjects that none of the checkpoints was trained on, as `METRICS` has them."""
    models = [load(path) for path in checkpoints]
    rows = read_training_rows([source], ColumnNames())
    held_out = rows.take(~np.any([model.has_seen(rows.subjects) for model in models], axis=0))
    _, codes = np.unique(held_out.subjects, return_inverse=True)
    features = [held_out.x, *(Reweighter(model, device="cpu")(held_out.x)["front"] for model in models)]
    pairs = [
        all_pairs(x, codes, classes=held_out.classes, class_names=POSE_CLASSES, fmr_points=(1e-2,)) for x in features
    ]
    subjects = int(codes.max()) + 1
    print(f"{subjects} held-out subjects; spreads are standard errors times √{subjects}, relative to the rate")
    for one in METRICS:
        single = [bootstrap(found)[one.cell][one.metric] for found in pairs]
        rates = [found.value or 0.0 for found in single]
        rate = float(np.mean(rates[1:]))

        def spread(found: Estimate, rate: float = rate) -> float:
            assert found.low is not None
            assert found.high is not None
            return (found.high - found.low) / 3.92 / rate * float(np.sqrt(subjects))

        retraining = [
            spread(paired_bootstrap(first, second)[one.cell][one.metric])
            for at, first in enumerate(pairs[1:], 1)
            for second in pairs[at + 1 :]
        ]
        to_raw = [spread(paired_bootstrap(pairs[0], other)[one.cell][one.metric]) for other in pairs[1:]]
        print(
            f"{one.cell} {one.metric}: rate {rate:.4f}, difficulty {np.mean([spread(s) for s in single[1:]]):.2f}, "
            f"retraining {np.mean(retraining):.3f}, to raw {np.mean(to_raw):.2f}, raw {rates[0] / rate:.2f}"
        )


if __name__ == "__main__":
    main()
