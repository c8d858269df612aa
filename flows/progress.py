"""Progress of a run, where Prefect shows it.

Prefect hands the lines of the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS on to the record of the run, but leaves
their level to them.
"""

import logging


def show_progress() -> None:
    """Let `frontalis` loggers log progress (INFO), unless a level was chosen already, as by `frontalis --quiet`."""
    logger = logging.getLogger("frontalis")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
