"""What training is worth, cross-validated on real embeddings: our networks beside classical transforms and ablations.

    python -m benchmarks.training_ablation run --net fr512 --mode per_sample --methods 'default|single' [--folds 0,1]
    python -m benchmarks.training_ablation report --net fr512 --to docs/…

Seven official CFP folds share no subject. Each is tested once, by a model that was trained on five others (pictures,
mirrored pictures, and LFW subjects of five sevenths) and chosen on the seventh. A method knows nothing of the fold that
tests it. `run` leaves the features of the test folds in `--work`, one file a method and fold, and does not compute them
twice; the method "default" leaves those of its `READINGS` besides. `report` takes the mean of the folds' rates, and
compares every method with raw by the paired bootstrap over subjects within folds. Research data, read from
`../shared/data`; nothing of it is written but features in `--work`.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.classical import CLASSICAL, Fold, Transform
from metrics.allpairs import AllPairs, all_pairs
from metrics.bootstrap import draw, draw_subjects
from metrics.poses import PROFILE
from models.architectures import build
from models.dual_branch import DualBranchEnsemble, scale_change
from models.split import subject_key
from models.training import Candidate, LabelledTensor, Recipe, fit
from schemas.metrics import EER, POSE_CLASSES, MetricId
from schemas.models import Mode
from schemas.settings import ColumnNames
from tasks.training.rows import TrainingRows, read_training_rows
from tasks.training.selection import ValidationScorer, front
from tasks.training.train import WHITENING

FOLDS = 7
RESAMPLES = 2000
POINTS = (1e-2, 1e-3)
RAW = "raw per_sample"
CHOOSING = Recipe(validate_every=120, shares=(1.0, 0.8, 0.6))

CELLS = {"FP": "frontal-profile", "FF": "frontal-frontal", "PP": "profile-profile", "LFW": "LFW"}
Key = tuple[str, MetricId]  # a cell and a metric in it
Row = dict[str, list[float | None]]
COLUMNS: Mapping[str, Key] = {
    **{f"{short} EER": (cell, EER) for short, cell in CELLS.items()},
    **{
        f"{short} FNMR@{point:g}{where}": (CELLS[short], MetricId.at(kind, point))
        for short in ("FP", "FF")
        for kind, where in (("fnmr", ""), ("fnmr_global", " global"))
        for point in POINTS
    },
}
DIRECT = (
    ("default per_sample", "default batch_stat"),
    *(
        (f"default {mode}", f"{other} {mode}")
        for mode in ("per_sample", "batch_stat")
        for other in ("ensemble", "WCCN")
    ),
    *(
        (f"ensemble, {share} {mode}", f"ensemble {mode}")
        for mode in ("per_sample", "batch_stat")
        for share in (0.9, 0.8)
    ),
    ("ensemble per_sample", "ensemble batch_stat"),
    ("ensemble per_sample", "ensemble, chosen per_sample"),
    ("ensemble, chosen per_sample", "single, chosen per_sample"),
)


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    With `choose`, validation chooses among raw, three steps and three lengths of the change; without, it is the last
    step whatever validation says.
    """

    architecture: str
    loss: str = "global_threshold"
    arguments: Mapping[str, float] = ()  # type: ignore[assignment]
    choose: bool = False


@dataclass(frozen=True)
class Reading:
    """One training kept in another form: the change scaled by `share`, the whitened row mixed in with `strength`.

    With `or_raw` raw takes its place where it scores better on validation, as `frontalis train` does.
    """

    share: float
    strength: float
    or_raw: bool = False


NETWORKS: Mapping[str, Network] = {
    "default": Network("dual_branch_ensemble", arguments={"whitening": WHITENING}),
    "ensemble, chosen": Network("dual_branch_ensemble", choose=True),
    "single, chosen": Network("dual_branch_ensemble", arguments={"members": 1}, choose=True),
    "dual_branch, chosen": Network("dual_branch", choose=True),
    "dual_branch, triplet, chosen": Network("dual_branch", loss="triplet", choose=True),
    "dual_branch, triplet": Network("dual_branch", loss="triplet"),
    "dual_branch, supcon, chosen": Network("dual_branch", loss="supcon", choose=True),
    "dual_branch, supcon": Network("dual_branch", loss="supcon"),
    "se, chosen": Network("se", choose=True),
    "se": Network("se"),
}
LONGER = Recipe.lengthening
READINGS: Mapping[str, Reading] = {
    "default": Reading(LONGER, WHITENING, or_raw=True),
    "ensemble": Reading(1.0, 0.0),
    "ensemble, 0.9": Reading(0.9, 0.0),
    "ensemble, 0.8": Reading(0.8, 0.0),
    **{
        f"length {share:g}, whitening {strength:g}": Reading(share, strength)
        for share in (1.0, LONGER, 1.5)
        for strength in (0.25, WHITENING, 1.0)
        if (share, strength) != (LONGER, WHITENING)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--net", choices=("fr512", "mfn192"), default="fr512")
    parser.add_argument("--mode", choices=("per_sample", "batch_stat"), default="per_sample")
    parser.add_argument("--methods", default="default", help="names, separated by |, or 'classical'")
    parser.add_argument("--folds", default=",".join(map(str, range(FOLDS))))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/training_ablation"))
    parser.add_argument("--to", type=Path, default=None, help="report: folder for training_<net>.json and .md")
    options = parser.parse_args()
    if options.what == "run":
        names = ["raw", *CLASSICAL] if options.methods == "classical" else options.methods.split("|")
        for name in names:
            run(name, options.net, options.mode, [int(fold) for fold in options.folds.split(",")], options)
    else:
        report(options.net, options.work, options.data, options.to or options.work)


def run(name: str, net: str, mode: Mode, folds: list[int], options: argparse.Namespace) -> None:
    for test in folds:
        path = features_file(options.work, net, name, mode, test)
        if path.exists():
            continue
        fold = read_fold(options.data, net, test)
        start = time.perf_counter()
        for kept, (apply, remark) in transforms(name, mode, fold).items():
            keep(features_file(options.work, net, kept, mode, test), fold, apply)
            print(f"{net} {mode} {kept} fold {test}: {time.perf_counter() - start:.0f} s {remark}", flush=True)


def transforms(name: str, mode: Mode, fold: Fold) -> dict[str, tuple[Transform, str]]:
    """Return what a method gives on a fold, by the name it is kept under, and a remark on it."""
    if name == "raw":
        return {name: (lambda x: x, "")}
    if name in CLASSICAL:
        return {name: (CLASSICAL[name](fold), "")}
    model, scale, scorer, best = train(NETWORKS[name], mode, fold)
    if name != "default":
        return {name: (applying(model, scale), str(best))}
    found = {}
    for kept, reading in READINGS.items():
        form = copy.deepcopy(model)
        scale_change(form, reading.share)
        assert isinstance(form, DualBranchEnsemble)
        assert form.whitening is not None
        form.whitening.strength = reading.strength
        score = scorer(form)
        raw = reading.or_raw and score >= 0
        found[kept] = ((lambda x: x) if raw else applying(form, scale), f"{score:+.4f}{', raw is better' * raw}")
    return found


def applying(model: torch.nn.Module, scale: float) -> Transform:
    return lambda x: front(model, torch.from_numpy(x) * scale)


def keep(path: Path, fold: Fold, apply: Transform) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, cfp=apply(fold.test.x).astype(np.float32), lfw=apply(fold.lfw_test.x).astype(np.float32))
    unfinished.replace(path)


def train(network: Network, mode: Mode, fold: Fold) -> tuple[torch.nn.Module, float, ValidationScorer, Candidate]:
    """Return a network whose change is as long as it learnt, the scale of its input, its scorer, and the choice."""
    torch.set_num_threads(1)
    learn = fold.train
    dim = learn.x.shape[1]
    mean_norm = float(np.linalg.norm(learn.x.astype(np.float64), axis=1).mean())
    size = {"channels": dim} if network.architecture == "se" else {"feature_dim": dim}
    torch.manual_seed(0)
    model = build(network.architecture, {**size, **dict(network.arguments), "use_batch_stat": mode == "batch_stat"})
    scaled = torch.from_numpy(learn.x) * (dim**0.5 / mean_norm)
    _, codes = np.unique(learn.subjects, return_inverse=True)
    rows = LabelledTensor(scaled, torch.from_numpy(codes), torch.from_numpy(learn.classes == PROFILE))
    scorer = ValidationScorer(fold.validation, mean_norm)
    calls = iter(range(10**6))
    last_wins: Callable[[torch.nn.Module], float] = lambda _model: -float(next(calls))  # noqa: E731
    recipe = CHOOSING if network.choose else Recipe(lengthening=1.0, validate_every=10**6)
    fitted = fit(
        model, rows, scorer if network.choose else last_wins, steps=360, seed=0, loss=network.loss, recipe=recipe
    )
    return fitted.model, dim**0.5 / mean_norm, scorer, fitted.best


def read_fold(data: Path, net: str, test: int) -> Fold:
    choose = (test + 1) % FOLDS
    learn = [fold for fold in range(FOLDS) if fold not in (test, choose)]
    lfw, part = read_lfw(data, net)
    views = [read_cfp(data, net, folder, fold) for fold in learn for folder in ("cfp-dev", "cfp-dev-mirrored")]
    return Fold(
        train=joined([*views, lfw.take(np.isin(part, learn))]),
        validation=read_cfp(data, net, "cfp-dev", choose),
        test=read_cfp(data, net, "cfp-dev", test),
        lfw_test=lfw.take(part == test),
    )


@cache
def read_cfp(data: Path, net: str, folder: str, fold: int) -> TrainingRows:
    return read_training_rows([str(data / f"{folder}-{net}" / f"fold{fold + 1:02d}.parquet")], ColumnNames())


@cache
def read_lfw(data: Path, net: str) -> tuple[TrainingRows, np.ndarray]:
    rows = read_training_rows([str(data / f"lfw-dev-{net}")], ColumnNames())
    return rows, np.array([subject_key(name, "ablation") % FOLDS for name in rows.subjects])


def joined(parts: list[TrainingRows]) -> TrainingRows:
    return TrainingRows(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.subjects for part in parts]),
        np.concatenate([part.classes for part in parts]),
        "",
    )


def report(net: str, work: Path, data: Path, to: Path) -> None:
    """Compare every method with raw, fold by fold, each fold at its own thresholds, and average over folds.

    Scores are never pooled over folds: seven models, stopped or scaled differently, share no threshold, as they never
    would in use. Pooling them was tried, and it charges a method for the spread of its models' scales.
    """
    methods = sorted(path.name for path in (work / net).iterdir() if is_whole(path))
    raw = Measured.of(net, RAW, work, data)
    measured = {method: raw if method == RAW else Measured.of(net, method, work, data) for method in methods}
    results = {
        method: compare(raw, measured[method]) for method in sorted(methods, key=lambda name: (name != RAW, name))
    }
    direct = {
        f"{ours} against {base}": compare(measured[base], measured[ours])
        for ours, base in DIRECT
        if {ours, base} <= set(methods)
    }
    to.mkdir(parents=True, exist_ok=True)
    (to / f"training_{net}.json").write_text(json.dumps({"raw": results, "direct": direct}, indent=1) + "\n")
    text = markdown(results, RAW) + "\nDirectly, in percent of the second's rate:\n\n" + markdown(direct, None)
    (to / f"training_{net}.md").write_text(text)
    print(text)


@dataclass(frozen=True, eq=False)
class Measured:
    """Metrics of a method: exact, by fold, and in every draw of subjects within the folds, averaged over folds."""

    exact: list[dict[Key, float | None]]
    drawn: dict[Key, np.ndarray]

    @classmethod
    def of(cls, net: str, method: str, work: Path, data: Path) -> "Measured":
        exact, draws = [], []
        for test in range(FOLDS):
            fold = read_fold(data, net, test)
            with np.load(work / net / method / f"{test}.npz") as file:
                cfp = compare_all(file["cfp"], fold.test.subjects, fold.test.classes)
                lfw = compare_all(file["lfw"], fold.lfw_test.subjects, np.zeros(len(fold.lfw_test), int))
            cells = {"all": cfp.overall, "LFW": lfw.overall, **cfp.cells}
            exact.append(
                {(name, metric): one.value for name, cell in cells.items() for metric, one in cell.estimates().items()}
            )
            # Equal seeds: a method's draws are those of raw, so that differences are paired.
            drawn = draw(cfp, draw_subjects(cfp, RESAMPLES, test, 0.95))
            drawn["LFW"] = draw(lfw, draw_subjects(lfw, RESAMPLES, FOLDS + test, 0.95))["all"]
            draws.append({(name, metric): value for name, of in drawn.items() for metric, value in of.items()})
        return cls(exact, {key: np.mean([one[key] for one in draws], axis=0) for key in draws[0]})

    def rate(self, key: Key) -> float | None:
        """Return the mean over folds, None where a fold lacks it."""
        values = [fold[key] for fold in self.exact]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None


def compare_all(x: np.ndarray, subjects: np.ndarray, classes: np.ndarray) -> AllPairs:
    _, codes = np.unique(subjects, return_inverse=True)
    return all_pairs(x, codes, classes=classes, class_names=POSE_CLASSES, fmr_points=POINTS)


def compare(base: Measured, ours: Measured) -> Row:
    """Return for each column: the rate, its change in percent of base's, and the ends of the change's 95% interval."""
    row: Row = {}
    for column, key in COLUMNS.items():
        before, after = base.rate(key), ours.rate(key)
        if not before or after is None:
            row[column] = [after, None, None, None]
            continue
        change = 100 * (ours.drawn[key] - base.drawn[key]) / before
        low, high = np.nanquantile(change, [0.025, 0.975])
        row[column] = [after, 100 * (after - before) / before, float(low), float(high)]
    return row


def markdown(results: Mapping[str, Row], reference: str | None) -> str:
    if not results:
        return "(nothing to compare)\n"
    heads = list(next(iter(results.values())))
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for method, row in results.items():
        cells = []
        for rate, change, low, high in row.values():
            if rate is None:
                cells.append("n/e")
            elif method == reference or change is None:
                cells.append(f"{100 * rate:.2f}%")
            else:
                ends = "" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]"
                cells.append(f"{change:+.1f}{ends}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def features_file(work: Path, net: str, name: str, mode: str, test: int) -> Path:
    return work / net / f"{name} {mode}" / f"{test}.npz"


def is_whole(folder: Path) -> bool:
    return all((folder / f"{test}.npz").exists() for test in range(FOLDS))


if __name__ == "__main__":
    main()
