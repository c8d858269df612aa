"""What training gains, and harms, by the number of subjects: on real embeddings, on all other subjects.

    python -m benchmarks.learning_curve run --net fr512 --subjects 50,100 --draws 4 [--lfw]
    python -m benchmarks.learning_curve report --to benchmarks/results

A draw is a random choice of CFP subjects. They are trained on as `frontalis train --augment` does (pictures, mirrored
pictures, a tenth of the subjects kept for its own test), with `--lfw` with LFW as a second source. All other CFP
subjects are tested: the network with its whole change ("before", which was the default), and with the change of the
chosen length ("after"). `run` adds a line to `--work` for each training and skips those that are there. Research data,
read from `../shared/data`; nothing of it is written.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training_ablation import FOLDS, joined, read_cfp, read_lfw
from metrics.bootstrap import relative_bootstrap
from schemas.metrics import EER, MetricId
from schemas.settings import TrainingSettings
from tasks.training.length import at_length
from tasks.training.selection import compare_by_pose, front, scaled
from tasks.training.train import learn_length, split_rows

CELLS = {"FP": "frontal-profile", "FF": "frontal-frontal", "PP": "profile-profile"}
COLUMNS = {
    "FP EER": ("FP", EER),
    "FP 1e-2": ("FP", MetricId("fnmr@1e-2")),
    "FP 1e-3": ("FP", MetricId("fnmr@1e-3")),
    "FP 1e-3 global": ("FP", MetricId("fnmr_global@1e-3")),
    "FF EER": ("FF", EER),
    "FF 1e-2 global": ("FF", MetricId("fnmr_global@1e-2")),
    "FF 1e-3 global": ("FF", MetricId("fnmr_global@1e-3")),
    "PP EER": ("PP", EER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--net", choices=("fr512", "mfn192"), default="fr512")
    parser.add_argument("--subjects", default="50")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the training; another one shows its spread")
    parser.add_argument("--lfw", action="store_true", help="LFW as a second source")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/learning_curve.jsonl"))
    parser.add_argument("--to", type=Path, default=None, help="report: folder for learning_curve.json and .md")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.work.read_text().splitlines()] if options.work.exists() else []
    if options.what == "report":
        report(done, options.to)
        return
    for subjects in map(int, options.subjects.split(",")):
        for draw in range(options.draws):
            one = {
                "net": options.net, "subjects": subjects, "draw": draw, "lfw": options.lfw, "seed": options.seed,
            }  # fmt: skip
            if not any(one.items() <= old.items() for old in done):
                one |= measure(options.data, **one)
                with options.work.open("a") as file:
                    file.write(json.dumps(one) + "\n")
                print(one["net"], subjects, draw, one["share"], f"{one['seconds']:.0f} s", flush=True)


def measure(data: Path, net: str, subjects: int, draw: int, lfw: bool, seed: int) -> dict[str, object]:
    """Train on a draw of subjects and compare with raw on all others."""
    torch.set_num_threads(1)
    rows = joined([read_cfp(data, net, "cfp-dev", fold) for fold in range(FOLDS)])
    mirrored = joined([read_cfp(data, net, "cfp-dev-mirrored", fold) for fold in range(FOLDS)])
    chosen = np.random.default_rng(draw).permutation(np.unique(rows.subjects))[:subjects]
    mine, others = rows.take(np.isin(rows.subjects, chosen)), rows.take(~np.isin(rows.subjects, chosen))
    if lfw:
        mine = joined([mine, read_lfw(data, net)[0]])
    settings = TrainingSettings(sources=("-",), out="-", seed=seed, device="cpu")
    start = time.perf_counter()
    _, parts, learn = split_rows(settings, mine, mirrored)
    learnt = learn_length(settings, parts, learn)
    seconds = time.perf_counter() - start
    _, codes = np.unique(others.subjects, return_inverse=True)
    raw = compare_by_pose(others.x, codes, others.classes)
    found: dict[str, object] = {"share": learnt.choice.best.share, "seconds": seconds}
    for name, share in (("before", 1.0), ("after", learnt.choice.best.share)):
        model = at_length(learnt.fitted.model, share)
        ours = compare_by_pose(front(model, scaled(others.x, learnt.mean_norm)), codes, others.classes)
        change = relative_bootstrap(raw, ours, resamples=1000)
        found[name] = {
            column: change[CELLS[cell]][metric].model_dump() for column, (cell, metric) in COLUMNS.items()
        }  # fmt: skip
    claims = learnt.choice
    return {**found, "improved": claims.improved, "claim": claims.best.eer.model_dump(), "chosen_on": claims.subjects}


def report(done: list[dict[str, Any]], to: Path | None) -> None:
    """Print a line for each training, changes in percent of raw with 95% intervals."""
    order = sorted(done, key=lambda one: (one["net"], one["lfw"], one["subjects"], one["draw"], one["seed"]))
    heads = ["network", "subjects", "LFW", "draw", "seed", "change scaled by", "claims", "length", *COLUMNS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in order:
        for name in ("before", "after"):
            share = "raw" if one["share"] is None else f"{one['share']:g}"
            lead = [one["net"], one["subjects"], "yes" if one["lfw"] else "no", one["draw"], one["seed"], share]
            claim = "improved" if one["improved"] else "not shown"
            lines.append(f"| {' | '.join(map(str, [*lead, claim, name, *(map(_cell, one[name].values()))]))} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        (to / "learning_curve.md").write_text(text)
        (to / "learning_curve.json").write_text(json.dumps(order, indent=1) + "\n")


def _cell(change: dict[str, Any]) -> str:
    if change["value"] is None:
        return "n/e"
    if change["low"] is None:
        return f"{100 * change['value']:+.1f}"
    return f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


if __name__ == "__main__":
    main()
