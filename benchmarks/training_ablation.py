"""What training is worth, cross-validated on real embeddings: our networks beside classical transforms and ablations.

    python -m benchmarks.training_ablation run --net fr512 --mode per_sample --methods ensemble,single [--folds 0,1]
    python -m benchmarks.training_ablation report --net fr512 --to docs/…

Seven official CFP folds share no subject. Each is tested once, by a model that was trained on five others (pictures,
mirrored pictures, and LFW subjects of five sevenths) and chosen on the seventh. A method knows nothing of the fold that
tests it. `run` leaves the features of the test folds in `--work`, one file a method and fold, and does not compute them
twice; `report` pools the pairs within the folds, and compares every method with raw by the paired bootstrap over
subjects. Research data, read from `../shared/data`; nothing of it is written but features in `--work`.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.classical import CLASSICAL, Fold
from metrics.allpairs import AllPairs, Cell, ClusterCounts, GlobalPoint, all_pairs
from metrics.bootstrap import CellIntervals, Interval, paired_bootstrap
from metrics.poses import POSE_CLASSES
from metrics.tally import ScoreTally
from metrics.verification import rates_at, summarise
from models.architectures import build
from models.training import Candidate, LabelledTensor, Recipe, fit
from schemas.models import Mode
from schemas.settings import ColumnNames
from schemas.split import subject_key
from tasks.train import PROFILE, Judge, features
from tasks.training_rows import TrainingRows, read_training_rows

FOLDS = 7
RESAMPLES = 2000
POINTS = (1e-2, 1e-3)
FRONTAL, PROFILES = POSE_CLASSES.index("frontal"), PROFILE


@dataclass(frozen=True)
class Network:
    """A network and how it is trained; `choose=False` takes the last step whatever validation says."""

    architecture: str
    loss: str = "shared_bar"
    arguments: Mapping[str, int] = ()  # type: ignore[assignment]
    choose: bool = True


NETWORKS: Mapping[str, Network] = {
    "ensemble": Network("dual_branch_ensemble"),
    "ensemble, last step, unscaled": Network("dual_branch_ensemble", choose=False),
    "single": Network("dual_branch_ensemble", arguments={"members": 1}),
    "dual_branch": Network("dual_branch"),
    "dual_branch, triplet": Network("dual_branch", loss="triplet"),
    "dual_branch, triplet, last step": Network("dual_branch", loss="triplet", choose=False),
    "dual_branch, supcon": Network("dual_branch", loss="supcon"),
    "se": Network("se"),
    "se, last step": Network("se", choose=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--net", choices=("fr512", "mfn192"), default="fr512")
    parser.add_argument("--mode", choices=("per_sample", "batch_stat"), default="per_sample")
    parser.add_argument("--methods", default="ensemble", help="names, separated by |, or 'classical'")
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
        if name == "raw":
            apply: Callable[[np.ndarray], np.ndarray] = lambda x: x  # noqa: E731
            chosen = None
        elif name in CLASSICAL:
            apply, chosen = CLASSICAL[name](fold), None
        else:
            apply, chosen = train(NETWORKS[name], mode, fold)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, cfp=apply(fold.test.x).astype(np.float32), lfw=apply(fold.lfw_test.x).astype(np.float32))
        unfinished.replace(path)
        spent = time.perf_counter() - start
        print(f"{net} {mode} {name} fold {test}: {spent:.0f} s {chosen or ''}", flush=True)


def train(network: Network, mode: Mode, fold: Fold) -> tuple[Callable[[np.ndarray], np.ndarray], Candidate]:
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
    judge = Judge(fold.validation, mean_norm)
    calls = iter(range(10**6))
    last_wins: Callable[[torch.nn.Module], float] = lambda _model: -float(next(calls))  # noqa: E731
    recipe = Recipe() if network.choose else Recipe(shares=(1.0,), validate_every=10**6)
    fitted = fit(
        model, rows, judge if network.choose else last_wins, steps=360, seed=0, loss=network.loss, recipe=recipe
    )
    return lambda x: features(fitted.model, torch.from_numpy(x) * (dim**0.5 / mean_norm)), fitted.best


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
        0,
    )


def report(net: str, work: Path, data: Path, to: Path) -> None:
    methods = sorted(path.name for path in (work / net).iterdir() if is_whole(path))
    raw_cfp, raw_lfw = pooled(net, "raw per_sample", work, data)
    results: dict[str, dict[str, list[float | None]]] = {}
    for method in sorted(methods, key=lambda name: (name != "raw per_sample", name)):
        cfp, lfw = pooled(net, method, work, data)
        cfp_change = paired_bootstrap(raw_cfp, cfp, resamples=RESAMPLES)
        lfw_change = paired_bootstrap(raw_lfw, lfw, resamples=RESAMPLES)
        results[method] = {
            "FP EER": entry(raw_cfp, cfp, cfp_change, "frontal-profile", lambda cell: cell.eer, eer),
            **{
                f"{short} FNMR@{point:g}{where}": entry(
                    raw_cfp, cfp, cfp_change, name, pick(kind, point), at(kind, point)
                )
                for short, name in (("FP", "frontal-profile"), ("FF", "frontal-frontal"))
                for kind, where in (("own", ""), ("global", " global"))
                for point in POINTS
            },
            "FF EER": entry(raw_cfp, cfp, cfp_change, "frontal-frontal", lambda cell: cell.eer, eer),
            "PP EER": entry(raw_cfp, cfp, cfp_change, "profile-profile", lambda cell: cell.eer, eer),
            "LFW EER": entry(raw_lfw, lfw, lfw_change, "all", lambda cell: cell.eer, eer),
        }
    if {"ensemble per_sample", "ensemble batch_stat"} <= set(methods):
        sides = [pooled(net, f"ensemble {mode}", work, data)[0] for mode in ("batch_stat", "per_sample")]
        change = paired_bootstrap(*sides, resamples=RESAMPLES)["frontal-profile"]
        base, name = sides[0].cells["frontal-profile"], "per_sample against batch_stat, frontal-profile, in points"
        found = {"EER": change.eer} | {f"FNMR@{point:g}": change.fnmr_own[point] for point in POINTS}
        modes = {what: [100 * (end or 0) for end in (one.estimate, one.low, one.high)] for what, one in found.items()}
        print(name, f"(batch_stat EER {100 * (eer(base) or 0):.2f}%)", json.dumps(modes))
    to.mkdir(parents=True, exist_ok=True)
    (to / f"training_{net}.json").write_text(json.dumps(results, indent=1) + "\n")
    (to / f"training_{net}.md").write_text(markdown(results))
    print(markdown(results))


def pooled(net: str, method: str, work: Path, data: Path) -> tuple[AllPairs, AllPairs]:
    """Return CFP and LFW figures over the pairs within each test fold."""
    cfp, lfw = [], []
    for test in range(FOLDS):
        with np.load(work / net / method / f"{test}.npz") as file:
            fold = read_fold(data, net, test)
            cfp.append((file["cfp"], fold.test.subjects, fold.test.classes))
            lfw.append((file["lfw"], fold.lfw_test.subjects, np.zeros(len(fold.lfw_test), int)))
    return pool(cfp, {"frontal-frontal": 0, "frontal-profile": 2, "profile-profile": 4}), pool(lfw, {})


def pool(folds: list[tuple[np.ndarray, np.ndarray, np.ndarray]], cells: Mapping[str, int]) -> AllPairs:
    """Return all figures of the pairs within folds: scores pooled, clusters of subjects side by side.

    `cells` maps a name to the sum of both rows' class codes, which is unique for frontal (0) and profile (2).
    """
    scores: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in ("all", *cells)}
    swept = []
    for x, subjects, classes in folds:
        _, codes = np.unique(subjects, return_inverse=True)
        swept.append(all_pairs(x, codes, classes=classes, class_names=POSE_CLASSES, fmr_points=POINTS))
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        first, second = np.triu_indices(len(x), 1)
        score, genuine = (unit @ unit.T)[first, second], codes[first] == codes[second]
        kind = classes[first] + classes[second]
        for name in scores:
            here = np.ones(len(score), bool) if name == "all" else kind == cells[name]
            scores[name].append((score[here & genuine], score[here & ~genuine]))
    tallies = {
        name: ScoreTally.from_scores(*(np.concatenate(side) for side in zip(*parts, strict=True)))
        for name, parts in scores.items()
    }
    overall = summarise(tallies["all"], POINTS)
    thresholds = [point.threshold for point in overall.points]
    made = {}
    for name, tally in tallies.items():
        parts = [sweep.overall if name == "all" else sweep.cells[name] for sweep in swept]
        made[name] = Cell(
            name=name,
            verification=summarise(tally, POINTS),
            at_global=tuple(
                GlobalPoint(point, threshold, *rates_at(tally, threshold))
                for point, threshold in zip(POINTS, thresholds, strict=True)
                if threshold is not None
            ),
            det=parts[0].det,
            histogram=parts[0].histogram,
            counts=ClusterCounts(
                np.concatenate([part.counts.genuine for part in parts]),
                np.concatenate([part.counts.impostor_ends for part in parts]),
            ),
        )
    sizes = np.cumsum([0, *(sweep.n_subjects for sweep in swept)])
    clusters = np.concatenate([sweep.clusters + start for sweep, start in zip(swept, sizes, strict=False)])
    return AllPairs(made.pop("all"), made, clusters, int(sizes[-1]), 0)


def entry(
    raw: AllPairs,
    ours: AllPairs,
    change: Mapping[str, CellIntervals],
    name: str,
    interval_of: Callable[[CellIntervals], Interval],
    rate_of: Callable[[Cell], float | None],
) -> list[float | None]:
    """Return the rate, and its change in percent of raw's with the ends of the 95% interval of the difference."""
    before, after = (rate_of(pairs.overall if name == "all" else pairs.cells[name]) for pairs in (raw, ours))
    found = interval_of(change[name])
    scaled = [
        None if one is None or not before else 100 * one / before for one in (found.estimate, found.low, found.high)
    ]
    return [after, *scaled]


def eer(cell: Cell) -> float | None:
    return cell.verification.eer.rate


def at(kind: str, point: float) -> Callable[[Cell], float | None]:
    if kind == "own":
        return lambda cell: cell.verification.at(point).fnmr
    return lambda cell: next((one.fnmr for one in cell.at_global if one.target_fmr == point), None)


def pick(kind: str, point: float) -> Callable[[CellIntervals], Interval]:
    return lambda cell: (cell.fnmr_own if kind == "own" else cell.fnmr_global)[point]


def markdown(results: Mapping[str, Mapping[str, list[float | None]]]) -> str:
    heads = list(next(iter(results.values())))
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for method, row in results.items():
        cells = []
        for rate, change, low, high in row.values():
            if rate is None:
                cells.append("n/e")
            elif method.startswith("raw") or change is None:
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
