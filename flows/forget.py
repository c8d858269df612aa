"""Forget: delete the people and rows that a file lists, as a Prefect flow. From a shell it needs no Prefect.

Prefect's server keeps the parameters of a run. So the names are in a file, which is yours to delete afterwards.
"""

from prefect import flow

from flows.begin import begin_flow, named, store_of
from tasks.maintenance.forget import Forgotten, forget_all
from tasks.maintenance.targets import read_targets


@flow(name="forget", flow_run_name=named("forget"))
def forget(store: str, file: str, wait: float = 0.0, ignore_case: bool = False, in_advance: bool = False) -> Forgotten:
    """Delete all that `file` lists, JSON lines such as `{"subject": "NAME"}` or `{"id": "ID"}`.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.
        file: the list, on the worker's machine; it holds the names, and Prefect's database only this path.
        wait: seconds to wait for a run that holds the store.
        ignore_case: compare subjects without upper and lower case.
        in_advance: accept who has no row yet, to keep future rows out.

    Raises:
        SettingsError: a line matches nothing, or there is no such file or store.
    """
    begin_flow()
    return forget_all(store_of(store), read_targets(file, ignore_case=ignore_case), in_advance=in_advance, wait=wait)
