"""The process of `frontalis serve`: the address, the token, signals.

SIGTERM or Ctrl-C ends it cleanly: no new connection, what was asked is still answered, exit code 0. A second signal
ends it at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from frontalis.service.app import ServiceSettings, create_app
from frontalis.service.guard import is_loopback
from schemas.errors import SettingsError

log = logging.getLogger("frontalis")

TOKEN = "FRONTALIS_TOKEN"  # noqa: S105 - its name
LEAST_TOKEN = 16
LAST_ANSWERS = 10  # seconds that requests have to be answered after a signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def token_of(host: str, environment: Mapping[str, str]) -> str | None:
    """Return the token that requests must show, or None where everybody on this machine may ask.

    Raises:
        SettingsError: an address that others can reach has none, or it is too short or not printable.
    """
    token = environment.get(TOKEN, "")
    if not token:
        if is_loopback(host):
            return None
        raise SettingsError(
            f"--host {host}: can be reached by others, so set {TOKEN} to a secret of {LEAST_TOKEN} characters or more "
            "that requests must show; or listen on 127.0.0.1."
        )
    if len(token) < LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise SettingsError(f"{TOKEN}: must be {LEAST_TOKEN} or more printable ASCII characters without blanks.")
    return token


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SettingsError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise SettingsError(f"--host {host} --port {port}: cannot be listened on ({error.strerror}).") from error
    # asyncio does so for its own sockets only; without it the body of an answer waits for the receipt of its head
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(settings: ServiceSettings, host: str, port: int, at_once: Callable[[int], None]) -> None:
    """Answer requests until a signal comes; `at_once` is called with a second one.

    Raises:
        SettingsError: the address or the store cannot be used.
        StoreError: nothing is served yet, or the store is damaged.
    """
    with contextlib.closing(listen(host, port)) as listening:
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )
        server = _Server(config)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            asyncio.run(_serve(server, listening, at_once))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `_serve`."""
        yield


async def _serve(server: _Server, listening: socket.socket, at_once: Callable[[int], None]) -> None:
    def stop(number: int) -> None:
        if server.should_exit:
            at_once(number)
        log.info("stopping; what was asked is still answered")
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop, number)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("http://%s:%d (process %d)", shown, port, os.getpid())
    await server.serve(sockets=[listening])
