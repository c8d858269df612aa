"""Exact verification over all pairs beside the plain matrix product, its limit, and beside what is used elsewhere.

    python -m benchmarks.verification [--rows 50000 …] [--dim 512] [--repeats 3] [--device cuda]

Every competitor runs in a process of its own, so that its peak memory is its own; rounds alternate between competitors,
so that a busy machine is busy for all of them; medians are printed. The competitors that keep all scores run only where
those fit into memory. All use as many threads as torch has; with `--device cuda` only those run that use the GPU, and
memory is what torch takes there beside the features.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from metrics.allpairs import all_pairs
from metrics.verification import verify

PER_SUBJECT = 14
SCORES_THAT_FIT = 60_000_000


def people(n_rows: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    subjects = np.arange(n_rows) // PER_SUBJECT
    features = random.standard_normal((subjects[-1] + 1, dim), dtype=np.float32)[subjects]
    features += 1.5 * random.standard_normal((n_rows, dim), dtype=np.float32)
    return features, subjects, np.arange(n_rows) % PER_SUBJECT // 10  # ten frontal, four profile


def product_only(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    """The limit: every pair's product, block by block into one buffer, and nothing done with it."""
    unit = torch.nn.functional.normalize(torch.from_numpy(features).to(device))
    side = 2048 if device == "cpu" else 8192
    buffer = torch.empty(side * side, device=device)
    for start in range(0, len(unit), side):
        rows = unit[start : start + side]
        for left in range(start, len(unit), side):
            columns = unit[left : left + side]
            out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=out)
    if device != "cpu":
        torch.cuda.synchronize()


def frontalis_total(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    all_pairs(features, subjects, device=device)


def frontalis_cells(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    all_pairs(features, subjects, classes=poses, class_names=("frontal", "profile"), device=device)


def materialised(features: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unit = torch.nn.functional.normalize(torch.from_numpy(features)).numpy()
    first, second = np.triu_indices(len(unit), 1)
    scores = (unit @ unit.T)[first, second]
    same = subjects[first] == subjects[second]
    return scores, same


def sorting(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    scores, same = materialised(features, subjects)
    verify(scores[same], scores[~same])


def scikit_learn(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    scores, same = materialised(features, subjects)
    roc_curve(same, scores)
    roc_auc_score(same, scores)


def pyeer(features: np.ndarray, subjects: np.ndarray, poses: np.ndarray, device: str) -> None:
    from pyeer.eer_stats import calculate_roc, calculate_roc_auc, get_eer_values

    scores, same = materialised(features, subjects)
    _, fmr, fnmr = calculate_roc(scores[same], scores[~same])
    get_eer_values(fmr, fnmr)
    calculate_roc_auc(fmr, fnmr)


# How many scores a competitor gets at most: by memory, and for pyeer (Python lists) by patience too.
COMPETITORS: dict[str, tuple[Callable[..., None], float]] = {
    "matrix product alone": (product_only, float("inf")),
    "frontalis, total": (frontalis_total, float("inf")),
    "frontalis, total and 3 pose cells": (frontalis_cells, float("inf")),
    "all scores, sorted (NumPy)": (sorting, SCORES_THAT_FIT),
    "all scores, scikit-learn": (scikit_learn, SCORES_THAT_FIT),
    "all scores, pyeer": (pyeer, 2_500_000),
}


def measure(name: str, rows: int, dim: int, device: str) -> None:
    """Run one competitor and print its seconds and how far memory rose above the features, in MB."""
    features, subjects, poses = people(rows, dim)
    COMPETITORS[name][0](*people(200, dim), device)  # imports, thread pools, the GPU's libraries: not measured
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    else:
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS")
    start = time.perf_counter()
    COMPETITORS[name][0](features, subjects, poses, device)
    seconds = time.perf_counter() - start
    taken = (resident("VmHWM") - before) / 1024
    if device != "cpu":
        taken = (torch.cuda.max_memory_allocated() - features.nbytes) / 1e6
    print(json.dumps({"seconds": seconds, "megabytes": taken}))


def resident(what: str) -> int:
    """Memory of this process in kB, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(what)[2].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 5_000, 50_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", choices=COMPETITORS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one, arguments.rows[0], arguments.dim, arguments.device)
        return
    print("| rows | pairs | what | seconds | million pairs/s | of the product | memory, MB |")
    print("|---:|---:|---|---:|---:|---:|---:|")
    for rows in arguments.rows:
        pairs = rows * (rows - 1) // 2
        fit = pairs if arguments.device == "cpu" else SCORES_THAT_FIT + 1
        names = [name for name, (_, most) in COMPETITORS.items() if max(pairs, fit) <= most]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            for name in names:
                command = [sys.executable, "-m", "benchmarks.verification", "--one", name]
                command += ["--rows", str(rows), "--dim", str(arguments.dim), "--device", arguments.device]
                runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        limit = statistics.median(run["seconds"] for run in runs["matrix product alone"])
        for name in names:
            seconds = statistics.median(run["seconds"] for run in runs[name])
            memory = statistics.median(run["megabytes"] for run in runs[name])
            speed = f"{pairs / seconds / 1e6:,.0f} | {limit / seconds:.0%}"
            print(f"| {rows:,} | {pairs / 1e6:,.0f} M | {name} | {seconds:.2f} | {speed} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
