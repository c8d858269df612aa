"""How a run calls its stages: directly, in this process. `flows.runner` has the stages that Prefect sees."""

import contextvars
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import ParamSpec, TypeVar

from schemas.errors import SettingsError
from schemas.releases import ModelRef
from schemas.settings import PipelineSettings
from tasks.plan import Plan
from tasks.progress import Progress
from tasks.reweight import ReweightSpec, ShardResult, one_thread_each, reweight_group

NO_SERVER = (
    "runner dask: PREFECT_API_URL is not set, so every worker would start a Prefect server of its own; start `prefect "
    "server start` and set PREFECT_API_URL to an address that the workers reach, too."
)
P = ParamSpec("P")
T = TypeVar("T")


class Stages:
    """How a run calls its stages: directly, in this process. `flows.runner` has those that Prefect sees."""

    def check(self, settings: PipelineSettings) -> None:
        """Refuse settings that these stages cannot serve, before anything is done.

        Raises:
            SettingsError: the runner needs a Prefect server.
        """
        if settings.runner.kind == "dask":
            raise SettingsError(NO_SERVER)

    def call(self, name: str, stage: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:  # noqa: ARG002
        """Return what the stage returns for these arguments; `name` is what a person reads."""
        return stage(*arguments, **named)

    def reweight(self, settings: PipelineSettings, plan: Plan, models: Mapping[str, ModelRef]) -> list[ShardResult]:
        """Reweight every group of the plan in threads of this process.

        Raises:
            FrontalisError: as `tasks.reweight.reweight_group`; what is complete is kept.
        """
        workers = settings.runner.workers or os.cpu_count() or 1
        spec = ReweightSpec.of(settings, models, plan.schema)
        progress, results = Progress(plan.groups), list[ShardResult]()
        with one_thread_each(workers), ThreadPoolExecutor(workers) as pool, progress.stopped_together():
            futures = {
                pool.submit(contextvars.copy_context().run, reweight_group, group, spec): group for group in plan.groups
            }
            try:
                for future in as_completed(futures):
                    results += future.result()
                    progress.add(futures[future])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results
