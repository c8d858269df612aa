"""The Prefect server that a command reports to, where one is configured: asked first, and named where it is lost."""

import contextlib
import os
import re
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


def uses_prefect() -> bool:
    """Return whether a Prefect server is configured, so that commands show there as flow runs.

    Prefect takes seconds to load. It is asked only where a place that it reads its settings from exists.

    Raises:
        SettingsError: as `require_home`.
    """
    if os.environ.get("PREFECT_API_URL"):
        require_home()
        return True
    home = Path(os.environ.get("PREFECT_HOME") or os.path.expanduser("~/.prefect"))  # noqa: PTH111 - may be nobody's
    places = [home / "profiles.toml", Path("prefect.toml"), Path(".env")]
    named = {"PREFECT_PROFILE", "PREFECT_PROFILES_PATH"} & os.environ.keys()
    if not (named or any(os.path.isfile(place) for place in places) or _in_pyproject()):  # noqa: PTH113 - no errors
        return False
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def _in_pyproject() -> bool:
    with contextlib.suppress(OSError, UnicodeError):
        return "[tool.prefect" in Path("pyproject.toml").read_text("utf-8")
    return False


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
        raise SettingsError(
            f"PREFECT_HOME = {home}: cannot be read ({error.strerror}); set PREFECT_HOME to a folder of yours."
        ) from error


def run_flow(flow: Any, **parameters: Any) -> Any:
    """Run a Prefect flow in this process and return its result, or raise what it raised.

    Raises:
        SettingsError: as `check_server`.
        ServerLostError: the server stopped answering. What is complete is kept.
    """
    check_server()
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
                f"the Prefect server at {_without_password(_url())} stopped answering ({first_line(cause, 200)}). What "
                "is complete is kept: run the same command again once a server is there."
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


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _url() -> str:
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


def check_server() -> None:
    """Return once the Prefect server of `PREFECT_API_URL` has answered.

    Prefect itself would end with a traceback, in some cases after minutes.

    Raises:
        SettingsError: no Prefect server answers within `SERVER_ANSWER_SECONDS`.
    """
    from prefect import settings
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    once = {settings.PREFECT_CLIENT_MAX_RETRIES: 0, settings.PREFECT_API_REQUEST_TIMEOUT: SERVER_ANSWER_SECONDS}
    try:
        with settings.temporary_settings(once), get_client(sync_client=True) as client:
            client.api_version()
    except Exception as error:  # no connection, no such host, no URL, no JSON: errors of several libraries
        why = first_line(error, 200)
        if isinstance(error, PrefectHTTPStatusError):
            why = f"{error.response.status_code} {error.response.reason_phrase}"
        raise SettingsError(
            f"PREFECT_API_URL = {_without_password(_url())}: no Prefect server answers there ({why}); start one with "
            "`prefect server start`, or unset PREFECT_API_URL to run without Prefect."
        ) from error
