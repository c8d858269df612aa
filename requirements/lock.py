"""Write the locks beside this file: every dependency with its version and the hashes of all its files.

`base.txt` is what the application needs, `EXTRA.txt` what an extra of pyproject.toml adds to it, `cuda.txt` what the
CUDA build of torch loads, and `torch-cpu.txt` a build of torch without CUDA. All come from one resolution for every
platform and Python, so they go together. `make setup` installs them; `make lock` runs this file with uv.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = ("cpu", "gpu", "dask", "losses", "dev")
CUDA = re.compile(r"nvidia-|cuda-|triton")
# A release of which a CPU-only build exists for Linux on x86-64; PyPI's own build for it brings CUDA's several GB.
TORCH = "torch==2.13.0"
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, which is not on PyPI. Other Pythons want TORCH_INDEX.
CPU_BUILD = f"{TORCH}+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"


def main() -> None:
    """Resolve once with all extras, then divide the result among the files."""
    everything = resolve(EXTRAS, f"{TORCH}\n")
    pins = "\n".join(re.findall(r"^\S+==[^\\\n]*", "\n".join(everything.values()), re.MULTILINE))
    base = resolve((), pins).keys()
    files = {"base": {name for name in base if not CUDA.match(name)}}
    files["cuda"] = base - files["base"]
    for extra in EXTRAS:
        files[extra] = resolve((extra,), pins).keys() - base
    for file, names in files.items():
        write(file, [everything[name] for name in sorted(names)])
    write("torch-cpu", [CPU_BUILD])


def write(file: str, blocks: list[str]) -> None:
    """Write one of the locks."""
    (HERE / f"{file}.txt").write_text("\n".join(["# Written by `make lock`.", *blocks, ""]), encoding="utf-8")


def resolve(extras: tuple[str, ...], constraints: str) -> dict[str, str]:
    """Return the lines of each package that pyproject.toml with these extras needs, by name."""
    words = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate",
             "--constraint", "-", *(f"--extra={extra}" for extra in extras), "pyproject.toml"]  # fmt: skip
    words = [sys.executable, "-m", *words]
    done = subprocess.run(words, cwd=HERE.parent, input=constraints, text=True, stdout=subprocess.PIPE, check=True)
    blocks: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", done.stdout.strip()):
        name = block.split("==")[0]
        blocks[name] = f"{blocks[name]}\n{block}" if name in blocks else block  # one a Python, if they differ
    return blocks


if __name__ == "__main__":
    main()
