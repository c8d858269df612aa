"""Roll back: serve an older release at once, as a Prefect flow. From a shell it needs no Prefect."""

from prefect import flow

from flows.begin import begin_flow, named, store_of
from schemas.releases import Release
from tasks.maintenance.rollback import roll_back


@flow(name="rollback", flow_run_name=named("rollback", "release"))
def rollback(store: str, release: str) -> Release:
    """Serve an older release from now on: its features, indexes and models together.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.
        release: the release to serve, by name.

    Raises:
        SettingsError: there is no such store or release, or it can no longer be served.
    """
    begin_flow()
    return roll_back(store_of(store), release)
