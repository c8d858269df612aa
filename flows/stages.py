"""The stages as Prefect tasks: names, retries and tags. What a stage does is the plain function it wraps.

Arguments and results are settings, paths, digests and counts, never arrays. Only transient failures are retried,
such as a store that does not answer; bad input is not.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from schemas.errors import FrontalisError, StoreBusyError, StoreError
from storage.permissions import restrict_new_files
from tasks.evaluate import evaluate
from tasks.index import index_mode
from tasks.plan import ShardWork, make_plan, prepare_models
from tasks.publish import publish
from tasks.reweight import ReweightSpec, ShardResult, reweight_group

T = TypeVar("T")


async def is_transient(_task: Task[..., Any], _run: object, state: State[Any]) -> bool:
    """Return whether a retry can help: not for refusals, but for a store that failed to answer."""
    try:
        await state.aresult()
    except StoreBusyError:
        return False
    except StoreError:
        return True
    except FrontalisError:
        return False
    except OSError:
        return True
    except BaseException:  # a defect: the same again would fail again
        return False
    return False


class Unvisited(Generic[T]):
    """An argument that Prefect and Dask pass on unvisited, to a thread or to another machine.

    They visit lists and dataclasses in search of futures, which takes longer than the work where these are large. Dask
    turns Prefect's own `opaque` into a plain tuple on the way.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


def reweight_unvisited(group: Unvisited[Sequence[ShardWork]], spec: Unvisited[ReweightSpec]) -> list[ShardResult]:
    """Reweight a group, perhaps on a Dask worker; see `tasks.reweight.reweight_group`."""
    restrict_new_files()
    return reweight_group(group.value, spec.value)


def _stage(name: str, retries: int = 0) -> Any:
    return task(
        name=name,
        tags=["frontalis"],
        retries=retries,
        retry_delay_seconds=2,
        retry_condition_fn=is_transient,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


reweight_task = _stage("reweight", retries=2)(reweight_unvisited)
TASKS: dict[Callable[..., Any], Any] = {
    prepare_models: _stage("models")(prepare_models),
    make_plan: _stage("plan")(make_plan),
    publish: _stage("publish")(publish),
    index_mode: _stage("index", retries=1)(index_mode),
    evaluate: _stage("evaluate")(evaluate),
}
