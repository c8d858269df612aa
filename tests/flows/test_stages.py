"""Stages: trouble that may pass is tried again, a refusal or a defect is not."""

import asyncio
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Completed, Crashed, Failed

from flows import stages
from schemas.errors import BadShardError, SettingsError, StoreBusyError, StoreError
from tasks.evaluate import evaluate
from tasks.plan import make_plan
from tasks.publish import publish


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StoreError("s3://faces: Slow Down"), True),
        (OSError(5, "Input/output error"), True),
        (ConnectionResetError("peer"), True),
        (StoreBusyError("another run committed first"), False),
        (BadShardError("shard a: truncated"), False),
        (SettingsError("no such mode"), False),
        (KeyError("a defect"), False),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", [Failed, Crashed])
def test_only_trouble_that_is_transient_is_tried_again(kind: Any, error: BaseException, again: bool) -> None:
    assert asyncio.run(stages.is_transient(stages.TASKS[make_plan], None, kind(data=error))) is again


def test_what_ended_well_is_not_tried_again() -> None:
    assert asyncio.run(stages.is_transient(stages.TASKS[make_plan], None, Completed(data=3))) is False


@pytest.fixture
def run_stage(prefect_server, monkeypatch: pytest.MonkeyPatch):
    """`run_stage(task, work)` runs a stage of the pipeline with other work in a flow of its own, without waiting."""

    def run(task, work):
        quick = task.with_options(retry_delay_seconds=0)
        monkeypatch.setattr(quick, "fn", work)

        @flow(name="stage-alone")
        def alone() -> object:
            return quick()

        with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
            return alone()

    return run


def failing(errors: list[BaseException]):
    """Work that raises one error a call, and returns 'done' when none is left."""
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    work.left = left
    return work


def test_reweighting_survives_two_failures_of_the_store(run_stage) -> None:
    work = failing([StoreError("one"), OSError("two")])
    assert run_stage(stages.reweight_task, work) == "done"
    work = failing([StoreError("one"), StoreError("two"), StoreError("three"), StoreError("four")])
    with pytest.raises(StoreError, match="three"):
        run_stage(stages.reweight_task, work)
    assert len(work.left) == 1


def test_bad_input_is_worked_on_once(run_stage) -> None:
    work = failing([BadShardError("shard a: truncated"), StoreError("never reached")])
    with pytest.raises(BadShardError, match="shard a: truncated"):
        run_stage(stages.reweight_task, work)
    assert len(work.left) == 1


@pytest.mark.parametrize("stage", [publish, make_plan])
def test_a_commit_and_a_plan_are_never_done_twice(run_stage, stage) -> None:
    work = failing([StoreError("the commit failed"), StoreError("never reached")])
    with pytest.raises(StoreError, match="the commit failed"):
        run_stage(stages.TASKS[stage], work)
    assert len(work.left) == 1


def test_a_stage_is_worked_on_again_with_the_same_arguments(run_stage) -> None:
    calls: list[int] = []
    for _ in range(2):
        run_stage(stages.TASKS[evaluate], lambda: calls.append(1))
    assert len(calls) == 2
