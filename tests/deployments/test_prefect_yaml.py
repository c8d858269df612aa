"""The deployments: what `prefect.yaml` and the example settings say, and that an operator's commands make it run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from schemas.settings import PipelineSettings, load_pipeline
from storage.location import Location
from storage.releases import Releases

ROOT = Path(__file__).parents[2]
PREFECT_FILE = ROOT / "deployments" / "prefect.yaml"
EXAMPLE = ROOT / "deployments" / "pipeline.example.toml"
DEPLOYMENTS = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
NAMES = {
    "reprocess/nightly", "train/per-sample", "train/batch-stat", "evaluate/on-demand", "query/batch",
    "vacuum/weekly", "verify/weekly", "forget/from-file", "rollback/on-demand",
}  # fmt: skip
PREFECT = [sys.executable, "-m", "prefect"]
COMMAND_SECONDS = 170


@pytest.fixture
def in_checkout(monkeypatch) -> None:
    """Entry points are relative to the root of the checkout, where the operator stands."""
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("in_checkout")
@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["name"])
def test_each_deployment_names_a_flow_and_parameters_that_it_has(deployment) -> None:
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert f"{flow.name}/{deployment['name']}" in NAMES
    schema = parameter_schema(flow)
    assert deployment.get("parameters", {}).keys() <= schema.properties.keys()
    named_in_description = set(re.findall(r"--param (\w+)=", deployment["description"]))
    assert named_in_description <= schema.properties.keys()
    missing = set(schema.required or []) - deployment.get("parameters", {}).keys()
    assert missing <= named_in_description, "what must be passed by hand is named in the description"
    unexplained = [name for name, one in schema.properties.items() if not one.get("description")]
    assert not unexplained, "the form of a custom run says what each parameter is"


def test_what_is_scheduled_and_that_the_nightly_run_is_never_beside_itself() -> None:
    flow_of = {one["entrypoint"].split(":")[1]: one for one in DEPLOYMENTS if one.get("schedules")}
    crons = {flow: [schedule["cron"] for schedule in one["schedules"]] for flow, one in flow_of.items()}
    assert crons == {"reprocess": ["0 2 * * *"], "vacuum": ["0 6 * * 0"], "verify": ["0 12 * * 0"]}
    assert flow_of["reprocess"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_example_settings_load_as_they_are() -> None:
    settings = load_pipeline(str(EXAMPLE))
    assert settings == PipelineSettings(source=settings.source, store=settings.store, models=settings.models)


def test_example_settings_show_every_setting_with_its_default(tmp_path) -> None:
    shown = re.sub(r"^# (\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    content = tomllib.loads(shown)
    assert every_key(content) == every_key(PipelineSettings.model_json_schema()) | {
        "models.per_sample",
        "models.batch_stat",
    }
    without_default = {"evaluation.pairs", "runner.workers", "runner.address", "index.nprobe", "index.ef_search"}
    without_default |= {"retention.min_age_hours"}  # None there: it follows the kind of storage
    without_default |= {"report.base_url"}
    without_default |= {"gate.guards"}  # None there: its tolerance follows that of the gate
    file = tmp_path / "pipeline.toml"
    file.write_text(shown)
    full, bare = (flat(load_pipeline(str(path)).model_dump()) for path in (file, EXAMPLE))
    assert {key for key in full if full[key] != bare[key]} == without_default


def every_key(content: dict[str, Any]) -> set[str]:
    """Return the dotted names of TOML content, or of a JSON schema of settings with one level of sections."""
    if "$defs" not in content:
        return set(flat(content))
    keys = set()
    for name, field in content["properties"].items():
        section = content["$defs"].get(str(field.get("$ref", "")).removeprefix("#/$defs/"), {}).get("properties")
        keys |= {f"{name}.{key}" for key in section} if section else {name}
    return keys - {"models"}


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.fixture(scope="module")
def operator(prefect_server) -> Iterator[Any]:
    """What an operator does once: a work pool, the deployments, a worker. Gives `operator(*words)` to type more."""

    def type_(*words: object, code: int = 0) -> str:
        done = subprocess.run(
            [*PREFECT, *map(str, words)],
            cwd=ROOT,
            env=prefect_server.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == code, f"prefect {words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    type_("work-pool", "create", "--type", "process", "frontalis")
    type_("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    log = prefect_server.log.with_name("worker.log")
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [*PREFECT, "worker", "start", "--pool", "frontalis"],
            cwd=prefect_server.log.parent,  # not the checkout: the pull step has to go there
            env={**prefect_server.env, "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_LEVEL": "INFO"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield type_
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


@pytest.fixture
def pipeline(tmp_path, tiny_source, tiny_models) -> Path:
    """A `pipeline.toml` over a copy of the tiny source, and an empty store."""
    shutil.copytree(tiny_source, tmp_path / "shards")
    models = "\n".join(f"{mode} = {json.dumps(path)}" for mode, path in tiny_models.by_mode.items())
    file = tmp_path / "pipeline.toml"
    file.write_text(f'source = "shards"\nstore = "store"\n[evaluation]\nresamples = 50\n[models]\n{models}\n')
    return file


@pytest.mark.timeout(600)
def test_an_operator_deploys_runs_and_schedules_the_nightly_job(operator, prefect_server, pipeline) -> None:
    listed = operator("deployment", "ls")
    assert all(name in listed for name in NAMES)

    printed = operator("deployment", "run", "reprocess/nightly", "--param", f"config={pipeline}", "--watch")
    assert "'Completed'" in printed
    (release,) = Releases(Location(str(pipeline.with_name("store")))).all()
    assert release.serving
    logged = logs_of(prefect_server, run_id(printed))
    assert any(line.startswith("plan: 3 shards to compute") for line in logged), "our progress is in Prefect's log"
    assert any(release.release in line for line in logged)

    future = poll(lambda: runs(prefect_server, "nightly", "SCHEDULED"))
    starts = sorted(run["next_scheduled_start_time"] for run in future)
    assert len(starts) >= 3
    assert all("T02:00:00" in start for start in starts)
    assert len(set(starts)) == len(starts)


@pytest.mark.timeout(600)
def test_a_run_with_a_bad_shard_ends_as_failed_in_prefect(operator, prefect_server, pipeline) -> None:
    (pipeline.with_name("shards") / "part-009.parquet").write_bytes(b"not Parquet")
    printed = operator("deployment", "run", "reprocess/nightly", "--param", f"config={pipeline}", "--watch", code=1)
    assert "'CompletedWithBadShards'" in printed
    state = get(prefect_server, f"/flow_runs/{run_id(printed)}")["state"]
    assert state["type"] == "FAILED"
    assert state["message"].startswith("completed with bad shards: part-009; r00001-")
    (release,) = Releases(Location(str(pipeline.with_name("store")))).all()
    assert release.serving, "the good shards are served all the same"


@pytest.mark.timeout(600)
def test_a_query_of_many_vectors_goes_to_a_file(operator, run_pipeline, tiny_source, tmp_path) -> None:
    run_pipeline(tiny_source, tmp_path / "store")
    out = tmp_path / "found.parquet"
    vectors = next(iter(sorted(tiny_source.glob("*.parquet"))))
    parameters = {"store": str(tmp_path / "store"), "vectors": str(vectors), "out": str(out), "k": 3}
    typed = [word for key, value in parameters.items() for word in ("--param", f"{key}={json.dumps(value)}")]
    operator("deployment", "run", "query/batch", *typed, "--watch")
    found = pl.read_parquet(out)
    assert found["query"].unique(maintain_order=True).to_list() == pl.read_parquet(vectors)["id"].to_list()
    assert found["rank"].to_list() == [1, 2, 3] * (len(found) // 3)
    first = found.filter(rank=1)
    assert (first["id"] == first["query"]).all(), "each row finds itself first"
    assert first["fmr"].is_not_null().all()


def run_id(printed: str) -> str:
    found = re.search(r"UUID: ([0-9a-f-]{36})", printed)
    assert found is not None, printed
    return found.group(1)


def get(server: Any, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def runs(server: Any, deployment: str, state: str) -> list[dict[str, Any]]:
    body = {
        "deployments": {"name": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": [state]}}},
    }
    return list(get(server, "/flow_runs/filter", body))


def logs_of(server: Any, flow_run: str) -> list[str]:
    """Return the log of a run; it is sent in batches, so the last lines may come a little later."""
    body = {"logs": {"flow_run_id": {"any_": [flow_run]}}}
    poll(lambda: [log for log in get(server, "/logs/filter", body) if "Finished in state" in log["message"]])
    return [log["message"] for log in get(server, "/logs/filter", body)]


def poll(ask: Any, seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)
    return answer
