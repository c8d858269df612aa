"""Verify: check every file of a store against its releases, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.begin import begin_flow, named, store_of
from reports.text import counted
from tasks.maintenance.verify import Checked, check


@flow(name="verify", flow_run_name=named("verify"))
def verify(store: str) -> State[Checked] | Checked:
    """Check every file of a store against its releases; the run fails where one has a problem.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.

    Raises:
        SettingsError: there is no such store.
    """
    begin_flow()
    checked = check(store_of(store))
    if checked.problems:
        first = checked.problems[0]
        message = f"{counted(len(checked.problems), 'problem')}, first: {first.thing}: {first.what}"
        return Failed(message=message, data=checked, name="Problems")
    return checked
