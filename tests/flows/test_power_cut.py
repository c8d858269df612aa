"""A power cut at every commit of a run: what was confirmed is there afterwards, and the next run ends the same.

A library that is preloaded (`tests/power_cut.c`) records every change of a file name and every sync of a run. From the
record the disk is built as a cut may leave it: without the names and contents that were not synced, or with those names
and files that are empty or zeros. FRONTALIS_CUTS adds cuts at random moments (0 by default; `make torture` 60), and
FRONTALIS_SEED changes them.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import polars as pl
import pytest

from schemas.errors import FrontalisError
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.verify import check
from tasks.query import answer

CUTS = int(os.environ.get("FRONTALIS_CUTS", "0"))
SEED = int(os.environ.get("FRONTALIS_SEED", "1"))
SHIM = Path(__file__).parents[1] / "power_cut.c"
COMMIT = re.compile(r"(features|quarantine|releases)/_delta_log/\d{20}\.json")
ZEROS = bytes(300)
HOW = ("unsynced gone", "empty", "zeros")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@dataclass
class File:
    """A file on the simulated disk, and its content as last synced; None: never."""

    content: bytes | None = None


@dataclass
class Disk:
    """Names as programs see them, and names that are on the disk; None stands for a folder."""

    seen: dict[str, File | None] = field(default_factory=dict)
    kept: dict[str, File | None] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Disk":
        """Return a disk with the files of a folder, all synced."""
        seen: dict[str, File | None] = {}
        for path in folder.rglob("*") if folder.exists() else ():
            seen[str(path.relative_to(folder))] = None if path.is_dir() else File(path.read_bytes())
        return cls(seen, dict(seen))

    def apply(self, kind: str, one: str, two: str, copies: Path) -> None:
        """Carry out one line of the record."""
        if kind == "C" and self.seen.get(one) is None:
            self.seen[one] = File()
        elif kind == "M":
            self.seen[one] = None
        elif kind in "UX":
            self.seen.pop(one, None)
        elif kind == "F" and (file := self.seen.get(one)):
            file.content = copies.with_name(f"{copies.name}.{two}").read_bytes()
        elif kind == "D":
            inside = {path: file for path, file in self.seen.items() if _parent(path) == one}
            self.kept = {path: file for path, file in self.kept.items() if _parent(path) != one} | inside
        elif kind in "RL" and one in self.seen:
            self.seen[two] = self.seen[one] if kind == "L" else self.seen.pop(one)

    def build(self, folder: Path, how: str) -> None:
        """Write what a power cut leaves: "unsynced gone", or all names, with "empty" or "zeros" where never synced."""
        folder.mkdir()
        names = self.kept if how == "unsynced gone" else self.seen
        for path, file in sorted(names.items()):
            if not all(str(above) in names for above in PurePosixPath(path).parents if above.name):
                continue
            if file is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                lost = ZEROS if how == "zeros" else b""
                (folder / path).write_bytes(lost if file.content is None else file.content)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


@dataclass(frozen=True)
class Recorded:
    """A run that nothing disturbed: the store before and after it, and its record."""

    before: Path
    after: Path
    models: dict[str, str]
    copies: Path

    @property
    def events(self) -> list[list[str]]:
        return [line.split("\t") for line in self.copies.read_text().splitlines()]

    @property
    def commits(self) -> list[int]:
        """How many events there are up to each commit, it included."""
        return [
            number
            for number, (kind, *paths) in enumerate(self.events, 1)
            if kind in "RL" and any(COMMIT.fullmatch(path) for path in paths[-1:])
        ]

    def disk(self, events: int) -> Disk:
        disk = Disk.of(self.before)
        for kind, one, two in self.events[:events]:
            disk.apply(kind, one, two, self.copies)
        return disk


@pytest.fixture(scope="module")
def recorded(plain_source, tiny_models, make_checkpoint, tmp_path_factory) -> list[Recorded]:
    """A first run on an empty store; and a later one, whose new models have everything computed again."""
    folder = tmp_path_factory.mktemp("cut")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed, so the record of writes cannot be made")
    shim = folder / "power_cut.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl", "-lpthread"], check=True)
    others = {mode: str(make_checkpoint(folder / f"{mode}.safetensors", mode, seed=7)) for mode in tiny_models.by_mode}
    made: list[Recorded] = []
    before = folder / "nothing"
    for number, models in enumerate((tiny_models.by_mode, others)):
        after = folder / f"store-{number}"
        if before.exists():
            shutil.copytree(before, after)
        command = [sys.executable, "-m", "frontalis", "reprocess", "--source", str(plain_source), "--store", str(after)]
        command += [word for mode, path in models.items() for word in ("--model", f"{mode}={path}")]
        copies = folder / f"record-{number}"
        preload = {
            "LD_PRELOAD": str(shim),
            "FRONTALIS_CUT_ROOT": str(after),
            "FRONTALIS_CUT_LOG": str(copies),
        }
        done = subprocess.run(command, env=os.environ | preload, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append(Recorded(before, after, models, copies))
        before = after
    return made


def test_what_a_run_confirmed_survives(recorded, tmp_path) -> None:
    """A cut after the last line of the run, on a disk that has only what was synced."""
    for number, run in enumerate(recorded):
        assert len(run.commits) >= 2
        store = tmp_path / str(number)
        run.disk(len(run.events)).build(store, "unsynced gone")
        assert check(str(store)).problems == []
        assert served(store) == served(run.after)
        assert files(store) == files(run.after)


def cuts() -> Iterator[tuple[int, str, float | None]]:
    """Yield which run is cut, how, and when: after each commit (None), or after a share of its events."""
    yield from itertools.product([0, 1] if CUTS else [1], HOW, [None])
    for number in range(CUTS):
        chance = random.Random(f"{SEED}-{number}")
        yield number % 2, chance.choice(HOW), chance.random()


@pytest.mark.parametrize(("run", "how", "share"), list(cuts()))
def test_a_cut(recorded, run_pipeline, plain_source, tmp_path, run, how, share) -> None:
    cut = recorded[run]
    for number, events in enumerate(cut.commits if share is None else [int(share * len(cut.events))]):
        recover(cut, events, how, tmp_path / str(number), run_pipeline, plain_source)


def recover(run: Recorded, events: int, how: str, store: Path, run_pipeline, source: Path) -> None:
    """Cut the power, look at the store, run again: the old or the new release answers, or an error names the file."""
    run.disk(events).build(store, how)
    known = {served(folder) for folder in (run.before, run.after) if folder.exists()}
    with contextlib.suppress(FrontalisError):
        problems = check(str(store)).problems
        assert all("frontalis reprocess" in problem.remedy for problem in problems)
    one = pl.scan_delta(str(run.after / "features")).select("id").head(1).collect()["id"][0]
    refused = pytest.raises(FrontalisError, match="`frontalis reprocess`") if not known_to(store) else None
    with refused or contextlib.nullcontext():
        assert answer(str(store), "per_sample", ids=[str(one)], k=3).release in known
    assert run_pipeline(source, store, models=run.models).status in ("promoted", "unchanged")
    assert files(store) == files(run.after)
    assert check(str(store)).problems == []


def known_to(store: Path) -> bool:
    """Return whether the releases of a store can be read, and one is served."""
    try:
        return bool(served(store))
    except FrontalisError:
        return False


def served(store: Path) -> str:
    return Releases(Location(str(store))).serving().release


def files(store: Path) -> dict[str, bytes]:
    snapshot = features_table(Location(str(store))).snapshot()
    return {path: (store / "features" / path).read_bytes() for path in snapshot.files}
