"""The web application: a page, a JSON endpoint with a schema, and what both refuse."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fastfpl import __version__
from fastfpl.errors import Damaged, FastfplError
from fastfpl.serving.answers import MOST_TOP, Answerer

__all__ = ["make_app"]

_LOG = logging.getLogger("fastfpl")
#: Seconds for an upload.
PATIENCE = 60.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class OneClient(BaseModel):
    """A client that can be asked."""

    id: str = Field(description="what /predict takes as client")
    name: str = Field(description="for people")


class About(BaseModel):
    """The run that answers."""

    method: str
    clip: str
    classes: list[str]
    clients: list[OneClient]
    max_upload: int = Field(description="bytes of an image at most")


class Share(BaseModel):
    """A class and its probability."""

    name: str
    probability: float = Field(ge=0, le=1)


class Predicted(BaseModel):
    """What is said of an image, likeliest classes first."""

    client: str
    method: str
    classes: list[Share] = Field(description="of the client's model")
    zero_shot: list[Share] = Field(description="of the frozen CLIP, hand-written prompt")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="a sentence")


class _TooLong(Exception):
    """An upload that is longer than is taken."""


def make_app(answerer: Answerer, max_upload: int, hosts: list[str]) -> FastAPI:
    """Make the application.

    Parameters
    ----------
    answerer : Answerer
    max_upload : int
        Bytes of an image at most.
    hosts : list of str
        Names by which it may be asked for; a page of another site that has its own name lead here
        is turned away.

    Returns
    -------
    FastAPI
    """
    app = FastAPI(
        title="fastfpl",
        version=__version__,
        description=f"Answers of {answerer.model.method.name}; nothing that is sent is kept.",
        # their pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
    )
    contents = {
        path: (resources.files("fastfpl.serving").joinpath(name).read_bytes(), kind)
        for path, (name, kind) in _ASSETS.items()
    }

    @app.middleware("http")
    async def guarded(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            answer: Response = _problem(403, "fastfpl.serve: a page of another site may not ask")
        else:
            answer = await call_next(request)
        answer.headers.update(_HEADERS)
        return answer

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    @app.exception_handler(FastfplError)
    async def refused(request: Request, error: Exception) -> Response:
        return _problem(500 if isinstance(error, Damaged) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def unread(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _problem(
            422, f"fastfpl.serve: {first['loc'][-1]} must be as /openapi.json says; {first['msg']}"
        )

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, f"fastfpl.serve: {error.detail}")

    def asset(path: str) -> Callable[[], Awaitable[Response]]:
        async def get() -> Response:
            content, kind = contents[path]
            return Response(content, media_type=kind)

        return get

    for path in _ASSETS:
        app.get(path, include_in_schema=False)(asset(path))

    @app.get("/about", summary="What can be asked")
    async def about() -> About:
        model = answerer.model
        return About(
            method=model.method.name,
            clip=model.clip.name,
            classes=list(model.classnames),
            clients=[OneClient(id=key, name=name) for key, name in answerer.clients],
            max_upload=max_upload,
        )

    problems = {code: {"model": Problem} for code in (400, 408, 413, 422)}

    @app.post(
        "/predict",
        summary="Classify the image that is the body",
        responses=problems,  # type: ignore[arg-type]
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": f"an image file of at most {max_upload} bytes",
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def predict(
        request: Request,
        client: Annotated[
            str | None, Query(description="id of /about; may be left out of one model for all")
        ] = None,
        top: Annotated[int, Query(ge=1, le=MOST_TOP, description="classes that are named")] = 5,
    ) -> Predicted:
        try:
            body = await asyncio.wait_for(_body(request, max_upload), PATIENCE)
        except _TooLong:
            raise HTTPException(
                413, f"an image must have at most {max_upload} bytes; got more: make it smaller"
            ) from None
        except (asyncio.TimeoutError, TimeoutError):
            raise HTTPException(
                408, f"an image must arrive within {PATIENCE:g} seconds; got a part of it"
            ) from None
        said = await run_in_threadpool(answerer.ask, body, client, top)
        return Predicted(
            client=said.client,
            method=answerer.model.method.name,
            classes=[Share(name=name, probability=p) for name, p in said.classes],
            zero_shot=[Share(name=name, probability=p) for name, p in said.zero_shot],
        )

    return app


async def _body(request: Request, most: int) -> bytes:
    """Read a body that is no longer than is taken; one that says that it is, is not begun."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise _TooLong
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise _TooLong
    return bytes(content)


def _problem(code: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, code)
