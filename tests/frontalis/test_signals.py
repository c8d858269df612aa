"""Ctrl-C and SIGTERM, sent to real processes: they end soon, keep what is complete, and say so."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontalis.app import kept_by
from frontalis.cli import app
from models.checkpoint import load
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from tasks.synthetic.shards import synthesize
from tasks.training.stop import StopSignals
from tests.commands import frontalis, start

pytestmark = pytest.mark.e2e
WITHOUT_PREFECT = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
IN_COMPILED_CODE = """
import hashlib, sys, typer
from frontalis.process import run
app = typer.Typer()
@app.command()
def command() -> None:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", {rounds})
sys.argv = ["frontalis"]
sys.exit(run(app))
"""
WAITS_FOR_A_DISK = """
import sys, typer
from frontalis.process import run
app = typer.Typer()
@app.command()
def command() -> None:
    print("ready", flush=True)
    open("{path}")
sys.argv = ["frontalis"]
sys.exit(run(app))
"""
HANGS_WHILE_STOPPING = """
import subprocess, sys, time, typer
from frontalis.process import run
app = typer.Typer()
@app.command()
def command() -> None:
    child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        print("stopping", flush=True)
        time.sleep(600)
sys.argv = ["frontalis"]
sys.exit(run(app))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_checkpoint) -> Path:
    """A source that keeps two cores busy for some seconds: few shards, many blocks."""
    folder = tmp_path_factory.mktemp("interrupt")
    synthesize(folder / "shards", subjects=600, per_subject=40, dim=256, shards=2, seed=1)
    synthesize(folder / "few", subjects=60, per_subject=14, dim=32, shards=1, seed=1)  # to train on
    for mode in ("per_sample", "batch_stat"):
        make_checkpoint(folder / f"{mode}.safetensors", mode, dim=256)
    (folder / "pipeline.toml").write_text(
        'source = "shards"\nstore = "store"\n[evaluation]\nresamples = 0\nmax_rows = 1000\n'
        "[gate]\ntolerance = 1.0\n[models]\n"
        'per_sample = "per_sample.safetensors"\nbatch_stat = "batch_stat.safetensors"\n'
    )
    return folder


def test_a_run_that_computes_stops_and_the_next_one_finishes(prefect_server, work, tmp_path) -> None:
    store = work / "store"
    for number in (signal.SIGINT, signal.SIGTERM):
        said = interrupted_while_computing(prefect_server, work, number)
        assert said.splitlines()[-1] == (
            "frontalis: interrupted; complete files are kept; run the same command again to continue"
        )
        assert "rows are done and kept" in said
        assert "Traceback" not in said
        assert not list(store.glob("**/.tmp-*")), "temporary files are cleared away"
        assert Releases(Location(str(store))).all() == []
        shutil.rmtree(store / "features")  # or the second would find the work done

    again = frontalis("reprocess", "--config", work / "pipeline.toml", env=prefect_server.env)
    assert again.returncode == 0, again.stderr
    (release,) = Releases(Location(str(store))).all()
    assert release.serving
    assert release.data.rows_features == 600 * 40


def interrupted_while_computing(prefect_server, work: Path, number: int) -> str:
    """Start a run, send the signal once it writes features, and return what it said on stderr."""
    with start("reprocess", "--config", work / "pipeline.toml", env=prefect_server.env) as run:
        wait_for(lambda: list(work.glob("store/features/**/.tmp-*")) or run.poll() is not None)
        assert run.poll() is None, "the run was over before it could be interrupted"
        run.send_signal(number)
        printed, said = run.communicate(timeout=60)
    assert (run.returncode, printed) == (128 + number, ""), said
    return said


@pytest.mark.parametrize(("number", "as_flow"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_training_keeps_the_best_so_far(prefect_server, work, tmp_path, number, as_flow) -> None:
    model = tmp_path / "model.safetensors"
    words = ("train", work / "few", "--out", model, "--steps", 100_000)
    env = prefect_server.env if as_flow else WITHOUT_PREFECT
    with start(*words, env=env) as run:
        wait_for(lambda: "step 40" in run.stderr.read_text() or run.poll() is not None)
        assert run.poll() is None, run.stderr.read_text()
        os.killpg(run.pid, number)
        _, said = run.communicate(90)
        assert run.returncode == 128 + number, said
        assert said.splitlines()[-1] == f"frontalis: interrupted; {model} is the best model so far"
        assert "Traceback" not in said
        assert load(model.read_bytes()).card.embedding_dim == 32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_that_has_not_begun_writes_nothing(work, tmp_path, number) -> None:
    model = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "frontalis", "train", str(work / "shards"), "--out", str(model)]
    with subprocess.Popen(command, env=WITHOUT_PREFECT, stderr=subprocess.PIPE, text=True) as run:
        try:
            wait_for(lambda: "libtorch" in Path(f"/proc/{run.pid}/maps").read_text())  # libraries are being loaded
            run.send_signal(number)
            _, said = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 128 + number, said
    assert said.splitlines()[-1] == "frontalis: interrupted; no checkpoint was written"
    assert "Traceback" not in said
    assert not model.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [["forget", "--subject", "ada"], ["vacuum"]])
def test_commands_without_a_flow_say_what_is_left(tmp_path, words, number) -> None:
    store = Location(str(tmp_path / "store"))
    with store_lock(store, "test"), start(*words, "--store", store.uri, "--wait", 600, env=WITHOUT_PREFECT) as run:
        wait_for(lambda: "\n" in run.stderr.read_text() or run.poll() is not None)
        run.send_signal(number)
        assert run.wait(60) == 128 + number, run.stderr.read_text()
    waits, said = run.stderr.read_text().splitlines()
    assert f" I {store.uri}: waiting up to 600 s for test, process {os.getpid()} on " in waits
    assert said == f"frontalis: interrupted; {kept_by[words[0]]}"


def test_a_command_that_waits_for_its_disk_is_ended(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes into it, so opening it waits as a disk that is gone
    with python(WAITS_FOR_A_DISK.format(path=tmp_path / "pipe")) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.5)  # until the call has begun
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert run.stderr.read() == "frontalis: interrupted; nothing was changed\n"


def test_every_command_says_what_an_interrupt_leaves() -> None:
    typed = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(kept_by) == typed


def test_a_signal_in_a_long_compiled_call_is_noticed_when_the_call_returns() -> None:
    with python(IN_COMPILED_CODE.format(rounds=5_000_000)) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.5)  # until the call has begun
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert run.stderr.read() == "frontalis: interrupted; nothing was changed\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_that_does_not_stop_and_its_children(number) -> None:
    with python(HANGS_WHILE_STOPPING) as run:
        child = int(run.stdout.readline())
        run.send_signal(number)
        assert run.stdout.readline() == "stopping\n"
        run.send_signal(number)
        assert run.wait(20) == 128 + number
        assert run.stderr.read() == ""
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 20)


@contextlib.contextmanager
def python(code: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def test_once_training_asks_whether_to_stop_a_signal_is_an_answer_and_raises_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals()
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop()
    assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def wait_for(happened, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
