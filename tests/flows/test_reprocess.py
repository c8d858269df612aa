"""The whole job as a Prefect flow: its state says what came out, its artifacts show it."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import State

from flows.evaluate import evaluate
from flows.reprocess import reprocess
from schemas.errors import SettingsError
from tasks.outcome import CompletedWithBadShardsError
from tests.pipeline_fixtures import MILD_GATE


@pytest.fixture(scope="module", autouse=True)
def _server(prefect_server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


@pytest.fixture
def flow_run(pipeline_of, tiny_source, tmp_path):
    """`flow_run(**settings)` runs the flow over a copy of the tiny source into one store and returns its state."""
    shutil.copytree(tiny_source, tmp_path / "source")

    def run(**settings: object) -> State[Any]:
        chosen = pipeline_of(tmp_path / "source", tmp_path / "store", **settings)
        return reprocess(settings=chosen, return_state=True)

    return run


def test_prefect_shows_the_outcome_the_table_of_modes_and_the_report(
    flow_run, tiny_models, make_checkpoint, tmp_path
) -> None:
    done = flow_run()
    assert done.name == "Completed"
    outcome = done.result()
    assert done.message == f"promoted: {outcome.reason}"
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
        stages = client.request("POST", "/task_runs/filter", json={}).json()
    by_key = {artifact["key"]: artifact for artifact in found}
    assert "per_sample" in by_key["frontalis-modes"]["data"]
    assert f"{outcome.release}\n\npromoted: {outcome.reason}" in by_key["frontalis-modes"]["data"]
    assert outcome.report in by_key["frontalis-report"]["data"]
    costs = outcome.stages
    assert [one.stage for one in costs] == [
        *("plan", "reweight", "publish", "index raw", "index per_sample", "index batch_stat", "evaluate", "report")
    ]
    assert [one.rows for one in costs[:2]] == [280, 280]
    assert all(f"| {one.stage.replace('_', chr(92) + '_')} |" in by_key["frontalis-stages"]["data"] for one in costs)
    with get_client(sync_client=True) as client:
        runs = client.request(
            "POST", "/flow_runs/filter", json={"flow_runs": {"name": {"like_": "reprocess 20"}}}
        ).json()  # other tests' runs are on this server, too
    assert runs
    assert all(re.fullmatch(r"reprocess \d{4}-\d\d-\d\d \d\d:\d\d", run["name"]) for run in runs)
    names = {stage["name"] for stage in stages}
    assert names >= {"models", "plan", "reweight-0001-of-0003", "publish", "index-raw", "index-per_sample", "evaluate"}

    again = evaluate(str(tmp_path / "store"), resamples=0)
    assert again.populations["held_out"].modes == outcome.evaluation.populations["held_out"].modes

    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    models = {**tiny_models.by_mode, "per_sample": str(ruined)}
    rejected = flow_run(models=models, evaluation={"resamples": 100}, gate={"cell": "all"})
    assert (rejected.type.value, rejected.name) == ("COMPLETED", "Rejected")
    assert rejected.message == f"rejected: {rejected.result().reason}"


def test_bad_shards_fail_the_flow_run_after_the_work_is_done(flow_run, tmp_path) -> None:
    (tmp_path / "source/part-999.parquet").write_bytes(b"PAR1 nothing")
    failed = flow_run(gate=MILD_GATE)
    assert (failed.type.value, failed.name) == ("FAILED", "CompletedWithBadShards")
    error = failed.result(raise_on_failure=False)
    assert isinstance(error, CompletedWithBadShardsError)
    assert error.outcome.status == "promoted"
    assert failed.message == str(error)


def test_settings_come_from_a_file_unless_they_are_given(pipeline_of, tmp_path) -> None:
    settings = pipeline_of(tmp_path, tmp_path)
    with pytest.raises(SettingsError, match="pass config"):
        reprocess()
    with pytest.raises(SettingsError) as refused:  # that the store is inside the source
        reprocess(config="x.toml", settings=settings)
    assert "x.toml" not in str(refused.value)
