"""Roll back, forget, vacuum and verify as Prefect flows: the same work, and nobody's name in Prefect's database."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.forget import forget
from flows.rollback import rollback
from flows.vacuum import vacuum
from flows.verify import verify
from schemas.errors import SettingsError
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.targets import Target, read_targets


@pytest.fixture(scope="module", autouse=True)
def _server(prefect_server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


def test_each_flow_does_its_work_and_the_name_stays_in_the_file(published, person, tmp_path, caplog) -> None:
    store = str(published())
    names = tmp_path / "names.jsonl"
    names.write_text(json.dumps({"subject": person.subject}) + "\n\n" + json.dumps({"id": "extra-1"}) + "\n")

    with caplog.at_level(logging.DEBUG):
        state = forget(store, str(names), return_state=True)
    forgotten = state.result()
    assert (forgotten.kind, forgotten.rows) == ("list", person.rows + 1)
    assert Releases.of(Location(store)).serving().release == forgotten.release
    assert not vacuum(store).dry_run
    assert verify(store).problems == []
    assert rollback(store, forgotten.release).serving

    with get_client(sync_client=True) as client:
        run = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        )[0]
    assert run.parameters == {
        "store": store,
        "file": str(names),
        "wait": 0.0,
        "ignore_case": False,
        "in_advance": False,
    }
    assert person.subject not in run.model_dump_json()
    assert person.subject not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists nobody"),
        ("ada", "line 1: write"),
        ('{"subject": "ada"}\n{"name": "ada"}', "line 2: write"),
        ('{"subject": ""}', "line 1: write"),
        ('{"subject": 7}', "line 1: write"),
        ('{"subject": "ada", "id": "x"}', "line 1: write"),
        ('["ada"]', "line 1: write"),
    ],
)
def test_a_list_of_another_form_is_refused_without_a_name(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "names.jsonl"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message) as refused:
        read_targets(str(file))
    assert "ada" not in str(refused.value).replace(str(file), "")


def test_a_list_names_subjects_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "names.jsonl"
    file.write_text('{"subject": "Ada Lovelace"}\n\n{"id": 17}\n')
    assert read_targets(str(file)) == [Target("subject", "Ada Lovelace"), Target("id", "17")]
    with pytest.raises(SettingsError, match="no such file"):
        read_targets(str(tmp_path / "none"))
