"""Permissions of new files: embeddings are biometric data, so files are 0600 and folders 0700 by default.

The umask of the process decides, since libraries such as delta-rs create files, too. Existing files keep theirs.
"""

import os

from schemas.errors import SettingsError

UMASK = "FRONTALIS_UMASK"
PRIVATE = "077"


def restrict_new_files() -> None:
    """Set the umask of this process to FRONTALIS_UMASK (octal), by default 077: nothing for group and others.

    Raises:
        SettingsError: the value is no umask, or one that would keep the owner out.
    """
    text = os.environ.get(UMASK, PRIVATE)
    try:
        mask = int(text, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o077:
        raise SettingsError(f"{UMASK}={text!r} is no umask for files of others; use 077 (the default), 027 or 022.")
    os.umask(mask)
