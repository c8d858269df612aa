"""Vacuum: remove the files that no kept release needs, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.begin import begin_flow, named, store_of
from schemas.settings import KEEP_RELEASES
from tasks.maintenance.vacuum import Vacuumed, clean


@flow(name="vacuum", flow_run_name=named("vacuum"))
def vacuum(store: str, keep: int = KEEP_RELEASES, dry_run: bool = False, grace_hours: float | None = None) -> Vacuumed:
    """Remove what no kept release needs.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.
        keep: how many promoted releases stay.
        dry_run: return what would be removed, and remove nothing.
        grace_hours: keep files younger than this; by default 0 locally, 24 on object storage.

    Raises:
        SettingsError: there is no such store.
        StoreBusyError: another run holds the store.
    """
    begin_flow()
    return clean(store_of(store), keep=keep, dry_run=dry_run, grace_hours=grace_hours)
