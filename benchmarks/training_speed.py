"""Seconds that training takes from shards to checkpoint, on the CPU and on the GPU where there is one, side by side.

    python -m benchmarks.training_speed [--subjects 350 5000] [--dim 512] [--repeats 3]

The shards are synthetic, of 14 rows a subject. Everything else is what `frontalis train` does with its defaults.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from schemas.settings import TrainingSettings
from tasks.synthetic.shards import synthesize
from tasks.training.train import train_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subjects", type=int, nargs="+", default=[350])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print("| subjects | device | median s | min s | max s | FP EER of held-out subjects, raw and trained, % |")
    print("|---:|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for subjects in options.subjects:
            source = Path(folder, str(subjects))
            synthesize(str(source), subjects=subjects, per_subject=14, dim=options.dim, shards=8, seed=0)
            seconds: dict[str, list[float]] = {device: [] for device in devices}
            rates = {}
            for _ in range(options.repeats):
                for device in devices:
                    out = Path(folder, f"{device}.safetensors")
                    start = time.perf_counter()
                    trained = train_model(
                        TrainingSettings(sources=(str(source),), out=str(out), device=device, resamples=0)
                    )
                    seconds[device].append(time.perf_counter() - start)
                    rates[device] = [100 * (cells["frontal-profile"]["eer"] or 0) for cells in trained.rates.values()]
            for device, taken in seconds.items():
                eer = ", ".join(f"{rate:.2f}" for rate in rates[device])
                print(
                    f"| {subjects:,} | {device} | {statistics.median(taken):.1f} | {min(taken):.1f} | {max(taken):.1f} "
                    f"| {eer} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
