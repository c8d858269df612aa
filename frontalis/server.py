"""Make sure of a Prefect server before a flow starts: where none answers, say so in one line and at once.

Prefect itself would end with a traceback, in some cases after minutes.
"""

import re
import signal

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from schemas.errors import SettingsError

ANSWER_SECONDS = 20.0


def ensure_server() -> None:
    """Return once the server of `PREFECT_API_URL` has answered, or, where that is unset, Prefect's temporary one.

    Raises:
        SettingsError: it did not answer within `ANSWER_SECONDS`, or not as a Prefect server does; or the temporary one
            did not start.
    """
    url = PREFECT_API_URL.value()
    if not url:
        _start_temporary()
        return
    once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: ANSWER_SECONDS}
    try:
        with temporary_settings(once), get_client(sync_client=True) as client:
            client.api_version()
    except PrefectHTTPStatusError as error:
        raise _silent(url, f"{error.response.status_code} {error.response.reason_phrase}") from error
    except Exception as error:  # no connection, no such host, no URL, no JSON: of several libraries
        raise _silent(url, (str(error).splitlines() or [""])[0][:200] or type(error).__name__) from error


def _start_temporary() -> None:
    """Start the server that Prefect would start when the run begins, but with SIGINT blocked, which it inherits.

    Ctrl-C in a terminal goes to every process of the command. A server that heeds it is gone before the flow can
    report its end, and Prefect asks it again and again. SIGTERM, sent when this process ends, does reach it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    except RuntimeError as error:
        raise SettingsError(
            f"Prefect's temporary server did not start ({error}); start one with `prefect server start`, and set "
            "PREFECT_API_URL to its address."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _silent(url: str, why: str) -> SettingsError:
    shown = re.sub(r"//[^/@]*@", "//", url)  # a password may stand before the host
    return SettingsError(
        f"PREFECT_API_URL = {shown}: no Prefect server answers there ({why}); start one with `prefect server start`, "
        "or unset PREFECT_API_URL."
    )
