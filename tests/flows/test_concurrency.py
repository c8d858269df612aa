"""Two at once: runs, a run and a rollback. One wins, the other is refused, readers see one release."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from schemas.errors import SettingsError, StoreBusyError
from schemas.features import feature_schema
from schemas.reports import GateDecision
from storage.features import features_table
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from storage.tables import FileTable, LiveFile
from storage.vectors.store import open_ids
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer
from tests.commands import frontalis, start


def command(source: Path, store: Path, models: list[str], *more: str) -> list[str]:
    return ["reprocess", "--source", str(source), "--store", str(store), *models, *more]


@pytest.mark.e2e
def test_the_second_run_is_refused_or_waits(plain_source, tiny_models, tmp_path) -> None:
    store = tmp_path / "store"
    started = [
        start(*command(plain_source, store, tiny_models.arguments, *more)) for more in ([], [], ["--wait", "100"])
    ]
    ended = [(process.communicate(timeout=170), process.returncode) for process in started]
    codes = [code for _, code in ended]
    for (_, stderr), code in ended:
        assert "Traceback" not in stderr
        assert code == 0 or (code == 3 and "held by another run (reprocess, process" in stderr), stderr
    assert codes[2] == 0, "the one that waits gets its turn"
    assert [old.number for old in Releases(Location(str(store))).all()] == [1], "the others found nothing to do"
    assert check(str(store)).problems == []


@pytest.mark.e2e
def test_readers_never_fail_or_see_a_half_while_runs_publish(plain_source, make_checkpoint, tmp_path) -> None:
    """Every answer is one of a promoted release as a whole; here each release is known by its features."""
    store = tmp_path / "store"
    ids = None
    stop = threading.Event()
    answers: list[tuple[str, str]] = []
    failures: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                for mode in ("raw", "per_sample"):
                    found = answer(str(store), mode, ids=ids, k=3)
                    answers.append((found.release, found.model_dump_json(exclude={"store", "k"})))
                frame = pl.scan_delta(str(store / "features")).group_by("mode").agg(pl.col("id").sort()).collect()
                assert len({tuple(row) for row in frame["id"].to_list()}) == 1
            except Exception as error:
                failures.append(repr(error))
            time.sleep(0.1)  # the runs need the processor, too

    def publish(number: int) -> None:
        model = make_checkpoint(tmp_path / f"{number}.safetensors", seed=number)
        done = frontalis(*command(plain_source, store, ["--model", f"per_sample={model}"], "--json"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "promoted"

    publish(1)
    ids = pl.scan_delta(str(store / "features")).select("id").head(1).collect()["id"].to_list()
    with ThreadPoolExecutor(2) as readers:
        asking = [readers.submit(ask) for _ in range(2)]
        for number in (2, 3):
            publish(number)
        time.sleep(0.5)
        stop.set()
        for one in asking:
            one.result()
    assert failures == []
    seen = {release for release, _ in answers}
    assert len(seen) == 3, "the readers have seen the change"
    by_release = {}
    for release, text in answers:
        by_release.setdefault((release, json.loads(text)["mode"]), set()).add(text)
    assert all(len(texts) == 1 for texts in by_release.values()), "one release gives one answer"


@pytest.fixture
def release(published):
    store = published()
    return store, Releases(Location(str(store))).all()[0]


def another(release, number: int, name: str):
    gate = GateDecision(promoted=True, reason="test")
    return release.model_copy(update={"release": name, "number": number, "gate": gate})


def test_of_two_records_on_one_history_one_wins(release) -> None:
    """As on object storage, where no lock keeps two runs apart."""
    store, first = release
    barrier = threading.Barrier(8)
    outcomes, refused = [], []

    def record(number: int) -> None:
        history = Releases(Location(str(store)))
        seen = history.all()
        barrier.wait()
        try:
            history.record(another(first, 2, f"r00002-{number}"), seen)
            outcomes.append(number)
        except StoreBusyError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(8) as writers:
        list(writers.map(record, range(8)))
    assert len(outcomes) == 1
    assert len(refused) == 7
    assert all("run again" in message.lower() for message in refused)
    history = Releases(Location(str(store))).all()
    assert [old.release for old in history] == [first.release, f"r00002-{outcomes[0]}"]
    assert [old.serving for old in history] == [False, True]


def test_a_rollback_in_between_is_not_overwritten(release) -> None:
    store, first = release
    history = Releases(Location(str(store)))
    history.record(another(first, 2, "r00002-x"), history.all())
    seen = history.all()
    Releases(Location(str(store))).serve(first.release)
    with pytest.raises(StoreBusyError, match="changed the releases"):
        history.record(another(first, 3, "r00003-x"), seen)
    assert history.serving().release == first.release


def test_a_rollback_during_a_run_stays_and_the_run_is_refused(
    run_pipeline, plain_source, make_checkpoint, tmp_path
) -> None:
    store, models = tmp_path / "store", [make_checkpoint(tmp_path / f"{n}.safetensors", seed=n) for n in range(3)]
    for model in models[:2]:
        assert run_pipeline(plain_source, store, models={"per_sample": str(model)}).status == "promoted"
    first, second = Releases(Location(str(store))).all()
    before = set(store.glob("features/mode=per_sample/*/*.parquet"))
    third = command(plain_source, store, ["--model", f"per_sample={models[2]}"], "--json")
    with start(*third) as run:
        while run.poll() is None and set(store.glob("features/mode=per_sample/*/*.parquet")) == before:
            time.sleep(0.001)
        run.send_signal(signal.SIGSTOP)
        assert Releases(Location(str(store))).all() == [first, second], "it must be met at work"
        roll_back(str(store), first.release)
        run.send_signal(signal.SIGCONT)
        _, stderr = run.communicate(timeout=170)
    assert (run.returncode, "another run changed the releases" in stderr) == (3, True), stderr
    assert Releases(Location(str(store))).serving().release == first.release
    again = run_pipeline(plain_source, store, models={"per_sample": str(models[2])})
    assert (again.status, again.shards_computed) == ("promoted", 0)
    assert check(str(store)).problems == []


def test_a_vacuum_leaves_what_a_rollback_is_about_to_commit(release) -> None:
    """A rollback holds no lock: the vacuum comes between the file that it writes and the commit that names it."""
    store, first = release
    history = Releases(Location(str(store)))
    history.record(another(first, 2, "r00002-beef"), history.all())

    class Overtaken(FileTable):
        def commit(self, *words):
            assert clean(str(store), keep=9).kept_releases == [first.release, "r00002-beef"]
            return super().commit(*words)

    history.table = Overtaken(history.table.place, ())
    history.serve(first.release)
    assert [old.serving for old in Releases(Location(str(store))).all()] == [True, False]
    assert clean(str(store), keep=9).removed_releases == []
    assert len(list((store / "releases").glob("*.parquet"))) == 1


def test_a_rollback_to_what_a_vacuum_is_taking_is_refused(release) -> None:
    store, first = release
    history = Releases(Location(str(store)))
    history.record(another(first, 2, "r00002-beef"), history.all())

    class Overtaken(FileTable):
        def commit(self, *words):
            assert clean(str(store), keep=1).removed_releases == [first.release]
            return super().commit(*words)

    history.table = Overtaken(history.table.place, ())
    with pytest.raises(StoreBusyError):
        history.serve(first.release)
    with pytest.raises(SettingsError, match="removed by `frontalis vacuum`"):
        roll_back(str(store), first.release)
    assert history.serving().release == "r00002-beef"


@pytest.mark.parametrize("second", ["the same file", "another file"])
def test_of_two_commits_on_one_version_one_wins(tmp_path, second) -> None:
    table = features_table(Location(str(tmp_path)))
    schema = feature_schema(pa.string())
    mine, theirs = ("a", "a") if second == "the same file" else ("a", "b")

    def file(name: str) -> LiveFile:
        path = f"mode=raw/shard={name}/x.parquet"
        (table.place / path).write_bytes(b"-")
        return LiveFile(path, 1, 1, {"mode": "raw", "shard": name})

    base = table.commit(table.snapshot(), schema, [file("first")], [])
    after = table.commit(base, schema, [file(mine)], [])
    with pytest.raises(StoreBusyError, match="another run committed first"):
        table.commit(base, schema, [file(theirs)], [])
    assert table.snapshot().files == after.files


def test_two_tables_made_at_once_are_one(tmp_path) -> None:
    barrier = threading.Barrier(4)
    outcomes = []

    def make(number: int) -> None:
        table = features_table(Location(str(tmp_path)))
        base = table.snapshot()
        path = f"mode=raw/shard=s{number}/x.parquet"
        (table.place / path).write_bytes(b"-")
        barrier.wait()
        try:
            table.commit(
                base, feature_schema(pa.string()), [LiveFile(path, 1, 1, {"mode": "raw", "shard": f"s{number}"})], []
            )
            outcomes.append(path)
        except StoreBusyError:
            pass

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(make, range(4)))
    assert len(outcomes) == 1
    assert list(features_table(Location(str(tmp_path))).snapshot().files) == outcomes


def test_the_lock_is_free_after_its_holder_died(tmp_path) -> None:
    code = (
        "import os, sys; from storage.location import Location; from storage.lock import store_lock\n"
        "with store_lock(Location(sys.argv[1]), 'reprocess'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with store_lock(Location(str(tmp_path)), "reprocess"):
        pass


def test_forgetting_waits_for_its_turn(release, person) -> None:
    store, _ = release
    with store_lock(Location(str(store)), "reprocess"), pytest.raises(StoreBusyError, match="held by another run"):
        forget(str(store), subject=person.subject)
    assert not (store / "tombstones.json").exists()


def test_forget_rollback_and_vacuum_at_once(release, person) -> None:
    """Each finishes or is refused. What is served in the end is whole and without the person."""
    store, first = release
    history = Releases(Location(str(store)))
    history.record(another(first, 2, "r00002-beef"), history.all())
    start, refusals = threading.Barrier(3), []

    def at_once(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except (StoreBusyError, SettingsError) as refusal:
            refusals.append(str(refusal))

    with ThreadPoolExecutor(3) as operators:
        operations = [
            lambda: forget(str(store), subject=person.subject, wait=120),
            lambda: clean(str(store), keep=1, wait=120),
            lambda: roll_back(str(store), first.release),
        ]
        for done in [operators.submit(at_once, work) for work in operations]:
            done.result()
    known = ("again", "removed by `frontalis vacuum`", "a person who was forgotten")
    assert all(any(why in refusal for why in known) for refusal in refusals), refusals
    forget(str(store), subject=person.subject)  # as a refused operator would
    serving = history.serving()
    assert not set(open_ids(history.store, serving.indexes["raw"])["subject"].to_pylist()) & {person.subject}
    for old in (first.release, "r00002-beef"):
        with pytest.raises(SettingsError):
            roll_back(str(store), old)
    clean(str(store), keep=1)
    checked = check(str(store))
    assert (checked.problems, checked.leftovers) == ([], [])
    assert not any(person.photograph.encode() in path.read_bytes() for path in store.rglob("*") if path.is_file())
