"""Vacuum: remove the files that no kept release needs, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.begin import begin_flow
from schemas.settings import KEEP_RELEASES
from tasks.maintenance.vacuum import Vacuumed, clean


@flow(name="vacuum")
def vacuum(store: str, keep: int = KEEP_RELEASES, dry_run: bool = False, grace_hours: float | None = None) -> Vacuumed:
    """Remove what no kept release needs; see `tasks.maintenance.vacuum`."""
    begin_flow()
    return clean(store, keep=keep, dry_run=dry_run, grace_hours=grace_hours)
