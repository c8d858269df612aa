"""Verify: check every file of a store against its releases, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.begin import begin_flow
from tasks.maintenance.verify import Checked, check


@flow(name="verify")
def verify(store: str) -> Checked:
    """Check a store and return the problems found; see `tasks.maintenance.verify`."""
    begin_flow()
    return check(store)
