"""What every flow does first: show its progress where Prefect does, and create files for their owner only.

Prefect hands the lines of the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS on to the record of the run, but leaves
their level to them.
"""

import logging
from collections.abc import Callable

from prefect.runtime import flow_run

from schemas.settings import load_pipeline
from storage.permissions import restrict_new_files


def begin_flow() -> None:
    """Let `frontalis` loggers log progress (INFO), unless a level was chosen already, and set the file permissions.

    Raises:
        SettingsError: FRONTALIS_UMASK is no umask.
    """
    logger = logging.getLogger("frontalis")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    restrict_new_files()


def store_of(given: str) -> str:
    """Return the store of a deployment's parameter: as given, or the one that a `pipeline.toml` names.

    Raises:
        SettingsError: the file cannot be read, or something in it cannot be used.
    """
    return load_pipeline(given).store if given.endswith(".toml") else given


def named(what: str, *parameters: str) -> Callable[[], str]:
    """Return how runs of a flow are called: what it does, some of its parameters, and when it was to start (UTC)."""

    def name() -> str:
        given = flow_run.parameters
        chosen = [str(given[one]) for one in parameters if given.get(one)]
        return " ".join([what, *chosen, f"{flow_run.scheduled_start_time:%Y-%m-%d %H:%M}"])

    return name
