"""Rows a second of the eager network, the folded graph and the whole Reweighter, and the limit the machine sets.

    python -m benchmarks.inference [--architecture dual_branch] [--dim 512] [--rows 4096 …]

The limit is the time of the bare matrix products in the same minute. On a shared machine read the minimum beside the
median. The default is the network that `train` makes. `benchmarks.gpu` measures a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from models.architectures import build
from models.checkpoint import load, to_bytes
from models.dual_branch import DualBranchSENet, members_of, whitening_of
from models.folding import fold
from models.inference import Reweighter
from models.se import gather_statistics
from schemas.models import Mode, ModelCard, Statistic

ARCHITECTURES: dict[str, dict[str, float]] = {
    "dual_branch_ensemble": {"members": 3, "hidden_dim": 128, "whitening": 0.5},
    "dual_branch": {},
}
CASES: tuple[tuple[Mode, Statistic], ...] = (
    ("per_sample", "frozen"),
    ("batch_stat", "frozen"),
    ("batch_stat", "batch"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="dual_branch_ensemble")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {options.architecture}, D = {options.dim}\n")
    print("| rows | threads | mode, statistic | what | median ms | min ms | rows/s | of eager |")
    print("|---:|---:|---|---|---:|---:|---:|---:|")
    for rows in options.rows:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for mode, statistic in CASES:
                measure(rows, threads, mode, statistic, options)


def measure(n_rows: int, threads: int, mode: Mode, statistic: Statistic, options: argparse.Namespace) -> None:
    rows = np.random.default_rng(0).standard_normal((n_rows, options.dim), dtype=np.float32)
    rows.flags.writeable = False
    x = torch.from_numpy(rows.copy())
    checkpoint = load(network(mode, options))
    for module in checkpoint.model.modules():
        if hasattr(module, "statistic"):
            setattr(module, "statistic", statistic)  # noqa: B010 - of those that have one
    folded, reweighter = fold(checkpoint.model, statistic), Reweighter(checkpoint, statistic, device="cpu")
    eager = checkpoint.model.eval()
    square = torch.randn(options.dim, options.dim)
    cases: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(x),
        "folded": lambda: folded(x),
        "folded, branches": lambda: folded(x, return_branches=True),
        "Reweighter": lambda: reweighter(rows),
        "limit: 4 products of D × D": lambda: [torch.mm(x, square) for _ in range(4)],
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for _ in range(options.repeats + 2):  # interleaved, so that a noisy neighbour hits all alike
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times[name].append((time.perf_counter() - start) * 1e3)
    slowest = statistics.median(times["eager"][2:])
    for name, all_times in times.items():
        median = statistics.median(all_times[2:])
        print(
            f"| {n_rows:,} | {threads} | {mode}, {statistic} | {name} | {median:.2f} | {min(all_times):.2f} "
            f"| {n_rows / median * 1e3:,.0f} | {slowest / median:.2f}x |",
            flush=True,
        )


def network(mode: Mode, options: argparse.Namespace) -> bytes:
    """Return a checkpoint of the architecture whose weights are drawn, not trained."""
    torch.manual_seed(0)
    arguments = {"feature_dim": options.dim, "use_batch_stat": mode == "batch_stat"}
    arguments |= ARCHITECTURES[options.architecture]
    model = build(options.architecture, arguments)
    for member in members_of(model):
        assert isinstance(member, DualBranchSENet)
        torch.nn.init.normal_(member.pose_branch.project.weight, std=0.02)
    whitening = whitening_of(model)
    if whitening is not None:
        torch.nn.init.normal_(whitening.weight, std=0.02)
    gather_statistics(model, [torch.randn(512, options.dim)])
    card = ModelCard(architecture=options.architecture, arguments=arguments, mode=mode, embedding_dim=options.dim)
    return to_bytes(card, model)


if __name__ == "__main__":
    main()
