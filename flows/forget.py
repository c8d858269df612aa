"""Forget: delete the people and rows that a file lists, as a Prefect flow. From a shell it needs no Prefect.

Prefect's server keeps the parameters of a run. So the names are in a file, which is yours to delete afterwards.
"""

from prefect import flow

from flows.begin import begin_flow
from tasks.maintenance.forget import Forgotten, forget_all
from tasks.maintenance.targets import read_targets


@flow(name="forget")
def forget(store: str, file: str, wait: float = 0.0, ignore_case: bool = False, in_advance: bool = False) -> Forgotten:
    """Delete all that `file` lists, JSON lines such as `{"subject": "NAME"}` or `{"id": "ID"}`.

    See `tasks.maintenance.forget`.
    """
    begin_flow()
    return forget_all(store, read_targets(file, ignore_case=ignore_case), in_advance=in_advance, wait=wait)
