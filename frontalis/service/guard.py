"""What stands before every request: who may ask, how large and how slow a request may be, headers, and its figures.

With a token, everything but the page's own files and the health checks wants it: as `Authorization: Bearer …`, or as
the cookie that the page gets for it. Without one, the service listens on loopback only, and answers only requests that
are addressed to loopback, so that no web page can reach it under a name of its own (DNS rebinding).
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontalis.service.limits import Limits, TooLargeError
from frontalis.service.metrics import Metrics

log = logging.getLogger("frontalis")

COOKIE = "frontalis"
OPEN_PATHS = ("/", "/healthz", "/readyz", "/session")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", PAGE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Token:
    """The bearer token that requests must show; None lets everybody in."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    @property
    def is_wanted(self) -> bool:
        """Whether there is a token."""
        return self._token is not None

    def is_right(self, shown: str) -> bool:
        """Compare in constant time."""
        return self._token is not None and hmac.compare_digest(shown.encode(), self._token)

    @property
    def cookie(self) -> str:
        """What the page keeps in place of the token."""
        assert self._token is not None
        return hmac.new(self._token, b"frontalis session", hashlib.sha256).hexdigest()

    def admits(self, headers: Headers) -> bool:
        """Return whether a request shows the token, or the cookie made of it."""
        if self._token is None:
            return True
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_right(shown.strip())
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.cookie.encode())


class Guard:
    """The outermost layer of the service."""

    def __init__(self, app: ASGIApp, token: Token, limits: Limits, metrics: Metrics) -> None:
        self._app, self._token = app, token
        self._limits, self._metrics = limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in _HEADERS if one[0] not in there)]
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is not None:
                await _refuse(respond, *refused)
            else:
                await asyncio.wait_for(self._app(scope, self._limited(receive), respond), self._limits.seconds)
        except TimeoutError:
            if not status:
                await _refuse(respond, 504, f"took longer than {self._limits.seconds:g} s.")
        except TooLargeError as error:
            await _refuse(respond, 413, str(error))
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await _refuse(respond, 500, "internal error; the log of the service has it.")
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, str(status)).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self._token.is_wanted and not is_loopback(_host_name(headers.get("host", ""))):
            return 421, "addressed to another host; set FRONTALIS_TOKEN to serve under a name, or ask 127.0.0.1."
        if not (path in OPEN_PATHS or path.startswith("/static/") or self._token.admits(headers)):
            return 401, "a token is required: Authorization: Bearer …"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body:
            return 413, self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.body:
                raise TooLargeError(self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.body:,} bytes; send fewer vectors a request."


def _host_name(host: str) -> str:
    """Return a Host header without its port."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def _refuse(send: Send, status: int, error: str) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
