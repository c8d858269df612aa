"""Ask for the Prefect server before a flow starts: where none answers, say so in one line and at once.

Prefect itself would end with a traceback, in some cases after minutes. Without `PREFECT_API_URL` it starts a temporary
server for the run, and there is nothing to ask.
"""

import re

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


def check_server() -> None:
    """Return once the server of `PREFECT_API_URL`, if there is one, has answered.

    Raises:
        SettingsError: it did not answer within `ANSWER_SECONDS`, or not as a Prefect server does.
    """
    url = PREFECT_API_URL.value()
    if not url:
        return
    once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: ANSWER_SECONDS}
    try:
        with temporary_settings(once), get_client(sync_client=True) as client:
            client.api_version()
    except PrefectHTTPStatusError as error:
        raise _silent(url, f"{error.response.status_code} {error.response.reason_phrase}") from error
    except Exception as error:  # no connection, no such host, no URL, no JSON: of several libraries
        raise _silent(url, (str(error).splitlines() or [""])[0][:200] or type(error).__name__) from error


def _silent(url: str, why: str) -> SettingsError:
    shown = re.sub(r"//[^/@]*@", "//", url)  # a password may stand before the host
    return SettingsError(
        f"PREFECT_API_URL = {shown}: no Prefect server answers there ({why}); start one with `prefect server start`, "
        "or unset PREFECT_API_URL."
    )
