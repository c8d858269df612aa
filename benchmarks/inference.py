"""Rows a second of the eager network, the folded graph and the whole Reweighter, and the limit the machine sets.

Run from the project's root: `python benchmarks/inference.py [--dim 512] [--rows 4096] [--repeats 15]`. The limit is the
time of the bare matrix products, measured in the same minute; on a shared machine read the minimum beside the median.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from models.checkpoint import load, to_bytes
from models.dual_branch import DualBranchSENet
from models.folding import _affine, fold
from models.inference import Reweighter
from models.se import gather_statistics
from schemas.models import ModelCard, Statistic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, D = {options.dim}, {options.rows} rows")
    print(f"{'threads':>7} {'mode':<18} {'what':<22} {'median ms':>9} {'min ms':>8} {'rows/s':>9} {'ratio':>6}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for mode, statistic in (("per_sample", "frozen"), ("batch_stat", "frozen"), ("batch_stat", "batch")):
            measure(threads, mode, statistic, options)


def measure(threads: int, mode: str, statistic: Statistic, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    x = torch.randn(options.rows, options.dim)
    model = DualBranchSENet(options.dim, use_batch_stat=mode == "batch_stat")
    torch.nn.init.normal_(model.pose_branch.project.weight, std=0.02)
    gather_statistics(model, [x])
    for branch in (model.identity_branch, model.pose_branch):
        branch.se.statistic = statistic
    model.eval()
    card = ModelCard(
        architecture="dual_branch",
        arguments={"feature_dim": options.dim, "use_batch_stat": mode == "batch_stat"},
        mode=mode,
        embedding_dim=options.dim,
    )
    folded, reweighter = fold(model, statistic), Reweighter(load(to_bytes(card, model)), statistic, device="cpu")
    rows = x.numpy().astype(np.float32)
    rows.flags.writeable = False
    square, bias = torch.randn(options.dim, options.dim), torch.randn(options.dim)
    cases: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "folded": lambda: folded(x),
        "folded, branches": lambda: folded(x, return_branches=True),
        "Reweighter": lambda: reweighter(rows),
        "limit: 4 products": lambda: [_affine(x, square, bias, "none") for _ in range(4)],
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for _ in range(options.repeats + 2):  # interleaved, so that a noisy neighbour hits all alike
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times[name].append((time.perf_counter() - start) * 1e3)
    eager = statistics.median(times["eager"][2:])
    for name, all_times in times.items():
        median = statistics.median(all_times[2:])
        print(
            f"{threads:>7} {f'{mode}, {statistic}':<18} {name:<22} {median:>9.1f} {min(all_times):>8.1f} "
            f"{options.rows / median * 1e3:>9,.0f} {eager / median:>5.2f}x"
        )


if __name__ == "__main__":
    main()
