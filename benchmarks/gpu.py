"""Re-weighting and all pairs on a GPU: rates, their share of what the machine can do, and equality with the CPU.

    python -m benchmarks.gpu [--rows 262144] [--pair-rows 50000 200000] [--dim 512] [--repeats 15] [--json FILE]

It needs only torch, numpy, pyarrow, safetensors, pydantic and this repository's `models`, `schemas`, `metrics`.

Re-weighting goes from main memory to main memory. Its limit is the same rows copied to the GPU and back, both ways at
once, between page-locked memory. The limit of all pairs is the float32 product of the same tiles. `--device cpu` runs
the same code without a GPU, for the tests.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.inference import network
from benchmarks.verification import people
from metrics.allpairs import all_pairs
from metrics.pair_counts import _TILE, Rows, count_pairs
from models.checkpoint import Checkpoint, load
from models.gpu import GPU_BLOCK_ROWS, GraphSlot
from models.inference import Reweighter, normalise
from schemas.models import Mode, Precision

Key = TypeVar("Key", bound=Hashable)
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Line:
    """One measurement: a median, its rate, the limit's rate, and what was compared with the CPU."""

    what: str
    setting: str
    milliseconds: float
    millions_per_second: float
    share: float | None = None
    check: str = ""


def main(arguments: list[str] | None = None) -> list[Line]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--pair-rows", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--architecture", default="dual_branch_ensemble")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe(options.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"D = {options.dim}, {options.architecture}, medians of {options.repeats}\n")
    print("| what | setting | ms | million/s | of the limit | compared |")
    print("|---|---|---:|---:|---:|---|")
    lines = [*reweighting(options), *(line for rows in options.pair_rows for line in pairs(rows, options))]
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        report = {"machine": machine, "settings": settings, "lines": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return lines


def describe(device: str) -> dict[str, str]:
    gpu = {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)} if device == "cuda" else {}
    return {**gpu, "torch": torch.__version__, "cores": str(os.cpu_count()), "machine": platform.machine()}


def reweighting(options: argparse.Namespace) -> list[Line]:
    n_rows, dim, device = options.rows, options.dim, options.device
    x = np.random.default_rng(0).standard_normal((n_rows, dim), dtype=np.float32)
    locked = torch.empty(n_rows, dim, pin_memory=device == "cuda")
    locked.copy_(torch.from_numpy(x))
    cases: dict[tuple[str, str], Callable[[], object]] = {}
    checks: dict[str, str] = {}
    modes: tuple[Mode, ...] = ("per_sample", "batch_stat")
    for mode in modes:
        checkpoint = load(network(mode, options))
        on_cpu = Reweighter(checkpoint, device="cpu")(x[:GPU_BLOCK_ROWS])["front"]
        for precision in PRECISIONS if device == "cuda" else PRECISIONS[:1]:
            setting = f"{mode}, {precision}"
            reweighter = Reweighter(checkpoint, device=device, precision=precision)
            front = reweighter(x)["front"]
            checks[setting] = f"{difference(front[: len(on_cpu)], on_cpu)}; {same_bits(reweighter, x, front)}"
            if device == "cuda":
                cases["network alone", setting] = replay(checkpoint, precision, n_rows)
            cases["re-weighting, page-locked memory", setting] = functools.partial(reweighter, locked.numpy())
            cases["re-weighting, ordinary memory", setting] = functools.partial(reweighter, x)
            for threads in (1, 8):
                cases[f"re-weighting, a block a call, {threads} threads", setting] = by_block(reweighter, x, threads)
    copies = transfers(locked, device)
    times = interleaved({**{("copy", setting): copy for setting, copy in copies.items()}, **cases}, options)
    limit = n_rows / times["copy", list(copies)[-1]] / 1e3
    lines = []
    for (what, setting), ms in times.items():
        rate = n_rows / ms / 1e3
        share, check = (None, "") if what == "copy" else (rate / limit, checks[setting])
        lines.append(show(Line(what, setting, ms, rate, share, check if "ordinary" in what else "")))
    return lines


def by_block(reweighter: Reweighter, x: np.ndarray, threads: int) -> Callable[[], object]:
    """Re-weight as a run does: one block of ordinary memory a call, each thread with its own blocks."""
    blocks = [x[start : start + GPU_BLOCK_ROWS] for start in range(0, len(x), GPU_BLOCK_ROWS)]

    def work(mine: list[np.ndarray]) -> None:
        for block in mine:
            reweighter(block)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, (blocks[first::threads] for first in range(threads))))

    return run


def transfers(locked: torch.Tensor, device: str) -> dict[str, Callable[[], object]]:
    """Return copies of the rows to the device, back, and both at once; the last is the limit."""
    back = torch.empty_like(locked, pin_memory=device == "cuda")
    there, from_there = torch.empty_like(locked, device=device), torch.zeros_like(locked, device=device)
    if device == "cpu":
        return {"there and back": lambda: (there.copy_(locked), back.copy_(from_there))}
    up, down = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        step = 4 * GPU_BLOCK_ROWS  # measured: as fast as one copy each way, and faster than smaller steps
        for block in (slice(at, at + step) for at in range(0, len(locked), step)):
            with torch.cuda.stream(up):
                there[block].copy_(locked[block], non_blocking=True)
            with torch.cuda.stream(down):
                back[block].copy_(from_there[block], non_blocking=True)

    return {
        "to the GPU": lambda: there.copy_(locked, non_blocking=True),
        "from the GPU": lambda: back.copy_(from_there, non_blocking=True),
        "there and back at once": both,
    }


def replay(checkpoint: Checkpoint, precision: Precision, n_rows: int) -> Callable[[], object]:
    """Return the recorded work of all blocks, without any copy to or from main memory."""
    network, card = Reweighter(checkpoint, device="cuda")._network, checkpoint.card

    def compute(rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (network(normalise(rows, card.normalisation, card.mean_norm)),)

    slots = [GraphSlot(compute, card.embedding_dim, precision) for _ in range(4)]

    def run() -> None:
        for number in range(-(-n_rows // GPU_BLOCK_ROWS)):
            slot = slots[number % len(slots)]
            with torch.cuda.stream(slot._stream):
                slot._graph.replay()

    return run


def difference(ours: np.ndarray, on_cpu: np.ndarray) -> str:
    """Compare with the CPU's float32: relative difference, and the worst angle between two features."""
    a, b = ours.astype(np.float64), on_cpu.astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return f"differs by {np.linalg.norm(a - b) / np.linalg.norm(b):.1e} (worst 1 − cosine {1 - cosines.min():.1e})"


def same_bits(reweighter: Reweighter, x: np.ndarray, front: np.ndarray) -> str:
    """Compare a row's bits in other company: other beginnings, other lengths, alone."""
    if reweighter.device.type == "cpu":
        return "not compared"
    parts = [slice(0, 1), slice(17, 18), slice(1000, 3000), slice(2048, 2048 + GPU_BLOCK_ROWS), slice(1, 50_000)]
    same = all(np.array_equal(reweighter(x[part])["front"], front[part]) for part in parts)
    return "same bits in any company" if same else "BITS DEPEND ON COMPANY"


def pairs(n_rows: int, options: argparse.Namespace) -> list[Line]:
    features, subjects, poses = people(n_rows, options.dim)
    n_pairs = n_rows * (n_rows - 1) // 2
    device = options.device
    unit = torch.nn.functional.normalize(torch.from_numpy(features).to(device))
    names = ("frontal", "profile")
    cases: dict[str, Callable[[], object]] = {
        "product of all tiles": lambda: product(unit, device),
        "product and counts": lambda: counts(unit, subjects),
        "all_pairs, rows on the device": lambda: all_pairs(unit, subjects, device=device),
        "all_pairs, rows in main memory": lambda: all_pairs(features, subjects, device=device),
        "all_pairs, with 3 pose cells": lambda: all_pairs(
            features, subjects, classes=poses, class_names=names, device=device
        ),
    }
    times = interleaved(cases, options)
    check = compared(min(n_rows, 6000), options.dim, device)
    limit = n_pairs / times["product of all tiles"] / 1e3
    lines = []
    for what, ms in times.items():
        rate = n_pairs / ms / 1e3
        first = what == "product of all tiles"
        lines.append(show(Line(what, f"{n_rows:,} rows", ms, rate, None if first else rate / limit, check)))
        check = ""
    return lines


def counts(unit: torch.Tensor, subjects: np.ndarray) -> None:
    """What is left of `all_pairs` without sorting rows before and computing metrics after."""
    cluster = subjects * 512 // (int(subjects[-1]) + 1)
    rows = Rows(unit, cluster, subjects, np.array([0, len(unit)]), np.arange(len(unit)), int(cluster[-1]) + 1)
    list(count_pairs(rows, 1 if unit.is_cuda else torch.get_num_threads()))


def product(unit: torch.Tensor, device: str) -> None:
    """The product of every tile that `pair_counts` visits, into one buffer."""
    height, width = _TILE[device]
    buffer = torch.empty(height * width, device=device)
    with torch.inference_mode():
        for top in range(0, len(unit), height):
            rows = unit[top : top + height]
            for left in range(top, len(unit), width):
                columns = unit[left : left + width]
                out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
                torch.mm(rows, columns.T, out=out)


def compared(n_rows: int, dim: int, device: str) -> str:
    """Compare counts with the CPU's where every score is exact, and the metrics on other rows."""
    signs = np.random.default_rng(1).choice(np.float32([-1, 1]), (n_rows, 256))  # cosines are multiples of 1/128
    ours, on_cpu = (all_pairs(signs, np.arange(n_rows) // 14, device=one) for one in (device, "cpu"))
    same = ours.overall.verification == on_cpu.overall.verification
    for name in ("genuine", "impostor_ends"):
        same &= np.array_equal(getattr(ours.overall.counts, name), getattr(on_cpu.overall.counts, name))
    features, subjects, _ = people(n_rows, dim)
    ours, on_cpu = (all_pairs(features, subjects, device=one) for one in (device, "cpu"))
    moved = np.abs(ours.overall.counts.impostor_ends - on_cpu.overall.counts.impostor_ends).sum() // 4
    eer = abs(ours.overall.verification.eer.value - on_cpu.overall.verification.eer.value)
    exact = "exact scores: equal to the CPU" if same else "EXACT SCORES DIFFER FROM THE CPU"
    share = moved / (n_rows * (n_rows - 1) / 2)
    return f"{exact}; others: {share:.0e} of the scores in another 2^-10 bin, EER differs by {eer:.0e}"


def interleaved(cases: dict[Key, Callable[[], object]], options: argparse.Namespace) -> dict[Key, float]:
    """Return the median milliseconds of each case; rounds go through all, so that a busy machine is busy for all."""
    times: dict[Key, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(all_times[1:]) for name, all_times in times.items()}


def show(line: Line) -> Line:
    share = "" if line.share is None else f"{line.share:.0%}"
    cells = (line.what, line.setting, f"{line.milliseconds:.2f}", f"{line.millions_per_second:,.2f}", share, line.check)
    print("| " + " | ".join(cells) + " |", flush=True)
    return line


if __name__ == "__main__":
    main()
