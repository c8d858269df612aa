"""Roll back: serve an older release at once, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.begin import begin_flow
from schemas.releases import Release
from tasks.maintenance.rollback import roll_back


@flow(name="rollback")
def rollback(store: str, release: str) -> Release:
    """Serve `release` from now on; see `tasks.maintenance.rollback`."""
    begin_flow()
    return roll_back(store, release)
