"""The stages of a run as Prefect sees them; shard groups on threads of this process, or the workers of a Dask cluster.

The groups come from `tasks.plan`; the work on one is `tasks.reweight`. Both runners write the same files under
the same names, so the store does not depend on which one did the work, or on a change of runner.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

from prefect import flow
from prefect.futures import as_completed
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import opaque

from flows.stages import TASKS, Unvisited, reweight_task
from schemas.errors import SettingsError, first_line
from schemas.releases import ModelRef
from schemas.settings import PipelineSettings, RunnerSettings
from tasks.plan import Plan, ShardWork
from tasks.progress import Progress
from tasks.reweight import ReweightSpec, ShardResult, one_thread_each
from tasks.stages import NO_SERVER, Stages

CONNECT_SECONDS = 10
P = ParamSpec("P")
T = TypeVar("T")


def check_runner(runner: RunnerSettings) -> None:
    """Refuse a runner that cannot work, before anything is done.

    Raises:
        SettingsError: Dask that is not installed, without a Prefect server for all workers, or without a scheduler
            that answers.
    """
    if runner.kind != "dask":
        return
    if find_spec("prefect_dask") is None:
        raise SettingsError("runner dask: prefect-dask is not installed; install the extra: pip install -e '.[dask]'.")
    if not PREFECT_API_URL.value():
        raise SettingsError(NO_SERVER)
    if runner.address:
        from distributed import Client

        try:
            Client(runner.address, timeout=CONNECT_SECONDS, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"runner.address {runner.address}: no Dask scheduler answers ({first_line(error)}); start "
                "`dask scheduler`, or leave the address out for a cluster on this machine."
            ) from error


class PrefectStages(Stages):
    """The stages as Prefect tasks; shard groups on the runner of the settings."""

    def check(self, settings: PipelineSettings) -> None:
        """Refuse a runner that cannot work; see `check_runner`."""
        check_runner(settings.runner)

    def call(self, name: str, stage: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run the stage as the Prefect task that `flows.stages` makes of it."""
        unvisited = {key: opaque(value) for key, value in named.items()}
        result: T = TASKS[stage].with_options(task_run_name=name)(*map(opaque, arguments), **unvisited)
        return result

    def reweight(self, settings: PipelineSettings, plan: Plan, models: Mapping[str, ModelRef]) -> list[ShardResult]:
        """Reweight every group of the plan, one task a group.

        Raises:
            FrontalisError: as `tasks.reweight.reweight_group`; what is complete is kept.
        """
        workers = settings.runner.workers or os.cpu_count() or 1
        _job.set(_Job(plan.groups, ReweightSpec.of(settings, models, plan.schema)))
        run = _reweight_flow.with_options(task_runner=_task_runner(settings.runner, workers))
        with one_thread_each(workers if settings.runner.kind == "threads" else 1):
            return run()


@dataclass(frozen=True)
class _Job:
    groups: Sequence[Sequence[ShardWork]]
    spec: ReweightSpec


# Prefect sends a flow and its parameters to Dask with every one of its tasks. What only the flow needs is handed over
# here, and its function is importable under its own name, so that a task carries its own group and nothing else.
_job: ContextVar[_Job] = ContextVar("job")


def _reweight() -> list[ShardResult]:
    job = _job.get()
    progress, results = Progress(job.groups), list[ShardResult]()
    with progress.stopped_together():
        futures = {}
        for number, group in enumerate(job.groups):
            named = reweight_task.with_options(task_run_name=f"reweight-{number + 1:04d}-of-{len(job.groups):04d}")
            futures[named.submit(Unvisited(group), Unvisited(job.spec))] = group
        for future in as_completed(list(futures)):
            results += future.result()
            progress.add(futures[future])
    return results


_reweight_flow = flow(name="reweight", validate_parameters=False)(_reweight)


def _task_runner(runner: RunnerSettings, workers: int) -> TaskRunner[Any]:
    if runner.kind == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    from prefect_dask.task_runners import DaskTaskRunner

    logging.getLogger("distributed").setLevel(logging.WARNING)  # it logs each connection of each worker
    if runner.address:
        dask: TaskRunner[Any] = DaskTaskRunner(address=runner.address)
    else:
        local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}  # any free port
        dask = DaskTaskRunner(cluster_kwargs=local)
    return dask
