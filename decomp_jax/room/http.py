"""The server of a reading room: HTTP to questions and back, for one reader on one's own machine.

An answer is a little-endian uint32 n, n bytes of JSON {"data", "arrays": [{"name", "type", "shape"}]}, and the arrays'
bytes, one after the other, each at a multiple of 4 from the JSON's end.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import json
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decomp_jax.errors import UserError
from decomp_jax.mesh import give_back_host_memory

STATIC = Path(__file__).parent / "static"
PAGE = {
    "index.html": "text/html", "icon.svg": "image/svg+xml", "room.css": "text/css", "parts.css": "text/css",
    **{f"{name}.js": "text/javascript" for name in (
        "main", "server", "state", "ask", "viewport", "viewer", "brush", "bring", "archive", "question", "hits",
        "compare", "session", "keys", "dom", "types",
    )},
}
HOSTS = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_JSON, MOST_UPLOAD = 1 << 22, 1 << 26
# Requests whose bodies may be read at a time, and computations that may wait.
MOST_REQUESTS, MOST_UPLOADS, MOST_WAITING = 32, 2, 16
LOOK_FOR_CLIENT = 0.2  # seconds
JSON, BYTES = "application/json", "application/octet-stream"


class Answer(Protocol):
    """What `session.Room`'s methods return."""

    data: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Busy(Exception):
    """Too much is waiting."""


class Superseded(Exception):
    """The page has asked anew, or has gone."""


class Desk:
    """One thread that computes, first come, first served."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "room")
        self._waiting: set[asyncio.Future] = set()
        self._newest: dict[str, asyncio.Future] = {}

    def start(self, function: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
        future = self._thread.submit(function, *args)
        self._thread.submit(give_back_host_memory)  # once it is answered
        return future

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., Any], argument: Any, *, of: str,
                  gone: Callable[[], Awaitable[bool]]) -> Any:
        """The function's result. What waits under the same name `of` is given up for it; "" is no name.

        Raises:
            Busy: enough is waiting.
            Superseded: it was given up, or its client is gone.
        """
        if older := self._newest.pop(of, None):
            older.cancel()
            self._waiting.discard(older)
        if len(self._waiting) >= MOST_WAITING:
            raise Busy
        future = asyncio.wrap_future(self.start(function, argument))
        self._waiting.add(future)
        if of:
            self._newest[of] = future
        try:
            while not (await asyncio.wait([future], timeout=LOOK_FOR_CLIENT))[0]:
                if await gone():
                    future.cancel()
            if future.cancelled():
                raise Superseded
            return future.result()
        finally:
            self._waiting.discard(future)
            if self._newest.get(of) is future:
                del self._newest[of]


class Guard:
    """Refuses what does not come from the room's own page, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return _refuse(403, "another site's page asked; open the room by its own address")
        if headers.get("origin", own := f"http://{headers['host']}") != own:
            return _refuse(403, "a page of another address asked; open the room by its own address")
        if not scope["path"].startswith("/api/"):
            return None
        if not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self._token}".encode()):
            return _refuse(401, "the address lacks its token, or is that of an earlier start; take the one that the "
                                "program printed")
        wanted = BYTES if scope["method"] == "PUT" else JSON
        if scope["method"] != "GET" and headers.get("content-type", "").partition(";")[0].strip() != wanted:
            return _refuse(415, f"the body must be {wanted}")
        return None


def make_app(room: Any, token: str) -> Starlette:
    """The server of a `session.Room`, whose methods are the paths below /api/."""
    desk = Desk()
    steps: list[concurrent.futures.Future] = []
    readers = {"uploads": asyncio.Semaphore(MOST_UPLOADS), "requests": asyncio.Semaphore(MOST_REQUESTS)}

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        steps.extend(desk.start(step) for step in room.warm_up())
        try:
            yield
        finally:
            desk.close()

    async def about(request: Request) -> Response:
        if not all(step.done() for step in steps):
            return JSONResponse({"ready": False, "done": sum(step.done() for step in steps), "steps": len(steps)})
        for step in steps:
            step.result()
        return JSONResponse({"ready": True, **room.about().data})

    def answering(function: Callable[[Any], Answer], *, newest: bool = False, upload: bool = False,
                  listing: bool = False) -> Callable:
        async def answer(request: Request) -> Response:
            limit = readers["uploads" if upload else "requests"]
            if limit.locked():
                raise Busy
            async with limit:
                body = await request.body()
                argument = body if upload else _parse(body)
                if listing:  # needs no turn among computations
                    return _pack(await run_in_threadpool(function, argument))
                of = f"{request.url.path} {page}" if newest and (page := request.headers.get("x-page")) else ""
                return _pack(await desk.run(function, argument, of=of, gone=request.is_disconnected))
        return _guarded(answer)

    def post(path: str, function: Callable[[Any], Answer], **options: bool) -> Route:
        return Route(f"/api/{path}", answering(function, **options), methods=["POST"], max_body_size=MOST_JSON)

    return Starlette(
        routes=[
            Route("/", _file("index.html")),
            *(Route(f"/{name}", _file(name)) for name in PAGE),
            Route("/api/about", _guarded(about)),
            post("patients", room.patients, listing=True),
            post("slices", room.slices, listing=True),
            post("thumbnails", lambda request: room.thumbnails(request.get("rows"))),
            post("look", room.look, newest=True),
            post("paint", room.paint, newest=True),
            post("ask", room.ask, newest=True),
            post("ask_patients", room.ask_patients, newest=True),
            post("slice_of", room.slice_of, newest=True),
            Route("/api/bring", answering(room.bring, upload=True), methods=["PUT"], max_body_size=MOST_UPLOAD),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
                    Middleware(Guard, token=token)],
        lifespan=lifespan,
    )


def _file(name: str) -> Callable:
    async def answer(_: Request) -> Response:
        return FileResponse(STATIC / name, media_type=PAGE[name])
    return answer


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable:
    """Errors as answers in plain words. What is logged names a place in the program, never what was asked."""
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except UserError as error:
            return _refuse(400, str(error))
        except Busy:
            return _refuse(429, "the room is busy with other questions; ask again in a moment", {"Retry-After": "1"})
        except HTTPException as error:
            return _refuse(error.status_code, "the file or question is larger than the room takes")
        except (Superseded, ClientDisconnect):
            return _refuse(409, "a newer question has taken its place")
        except Exception as error:  # whatever it is, other questions are answered
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{request.url.path}: {type(error).__name__} at {place.filename}:{place.lineno}", file=sys.stderr)
            return _refuse(500, "the program failed at this question; others can be asked, and the fault is in its log")
    return answer


def _refuse(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise UserError("request: is no JSON object; load the page again")
    return request


def _pack(answer: Answer) -> Response:
    arrays = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in answer.arrays.items()}
    listed = [{"name": name, "type": array.dtype.str[1:], "shape": array.shape} for name, array in arrays.items()]
    head = json.dumps({"data": answer.data, "arrays": listed}, allow_nan=False).encode()
    head += b" " * (-len(head) % 4)
    parts = [array.tobytes() + bytes(-array.nbytes % 4) for array in arrays.values()]
    return Response(b"".join([struct.pack("<I", len(head)), head, *parts]), media_type=BYTES)
