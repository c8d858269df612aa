"""Ctrl-C and SIGTERM, sent to real processes: they end within seconds, keep what is complete, and say so."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.location import Location
from storage.releases import Releases
from tasks.synth import synthesize

IN_COMPILED_CODE = """
import hashlib, sys
from frontalis.interrupt import stops_within
with stops_within(1.0):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10**9)
"""
TWO_BLOCKS = """
import signal, time
from frontalis.interrupt import Interrupt, stops_within
before = signal.getsignal(signal.SIGTERM)
with stops_within(60):
    pass
assert signal.getsignal(signal.SIGTERM) is before
try:
    with stops_within(60):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
except Interrupt as interrupt:
    print("stopped", interrupt.exit_code)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_checkpoint) -> Path:
    """A source that keeps two cores busy for some seconds: few shards, many blocks."""
    folder = tmp_path_factory.mktemp("interrupt")
    synthesize(folder / "shards", subjects=600, per_subject=40, dim=256, shards=2, seed=1)
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
        told = interrupted_while_computing(prefect_server, work, number, tmp_path / "stderr")
        assert told.splitlines()[-1] == (
            "frontalis: interrupted; what is complete is kept; run the same command again to go on"
        )
        assert "rows are done and kept" in told
        assert "Traceback" not in told
        assert not list(store.glob("**/.tmp-*")), "temporary files are cleared away"
        assert Releases(Location(str(store))).all() == []
        shutil.rmtree(store / "features")  # or the second would find the work done

    command = [sys.executable, "-m", "frontalis", "reprocess", "--config", work / "pipeline.toml"]
    again = subprocess.run(command, env=prefect_server.env, capture_output=True, text=True, timeout=170, check=False)
    assert again.returncode == 0, again.stderr
    (release,) = Releases(Location(str(store))).all()
    assert release.serving
    assert release.data.rows_features == 600 * 40


def interrupted_while_computing(prefect_server, work: Path, number: int, errors: Path) -> str:
    """Start a run, send the signal once it writes features, and return what it told on stderr."""
    command = [sys.executable, "-m", "frontalis", "reprocess", "--config", work / "pipeline.toml"]
    with errors.open("wb") as file:
        run = subprocess.Popen(command, env=prefect_server.env, stdout=subprocess.PIPE, stderr=file)
    try:
        wait_for(lambda: list(work.glob("store/features/**/.tmp-*")) or run.poll() is not None)
        assert run.poll() is None, "the run was over before it could be interrupted"
        run.send_signal(number)
        printed, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + number, errors.read_text()
    assert printed == b""
    return errors.read_text()


def test_a_long_step_in_compiled_code_is_ended_after_the_grace(tmp_path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", IN_COMPILED_CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(1)  # until the step has begun
        os.kill(run.pid, signal.SIGTERM)
        _, told = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM
    assert "interrupted in the middle of a long step; what is complete is kept" in told


def test_handlers_are_put_back_and_the_block_raises() -> None:
    run = subprocess.run([sys.executable, "-c", TWO_BLOCKS], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"stopped {128 + signal.SIGTERM}\n", "")


def wait_for(happened, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
