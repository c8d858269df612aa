"""What every flow does first: show its progress where Prefect does, and create files for their owner only.

Prefect hands the lines of the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS on to the record of the run, but leaves
their level to them.
"""

import logging

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
