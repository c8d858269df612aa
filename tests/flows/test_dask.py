"""Dask in place of threads: a real scheduler and workers make the same files, and what cannot work is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.runner import check_runner
from schemas.errors import SettingsError
from schemas.settings import RunnerSettings
from tasks.synthetic.shards import synthesize
from tests.commands import frontalis

pytestmark = pytest.mark.timeout(600)  # seven runs of the whole job in processes of their own

DASK = [sys.executable, "-m", "dask"]


@pytest.fixture(scope="module")
def cluster(prefect_server, tmp_path_factory) -> Iterator[str]:
    """`dask scheduler` and two `dask worker` processes, as an operator starts them; gives the scheduler's address."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    own = {"env": prefect_server.env, "cwd": folder, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with (folder / "log").open("wb") as log:
        processes = [
            subprocess.Popen(
                [*DASK, *words, "--scheduler-file", str(file), "--dashboard-address", "127.0.0.1:0"],
                stdout=log,
                stderr=log,
                **own,
            )
            for words in (
                ["scheduler", "--host", "127.0.0.1", "--port", "0"],
                ["worker", "--host", "127.0.0.1", "--nworkers", "2", "--nthreads", "1"],
            )
        ]
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def by_threads(run_pipeline, tmp_path_factory, tiny_source) -> dict[str, str]:
    """The feature files that this process makes, by name."""
    folder = tmp_path_factory.mktemp("threads")
    run_pipeline(tiny_source, folder / "store", reweight={"group_rows": 1})
    files = feature_files(folder)
    assert len(files) == 9, "three shards in three modes"
    return files


def test_workers_of_a_cluster_make_the_same_files(
    prefect_server, cluster, by_threads, tmp_path, tiny_source, tiny_models
) -> None:
    runner = {"kind": "dask", "address": cluster}
    done = reprocess(prefect_server.env, tmp_path, tiny_source, tiny_models, runner)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["status"], outcome["shards_computed"]) == ("promoted", 3)
    assert feature_files(tmp_path) == by_threads


def test_a_cluster_started_for_the_run_makes_the_same_files(
    prefect_server, by_threads, tmp_path, tiny_source, tiny_models
) -> None:
    done = reprocess(prefect_server.env, tmp_path, tiny_source, tiny_models, {"kind": "dask", "workers": 2})
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert feature_files(tmp_path) == by_threads


def test_a_bad_row_that_shall_fail_the_run_is_named_by_the_run_too(
    prefect_server, cluster, tmp_path, tiny_models
) -> None:
    synthesize(tmp_path / "bad", subjects=20, per_subject=14, dim=32, shards=3, seed=11, bad_rows=1)
    runner = {"kind": "dask", "address": cluster}
    done = reprocess(prefect_server.env, tmp_path, tmp_path / "bad", tiny_models, runner, on_bad_rows="fail")
    assert done.returncode == 2, done.stderr
    assert "not_finite; fix it" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "store" / "releases").exists()


def test_without_a_prefect_server_for_all_workers_it_is_refused(tmp_path, tiny_source, tiny_models) -> None:
    done = reprocess(os.environ, tmp_path, tiny_source, tiny_models, {"kind": "dask", "workers": 2})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("frontalis: runner dask: PREFECT_API_URL is not set")
    assert not (tmp_path / "store").exists()


def test_without_the_extra_it_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("flows.runner.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"runner dask: prefect-dask is not installed; .*'\.\[dask\]'\.$"):
        check_runner(RunnerSettings(kind="dask"))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x"])
def test_a_scheduler_that_does_not_answer_is_refused(monkeypatch, address) -> None:
    monkeypatch.setattr("flows.runner.CONNECT_SECONDS", 2)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(SettingsError, match=f"^runner.address {address}: no Dask scheduler answers"),
    ):
        check_runner(RunnerSettings(kind="dask", address=address))


def reprocess(
    env: Any, folder: Path, source: Path, models: Any, runner: dict[str, object], on_bad_rows: str = "quarantine"
) -> subprocess.CompletedProcess[str]:
    """Run `frontalis reprocess` from `source` into `folder`/store, one shard a task, on a runner."""
    written = "\n".join(f"{key} = {json.dumps(value)}" for key, value in runner.items())
    named = "\n".join(f"{mode} = {json.dumps(path)}" for mode, path in models.by_mode.items())
    config = folder / "pipeline.toml"
    config.write_text(
        f'source = {json.dumps(str(source))}\nstore = "store"\n[models]\n{named}\n[runner]\n{written}\n'
        f'[reweight]\ngroup_rows = 1\non_bad_rows = "{on_bad_rows}"\n[evaluation]\nresamples = 0\n'
        '[gate]\ntolerance = 1.0\nundecided = "promote"\n'  # on seven subjects it would judge by chance
    )
    return frontalis("reprocess", "--config", config, "--json", env=env, timeout=500)


def feature_files(folder: Path) -> dict[str, str]:
    features = folder / "store" / "features"
    return {
        str(file.relative_to(features)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in features.glob("mode=*/**/*.parquet")
    }
