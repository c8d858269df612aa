"""Runs killed with SIGKILL at random moments of every stage: nothing is lost, nothing is half, nothing is done twice.

FRONTALIS_KILLS says how many (7 by default, one a stage; `make torture` 60). FRONTALIS_SEED changes the moments.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.forget import forget
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer
from tasks.synthetic.shards import synthesize
from tests.commands import start

KILLS = int(os.environ.get("FRONTALIS_KILLS", "7"))
SEED = int(os.environ.get("FRONTALIS_SEED", "1"))
SHARDS = 12
MODES = 3
FILES = SHARDS * MODES
STAGES = ("start", "plan", "reweight", "commit", "index", "evaluate", "publish")
LONGEST = 120
SHORTEST_STAGE = 0.1
LANDED: list[str] = []

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60 + 60 * KILLS)]


@dataclass(frozen=True)
class Scene:
    """A run to be killed: the store it starts from, its command, and what an undisturbed run leaves and takes."""

    before: Path
    command: list[str]
    env: dict[str, str]
    files: dict[str, bytes]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def scenes(prefect_server, make_checkpoint, tmp_path_factory) -> list[Scene]:
    """A first run on an empty store; and a later one, whose new models have everything computed again.

    The later one is a flow that a Prefect server records.
    """
    folder = tmp_path_factory.mktemp("crash")
    source = folder / "shards"
    synthesize(source, subjects=2 * SHARDS, per_subject=8, dim=32, shards=SHARDS, seed=5, bad_rows=12)
    if len(STAGES) >= KILLS:  # few kills are to be quick: without labels there is little to measure and to draw
        for file in source.glob("*.parquet"):
            pq.write_table(pq.read_table(file, columns=["id", "embedding"]), file)
    made = []
    before = folder / "nothing"
    for number, env in ((1, dict(os.environ)), (2, dict(prefect_server.env))):
        command = ["reprocess", "--source", str(source)]
        for mode in ("per_sample", "batch_stat"):
            file = make_checkpoint(folder / f"{mode}-{number}.safetensors", mode, seed=number)
            command += ["--model", f"{mode}={file}"]
        after = folder / f"after-{number}"
        if before.exists():
            shutil.copytree(before, after)
        seconds = dict.fromkeys(STAGES, 0.0)
        run = Run(command, env, after)
        since, stage = time.monotonic(), "start"
        while run.process.poll() is None:
            now = run.stage()
            if now != stage:
                seconds[stage] += time.monotonic() - since
                since, stage = time.monotonic(), now
            time.sleep(0.005)
        seconds[stage] += time.monotonic() - since
        assert run.process.returncode == 0, run.stderr()
        made.append(Scene(before, command, env, feature_files(after), seconds))
        before = after
    return made


class Run:
    """`frontalis reprocess` as a process group of its own, whose progress shows in the store."""

    def __init__(self, command: list[str], env: dict[str, str], store: Path) -> None:
        self.store, self.old = store, paths(store)
        self.process = start(*command, "--store", store, env=env)

    def new(self) -> set[str]:
        return paths(self.store) - self.old

    def stage(self) -> str:
        """Return the stage the run is in, by the files that have appeared."""
        new = self.new()
        if any(path.startswith("releases/") or path.endswith("/index.html") for path in new):
            return "publish"
        if sum(path.startswith("indexes/") and path.endswith("/ids.parquet") for path in new) == MODES:
            return "evaluate"
        if any(path.startswith("indexes/") for path in new):
            return "index"
        if sum(path.startswith("features/mode=") and "/.tmp-" not in path for path in new) >= FILES:
            return "commit"
        if any(path.startswith("features/mode=") for path in new):
            return "reweight"
        return "plan" if any(path.startswith(("models/", "manifest/")) for path in new) else "start"

    def kill_at(self, stage: str, moment: Callable[[], bool]) -> bool:
        """Kill the whole group once it has reached `stage` and `moment()` holds; False where it ended before."""
        reached = STAGES.index(stage)
        deadline = time.monotonic() + LONGEST
        while self.process.poll() is None:
            if STAGES.index(self.stage()) >= reached and moment():
                break
            assert time.monotonic() < deadline, self.stderr()
            time.sleep(0.005)
        self.process.kill_group()
        return self.process.wait() == -signal.SIGKILL

    def finish(self) -> None:
        assert self.process.wait(LONGEST) == 0, self.stderr()

    def stderr(self) -> str:
        return self.process.stderr.read_text()


BETWEEN = {
    "nothing": lambda store: None,
    "vacuum": lambda store: clean(str(store), keep=1),
    "verify": lambda store: check(str(store)),
    "forget": lambda store: forget(str(store), subject="nobody-of-that-name", in_advance=True),
}
"""What an operator may type after a kill."""


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_is_carried_on(scenes, tmp_path, number) -> None:
    chance = random.Random(f"{SEED}-{number}")
    scene = scenes[chance.random() < 0.25]  # the flow takes longer, and the stages are the same
    stage = STAGES[number % len(STAGES)]
    store = tmp_path / "store"
    if scene.before.exists():
        shutil.copytree(scene.before, store)
    served = Releases(Location(str(store))).all()

    run = Run(scene.command, scene.env, store)
    killed = run.kill_at(stage, _moment(chance, run, stage, scene.seconds[stage]))

    if killed:
        LANDED.append(stage)
        _is_consistent(store, scenes, number, [old.release for old in served])
    if store.exists():
        BETWEEN[chance.choice(list(BETWEEN))](store)
    done = {path: _identity(store / path) for path in run.new() if _is_result(path)}
    Run(scene.command, scene.env, store).finish()
    again = {path: _identity(store / path) for path in done}
    assert again == done, "what was complete must not be computed again"
    assert feature_files(store) == scene.files, "the same files with the same bytes as without the kill"
    releases = Releases(Location(str(store))).all()
    assert [old.number for old in releases] == list(range(1, len(served) + 2))
    assert releases[-1].serving
    clean(str(store))
    checked = check(str(store))
    assert checked.problems == []
    assert checked.leftovers == []
    assert not [path for path in paths(store) if "/.tmp-" in path or path.endswith(".tmp") or "#" in path]


def test_the_kills_landed_and_in_every_stage() -> None:
    """What the kills above rest on. A run may be faster than its killer now and then."""
    assert len(LANDED) >= 0.75 * KILLS
    assert set(LANDED) == set(STAGES) or 2 * len(STAGES) > KILLS


def _moment(chance: random.Random, run: Run, stage: str, seconds: float) -> Callable[[], bool]:
    """A random moment within a stage: after some files have been written, or after a part of its usual time."""
    if stage == "reweight":
        files = chance.randint(1, FILES - 1)
        return lambda: sum(_is_result(path) for path in run.new()) >= files
    since: list[float] = []
    delay = chance.uniform(0, max(seconds, SHORTEST_STAGE))

    def reached() -> bool:
        since.append(time.monotonic())
        return since[-1] - since[0] >= delay

    return reached


def _is_consistent(store: Path, scenes: list[Scene], number: int, served: list[str]) -> None:
    """After a kill: the last promoted release answers, and the tables show one whole version."""
    releases = Releases(Location(str(store))).all()
    table = features_table(Location(str(store)))
    snapshot = table.snapshot()
    if snapshot.files:
        shown = pl.scan_delta(str(store / "features")).select("mode", "id").collect()
        assert shown.group_by("mode").len()["len"].n_unique() == 1
        # all of the old version or all of the new one, never a part of both
        assert set(snapshot.files) in [set(scene.files) for scene in scenes]
    if not releases:
        assert not served
        return
    serving = Releases(Location(str(store))).serving()
    assert serving.release in served or serving.number == len(served) + 1
    some = next(iter(pl.scan_delta(str(store / "features")).select("id").head(1).collect()["id"]))
    for mode in ("raw", "per_sample", "batch_stat"):
        found = answer(str(store), mode, ids=[some], k=3)
        assert found.release == serving.release
        assert len(found.results[0].neighbours) == 3


def _is_result(path: str) -> bool:
    return path.startswith("features/mode=") and "/.tmp-" not in path and path.endswith(".parquet")


def _identity(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def feature_files(store: Path) -> dict[str, bytes]:
    table = DeltaTable(store / "features")
    return {
        path: (store / "features" / path).read_bytes()
        for path in features_table(Location(str(store))).snapshot(table.version()).files
    }


def paths(store: Path) -> set[str]:
    found = set()
    for folder, _, names in os.walk(store):
        found.update(f"{os.path.relpath(folder, store)}/{name}" for name in names)
    return found
