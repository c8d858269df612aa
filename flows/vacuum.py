"""Vacuum: remove the files that no kept release needs, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.progress import show_progress
from tasks.maintenance.vacuum import KEEP, Vacuumed, clean


@flow(name="vacuum")
def vacuum(store: str, keep: int = KEEP, dry_run: bool = False, grace_hours: float | None = None) -> Vacuumed:
    """Remove what no kept release needs; see `tasks.maintenance.vacuum`."""
    show_progress()
    return clean(store, keep=keep, dry_run=dry_run, grace_hours=grace_hours)
