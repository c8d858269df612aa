"""The endpoints. Each answers from one release, and names it.

| endpoint | answers |
|---|---|
| `POST /search` | neighbours of stored ids or vectors (JSON) |
| `POST /search/npy` | neighbours of the vectors of a `.npy` file |
| `GET /neighbours/{id}` | neighbours of a stored id |
| `GET /release`, `GET /releases` | the release that answers; the history |
| `GET /reports/{release}/…` | stored reports |
| `GET /healthz`, `/readyz`, `/metrics` | for machines |
| `GET /` | the page |
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from frontalis.service import page
from frontalis.service.answering import Answering
from frontalis.service.audit import Audit
from frontalis.service.batching import Batcher
from frontalis.service.guard import COOKIE, Guard, Token
from frontalis.service.limits import Limits, OverloadedError, TooLargeError
from frontalis.service.metrics import Metrics
from frontalis.service.requests import (
    Options,
    Problem,
    ReleaseLine,
    ReleaseList,
    ReleaseSummary,
    SearchAnswer,
    SearchRequest,
)
from frontalis.service.served import Served
from schemas.errors import FrontalisError, SettingsError, StoreError, UnknownIdError, clipped, one_line
from storage.location import Location
from storage.query_vectors import npy_matrix

log = logging.getLogger("frontalis")

SMALL_BODY = 1 << 16
"""Bytes of a body that is read on the event loop: less than a millisecond."""
_STATUS: dict[type[FrontalisError], int] = {
    UnknownIdError: 404,
    SettingsError: 400,
    TooLargeError: 413,
    OverloadedError: 503,
    StoreError: 503,
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "an option, id or vector that cannot be used"},
    404: {"model": Problem, "description": "an id that is not stored"},
    503: {"model": Problem, "description": "too many queries wait, or the store cannot be read"},
}
_BODIES: dict[str, Any] = {
    "json": {"application/json": {"schema": SearchRequest.model_json_schema()}},
    "npy": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


@dataclass(frozen=True)
class ServiceSettings:
    """How the service runs.

    Attributes:
        store: local path or s3://…
        limits: of a request.
        refresh: seconds between two looks at which release is served.
        audit: file of the audit log; None for none.
        token: that requests must show; None for none.
    """

    store: str
    limits: Limits = field(default_factory=Limits)
    refresh: float = 5.0
    audit: str | None = None
    token: str | None = None


class _Session(BaseModel):
    token: str


def create_app(settings: ServiceSettings) -> Guard:
    """Load the served release and return the service.

    Raises:
        SettingsError: no store there, or the audit log cannot be written.
        StoreError: nothing is served yet, or the store is damaged.
    """
    metrics, token, limits = Metrics(), Token(settings.token), settings.limits
    audit = Audit(settings.audit)
    served = Served(settings.store, metrics)
    answering = Answering(served, Batcher(metrics, limits.waiting), limits, audit)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(_follow(served, answering, settings.refresh))
        yield
        following.cancel()
        answering.close()

    app = FastAPI(
        title="Frontalis",
        version=version("frontalis"),
        summary="Nearest neighbours in the served release of a store of re-weighted face embeddings.",
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_searches(app, answering)
    _add_releases(app, served, settings)
    _add_page(app, token)
    _add_machines(app, served, metrics)
    _add_problems(app, Location(settings.store).uri)
    return Guard(app, token, limits, metrics)


async def _follow(served: Served, answering: Answering, seconds: float) -> None:
    """Go to each new release as it is served, for ever."""
    said = ""
    while True:
        await asyncio.sleep(seconds)
        try:
            await answering.in_thread(served.refresh)
            said = ""
        except FrontalisError as error:
            if str(error) != said:
                log.warning("the served release cannot be read, the old one goes on: %s", error)
            said = str(error)
        except Exception:
            log.exception("the served release cannot be read, the old one goes on")


def _add_searches(app: FastAPI, answering: Answering) -> None:
    async def answer(
        request: Request, options: Options, ids: list[str | int], embeddings: np.ndarray | None
    ) -> Response:
        client = request.client.host if request.client else "?"
        content = await answering.answer(options, ids, embeddings, client)
        return Response(content, media_type="application/json")

    @app.post(
        "/search",
        response_model=SearchAnswer,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": {"required": True, "content": _BODIES["json"]}},
    )
    async def search(request: Request) -> Response:
        """Find the nearest stored rows of ids, or of embeddings as the recogniser gives them."""
        _expect(request, "application/json")
        body = await request.body()

        def read() -> tuple[SearchRequest, np.ndarray | None]:
            asked = SearchRequest.model_validate_json(body)
            return asked, _matrix(asked.vectors) if asked.vectors else None

        asked, embeddings = read() if len(body) <= SMALL_BODY else await answering.in_thread(read)
        return await answer(request, asked, asked.ids, embeddings)

    @app.post(
        "/search/npy",
        response_model=SearchAnswer,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": {"required": True, "content": _BODIES["npy"]}},
    )
    async def search_npy(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Find the nearest stored rows of the embeddings in a .npy file, `[D]` or `[n, D]` floats."""
        _expect(request, "application/octet-stream")
        return await answer(request, options, [], npy_matrix(await request.body()))

    @app.get("/neighbours/{stored_id:path}", response_model=SearchAnswer, responses=_PROBLEMS)
    async def neighbours(request: Request, stored_id: str, options: Annotated[Options, Query()]) -> Response:
        """Find the nearest stored rows of a stored id."""
        return await answer(request, options, [stored_id], None)


def _add_releases(app: FastAPI, served: Served, settings: ServiceSettings) -> None:
    @app.get("/release")
    def release() -> ReleaseSummary:
        """Describe the release that answers."""
        return page.summary(served.opened, settings.limits)

    @app.get("/releases")
    def releases() -> ReleaseList:
        """List all releases, newest first."""
        answering = served.opened.record.release
        return ReleaseList(
            releases=[
                ReleaseLine(
                    release=one.release,
                    created=one.created.isoformat(timespec="seconds"),
                    promoted=one.gate.promoted,
                    reason=one.gate.reason,
                    serving=one.serving,
                    answering=one.release == answering,
                    anchor=one.anchor,
                    usable=not one.unusable,
                    report=page.report_path(one),
                )
                for one in reversed(served.history())
            ]
        )

    @app.get("/reports/{release}/{path:path}", include_in_schema=False)
    def report(release: str, path: str) -> Response:
        content = page.report_file(served, Location(settings.store), release, path)
        headers = {"content-security-policy": page.REPORT_POLICY}
        return Response(content, media_type=page.media_type(path), headers=headers)


def _add_page(app: FastAPI, token: Token) -> None:
    static = page.static_files()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(static["index.html"], media_type=page.media_type("index.html"))

    @app.get("/static/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in static:
            raise UnknownIdError("there is no such file.")
        return Response(static[name], media_type=page.media_type(name), headers={"cache-control": "no-cache"})

    @app.post("/session", include_in_schema=False)
    async def session(request: Request) -> Response:
        shown = _Session.model_validate_json(await request.body())
        if not token.is_right(shown.token):
            return JSONResponse({"error": "this is not the token."}, 401)
        answer = Response(status_code=204)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token.cookie, httponly=True, samesite="strict", secure=secure)
        return answer


def _add_machines(app: FastAPI, served: Served, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> dict[str, str]:
        """Say that a release is loaded, and may be served."""
        return {"status": "ok", "release": served.opened.record.release}

    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Give figures in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_problems(app: FastAPI, store: str) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        if status == 503:
            log.warning("%s", error)
        headers = {"retry-after": "1"} if status == 503 else None
        shown = str(error).replace(store, "the store")  # a client need not know the path
        return JSONResponse({"error": shown}, status, headers)

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if part not in ("query", "body")]
        where = ".".join(parts)[:80]
        return JSONResponse({"error": one_line(f"{where}: {first['msg']}." if where else f"{first['msg']}.")}, 400)

    async def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "internal error; the log of the service has it."}, 500)

    app.add_exception_handler(FrontalisError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(ValidationError, malformed)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(Exception, failed)


def _matrix(vectors: list[list[float]]) -> np.ndarray:
    if len({len(vector) for vector in vectors}) != 1:
        raise SettingsError("vectors: are not of one length.")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        return np.array(vectors, np.float32)


def _expect(request: Request, media_type: str) -> None:
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != media_type:
        raise HTTPException(415, f"content-type {clipped(found)}: must be {media_type}.")
