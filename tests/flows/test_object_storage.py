"""The whole job on S3 (moto's server on the loopback): source and store, repeated runs, kills, two writers, forgetting.

FRONTALIS_KILLS says how many runs are killed (2 by default; `make torture` 60), every second one a flow that a Prefect
server records.
"""

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from schemas.errors import FrontalisError, SettingsError, StoreBusyError, StoreError
from storage.features import features_table, read_table
from storage.location import Location
from storage.releases import Releases
from storage.shards import find_shards, still_same, stream_blocks
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer
from tests.commands import Forked, start

KILLS = int(os.environ.get("FRONTALIS_KILLS", "2"))
LONGEST = 120

pytestmark = pytest.mark.timeout(180 + 60 * KILLS)


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[dict[str, str]]:
    """An S3 of its own on a free port, and this process's environment pointing to it, as an operator would set it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "moto.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=file
        )
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            _wait_for(env["AWS_ENDPOINT_URL"], server, log)
            _make_bucket(env["AWS_ENDPOINT_URL"])
            yield {**env, "MOTO_PID": str(server.pid)}
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def shards(s3, plain_source) -> str:
    """The plain source on S3."""
    for file in plain_source.glob("*.parquet"):
        (Location("s3://faces/shards") / file.name).write_bytes(file.read_bytes())
    return "s3://faces/shards"


@pytest.fixture(scope="module")
def first_run(run_pipeline, shards) -> str:
    """A store with one release."""
    outcome = run_pipeline(shards, "s3://faces/store")
    assert (outcome.status, outcome.shards_computed) == ("promoted", 3)
    return "s3://faces/store"


@pytest.fixture
def store(first_run, request) -> str:
    """A copy of that store, for one test."""
    name = f"s3://faces/copy-{abs(hash(request.node.nodeid))}"
    for entry in Location(first_run).files(hidden=True):
        (Location(first_run) / entry.name).copy_to(Location(name) / entry.name)
    return name


def names(store: str) -> set[str]:
    return {entry.name for entry in Location(store).files(hidden=True)}


def features(store: str) -> dict[str, bytes]:
    table = features_table(Location(store))
    return {path: (table.place / path).read_bytes() for path in table.snapshot().files}


def test_the_store_is_the_one_that_a_local_disk_gets(first_run, run_pipeline, plain_source, tmp_path) -> None:
    run_pipeline(plain_source, tmp_path / "store")
    assert features(first_run) == features(str(tmp_path / "store"))
    checked = check(first_run)
    assert (checked.problems, checked.leftovers) == ([], [])


def test_other_tools_read_it(first_run, s3) -> None:
    options = {**Location(first_run).delta_options, "aws_region": s3["AWS_REGION"]}
    frame = pl.scan_delta(f"{first_run}/features", storage_options=options).collect()
    assert frame.group_by("mode").len()["len"].n_unique() == 1
    assert set(frame["mode"]) == {"raw", "per_sample", "batch_stat"}


def test_a_delta_table_and_hive_folders_are_sources(s3, tiny_source) -> None:
    rows = pq.read_table(tiny_source, columns=["id", "pose"])
    for source in ("s3://faces/table", "s3://faces/hive"):
        place = Location(source)
        write_deltalake(place.uri, rows, partition_by=["pose"], storage_options=place.delta_options)
        DeltaTable(place.uri, storage_options=place.delta_options).delete("pose = 'profile'")
    (Location("s3://faces/hive") / "_delta_log").delete()  # what is left is a hive folder with all of its files
    for source, poses in (("s3://faces/table", {"frontal"}), ("s3://faces/hive", {"frontal", "profile"})):
        found = [block for shard in find_shards(Location(source)) for _, block in stream_blocks(shard, ["pose"], 4096)]
        assert set(pa.Table.from_batches(found)["pose"].to_pylist()) == poses
    shards = find_shards(Location("s3://faces/table"))
    assert [(shard.version, still_same(shard)) for shard in shards] == [(1, True)] * len(shards)
    for refused in ("s3://faces/table/pose=frontal", "s3://faces"):
        with pytest.raises(SettingsError, match="pass the table"):
            find_shards(Location(refused))


def test_a_query_is_answered(first_run, shards) -> None:
    first = features_table(Location(first_run))
    some = read_table(first, list(first.snapshot().files.values())[:1], ["id"])["id"][0].as_py()
    found = answer(first_run, "per_sample", ids=[some], k=5)
    assert len(found.results[0].neighbours) == 5


def test_a_second_run_opens_nothing_and_a_changed_shard_is_computed(run_pipeline, store, shards) -> None:
    assert run_pipeline(shards, store).status == "unchanged"
    before = names(store)
    source = f"{store}-shards"
    for entry in Location(shards).files():
        table = pq.ParquetFile(pa.BufferReader((Location(shards) / entry.name).read_bytes())).read()
        changed = table.slice(1) if entry.name == "part-001.parquet" else table
        sink = pa.BufferOutputStream()
        pq.write_table(changed, sink)
        content = sink.getvalue().to_pybytes() if entry.name == "part-001.parquet" else None
        (Location(source) / entry.name).write_bytes(content or (Location(shards) / entry.name).read_bytes())
    outcome = run_pipeline(source, store)
    assert (outcome.status, outcome.shards_computed) == ("promoted", 1)
    assert len({name for name in names(store) - before if name.startswith("features/mode=")}) == 3


def test_of_two_runs_at_once_one_wins(prefect_server, tiny_models, shards, s3) -> None:
    store = "s3://faces/two"
    runs = [_start(shards, store, tiny_models.arguments, prefect_server.env, s3) for _ in range(2)]
    ended = [(run.communicate(timeout=LONGEST)[1], run.returncode) for run in runs]
    assert [code for _, code in ended].count(0) >= 1
    for stderr, code in ended:
        assert code == 0 or (code == 3 and "run again" in stderr.lower()), stderr
        assert "Traceback" not in stderr
    assert [release.number for release in Releases(Location(store)).all()] == [1]
    assert check(store).problems == []


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_is_carried_on(store, shards, prefect_server, make_checkpoint, tmp_path, s3, number) -> None:
    """New models, so that everything is computed again; killed when a random number of objects has appeared."""
    chance = random.Random(f"s3-{number}")
    models = []
    for mode in ("per_sample", "batch_stat"):
        models += ["--model", f"{mode}={make_checkpoint(tmp_path / f'{mode}.safetensors', mode, seed=9)}"]
    before, served = names(store), Releases(Location(store)).serving()
    undisturbed = 30  # about so many objects appear in a whole run
    wanted = chance.randint(1, undisturbed)
    env = prefect_server.env if number % 2 else dict(os.environ)
    run = _start(shards, store, models, env, s3)
    deadline = time.monotonic() + LONGEST
    while run.poll() is None and len(names(store) - before) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # each look costs the S3 server some time
    run.kill_group()

    appeared = names(store) - before
    for name in appeared:
        if name.endswith(".parquet"):
            content = (Location(store) / name).read_bytes()
            assert content[:4] == content[-4:] == b"PAR1", "an object is visible whole or not at all"
    now = Releases(Location(store)).serving()
    assert now.release == served.release or now.number == served.number + 1
    done = {name: _change(store, name) for name in appeared if name.startswith("features/mode=")}
    again = _start(shards, store, models, env, s3)
    stderr = again.communicate(timeout=LONGEST)[1]
    assert again.returncode == 0, stderr
    assert {name: _change(store, name) for name in done} == done, "what was complete must not be written again"
    assert Releases(Location(store)).serving().number == 2
    clean(store, grace_hours=0)
    checked = check(store)
    assert (checked.problems, checked.leftovers) == ([], [])


def test_forgetting_and_vacuum(run_pipeline, store, shards) -> None:
    table = features_table(Location(store))
    some = read_table(table, list(table.snapshot().files.values())[:1], ["id"])["id"][3].as_py()
    done = forget(store, id_=some)
    assert done.rows == 1
    waiting = clean(store)
    assert waiting.files == []
    assert waiting.waiting > 0, "without a lock young files are left"
    clean(store, grace_hours=0)
    assert check(store).problems == []
    for name in names(store):
        assert str(some).encode() not in (Location(store) / name).read_bytes(), name
    assert run_pipeline(shards, store).status == "unchanged"
    with pytest.raises(SettingsError, match="forgotten"):
        roll_back(store, done.erased_releases[0])


def test_a_run_that_began_before_somebody_was_forgotten_cannot_bring_them_back(store) -> None:
    """Without a lock a run may read the history, lose time, and record after `forget`."""
    history = Releases(Location(store))
    seen = history.all()
    table = features_table(Location(store))
    some = read_table(table, list(table.snapshot().files.values())[:1], ["id"])["id"][3].as_py()
    forget(store, id_=some)
    late = seen[0].model_copy(update={"release": "r00002-late", "number": 2})
    with pytest.raises(StoreBusyError, match="changed the releases"):
        history.record(late, seen)


def test_two_histories_written_at_once_are_one(store) -> None:
    first = Releases(Location(store)).all()
    barrier = threading.Barrier(4)
    won = []

    def record(number: int) -> None:
        history = Releases(Location(store))
        release = first[0].model_copy(update={"release": f"r00002-{number}", "number": 2})
        barrier.wait()
        with contextlib.suppress(StoreBusyError):
            history.record(release, first)
            won.append(number)

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert [release.release for release in Releases(Location(store)).all()][1:] == [f"r00002-{won[0]}"]


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/store", "s3://faces/nothing-here"])
def test_what_is_not_there_is_said_in_one_line(s3, uri) -> None:
    with pytest.raises(FrontalisError, match=uri):
        check(uri)


UPLOAD = """
import signal, sys
from frontalis.process import Command
from storage.location import Location
signal.signal(signal.SIGINT, Command().on_signal)
with Location("s3://faces/interrupted").writing() as file:
    file.write(b"x" * int(sys.argv[1]))
    print("gathered", flush=True)
"""


def test_an_upload_that_is_interrupted_is_whole_or_absent(s3) -> None:
    """Ctrl-C while the upload begins: closing a stream, as unwinding does, completes it with what has arrived."""
    size = 16 << 20
    command = [sys.executable, "-c", UPLOAD, str(size)]
    moto = int(s3["MOTO_PID"])
    with subprocess.Popen(
        command, env={**os.environ, **s3}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as upload:
        assert upload.stdout is not None
        os.kill(moto, signal.SIGSTOP)  # it answers only once the signal is there
        try:
            assert upload.stdout.readline() == b"gathered\n"
            time.sleep(1)
            upload.send_signal(signal.SIGINT)
            time.sleep(0.2)
        finally:
            os.kill(moto, signal.SIGCONT)
        assert upload.wait(LONGEST) != 0
    assert Location("s3://faces/interrupted").size() in (None, size)


def test_what_is_written_is_there_and_nothing_beside_it(s3) -> None:
    place = Location("s3://faces/written")
    for name, content in (("empty", b""), ("deep/small", b"abc"), ("large", bytes(range(256)) * 50_000)):
        (place / name).write_bytes(content)
        assert (place / name).read_bytes() == content
    assert [entry.name for entry in place.files(hidden=True)] == ["deep/small", "empty", "large"]


def test_a_temporary_folder_without_room_is_named(s3, full_disk) -> None:
    with full_disk(1 << 20), pytest.raises(StoreError, match=r"s3://faces/full: File too large.*\(TMPDIR\)"):
        Location("s3://faces/full").write_bytes(b"x" * (2 << 20))
    assert not Location("s3://faces/full").exists()


@pytest.fixture
def full_disk():
    """`full_disk(size)`: no file of this process grows beyond `size` while the block runs."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def _start(source: str, store: str, models: list[str], env, s3) -> Forked:
    return start("reprocess", "--source", source, "--store", store, *models, env={**env, **s3})


def _change(store: str, name: str) -> int:
    entry = (Location(store) / name).entry()
    assert entry is not None
    return entry.mtime_ns


def _make_bucket(endpoint: str) -> None:
    request = urllib.request.Request(f"{endpoint}/faces", method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answered:
        assert answered.status == 200


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"moto did not start:\n{log.read_text()[-2000:]}")
