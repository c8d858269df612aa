"""The Prefect server that a flow needs: found or started before the flow, and named where it stops answering."""

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import ExitCode, FrontalisError, SettingsError, first_line

SERVER_ANSWER_SECONDS = 20.0
# Prefect repeats a request after 2, 4, 8 and 16 s. A flow makes up to four requests before it gives up.
REQUEST_RETRIES = 4


class ServerLostError(FrontalisError):
    """The Prefect server stopped answering while a flow was running."""

    exit_code = ExitCode.FAILED


def run_flow(flow: Any, **parameters: Any) -> Any:
    """Run a Prefect flow in this process and return its result, or raise what it raised.

    Raises:
        SettingsError: as `ensure_server`.
        ServerLostError: the server stopped answering. What is complete is kept.
    """
    ensure_server()
    try:
        result = flow(**parameters, return_state=True).result(raise_on_failure=False)
    except Exception as error:
        result = error
    if not isinstance(result, BaseException):
        return result
    causes = list(_causes(result))
    for cause in causes:  # the work itself was refused, and the server could not be given that news
        if isinstance(cause, FrontalisError):
            raise cause
    for cause in causes:
        if _is_of_the_server(cause):
            raise ServerLostError(
                f"{_server()} stopped answering ({first_line(cause, 200)}). What is complete is kept: run the same "
                "command again once a server is there."
            ) from result
    raise result


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_server(error: BaseException) -> bool:
    from httpx import TransportError
    from prefect.exceptions import PrefectHTTPStatusError

    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, TransportError)


def _server() -> str:
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return f"the Prefect server at {_without_password(url)}" if url else "Prefect's temporary server"


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def ensure_server() -> None:
    """Return once the Prefect server of `PREFECT_API_URL` has answered or, where that is unset, a temporary one runs.

    Prefect itself would end with a traceback, in some cases after minutes.

    Raises:
        SettingsError: no Prefect server answers within `SERVER_ANSWER_SECONDS`, or the temporary one does not start
            or has no folder to write to.
    """
    from prefect import settings
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    url = settings.PREFECT_API_URL.value()
    if not url:
        _check_home(Path(settings.PREFECT_HOME.value()))
        _start_temporary_server()
        return
    once = {settings.PREFECT_CLIENT_MAX_RETRIES: 0, settings.PREFECT_API_REQUEST_TIMEOUT: SERVER_ANSWER_SECONDS}
    try:
        with settings.temporary_settings(once), get_client(sync_client=True) as client:
            client.api_version()
    except Exception as error:  # no connection, no such host, no URL, no JSON: errors of several libraries
        why = first_line(error, 200)
        if isinstance(error, PrefectHTTPStatusError):
            why = f"{error.response.status_code} {error.response.reason_phrase}"
        raise SettingsError(
            f"PREFECT_API_URL = {_without_password(url)}: no Prefect server answers there ({why}); start one with "
            "`prefect server start`, or unset PREFECT_API_URL."
        ) from error


def _start_temporary_server() -> None:
    """Start the server that Prefect would start with the flow, but with SIGINT blocked, which it inherits.

    Ctrl-C in a terminal goes to every process of the command. A server that obeyed would be gone before the flow could
    report its end. Prefect ends the server when this process exits.
    """
    from prefect.client.orchestration import get_client

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    except RuntimeError as error:
        raise SettingsError(
            f"Prefect's temporary server did not start ({first_line(error)}); start one with `prefect server start`, "
            "and set PREFECT_API_URL to its address."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def require_home() -> None:
    """Return if Prefect can be imported: it asks for the home directory, and reads its profiles there.

    Raises:
        SettingsError: this user has no home directory, or must not read it.
    """
    try:
        home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
        (home / "profiles.toml").exists()
    except RuntimeError as error:
        raise SettingsError(
            f"HOME is not set, and user {os.getuid()} has no home directory; set HOME to a folder of yours."
        ) from error
    except OSError as error:
        raise _unusable(home, "read", error) from error


def _check_home(home: Path) -> None:
    """Refuse a PREFECT_HOME in which the temporary server could write nothing: it would retry for minutes."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise _unusable(home, "written", error) from error


def _unusable(home: Path, what: str, error: OSError) -> SettingsError:
    return SettingsError(
        f"PREFECT_HOME = {home}: cannot be {what} ({error.strerror}); set PREFECT_HOME to a folder of yours."
    )
