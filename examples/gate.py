"""What stands before the routes of ``service.py``: the gate that each request must pass, refusals and metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cir
from examples.forms import Refusal

BODY_BYTES = 256 * 1024  # the largest fact that the service takes, in ASCII, has 200 kB
SHOWN = 500  # characters of a message: some of the library's quote what was sent


class Metrics:
    def __init__(self, editor: cir.Editor) -> None:
        self.registry = CollectorRegistry()
        self.edits = Counter("cir_edits", "Facts forgotten.", registry=self.registry)
        self.undos = Counter("cir_undos", "Edits undone.", registry=self.registry)
        self.redos = Counter("cir_redos", "Edits done again.", registry=self.registry)
        self.refusals = Counter("cir_refusals", "Requests refused.", ["reason"], registry=self.registry)
        buckets = (0.5, 1, 2, 5, 10, 20, 60, 120, 300)
        self.seconds = Histogram("cir_edit_seconds", "Duration of an edit.", buckets=buckets, registry=self.registry)
        self.queue = Gauge("cir_queue_length", "Changes waiting or running.", registry=self.registry)
        active = Gauge("cir_active_edits", "Edits in effect.", registry=self.registry)
        active.set_function(lambda: len(editor.edits))

    def refuse(self, status: int, reason: str, message: str, **headers: str) -> HTTPException:
        self.refusals.labels(reason).inc()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return HTTPException(status, message[:SHOWN], headers=named)


class Gate:
    """What a request must pass before any route sees it: the token, then size, time, type and form of its body."""

    def __init__(self, app: ASGIApp, token: str, body_seconds: float, metrics: Metrics) -> None:
        self._app, self._token, self._seconds, self._refuse = app, token.encode(), body_seconds, metrics.refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            body = [await self._admitted(scope, receive)]
        except HTTPException as refusal:
            # Closed, or the server would go on to read what is left of the body.
            return await answer(refusal, Connection="close")(scope, receive, send)

        async def replayed() -> Message:
            return {"type": "http.request", "body": body.pop()} if body else await receive()

        return await self._app(scope, replayed, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request that may pass."""
        request = Request(scope)
        self._check_head(request)
        try:
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except asyncio.TimeoutError:
            raise self._refuse(408, "too_slow", f"expected the body within {self._seconds:g} s, got a part") from None
        self._check_form(request.headers.get("content-type", ""), body)
        return body

    def _check_head(self, request: Request) -> None:
        scheme, _, token = ", ".join(request.headers.getlist("authorization")).partition(" ")
        right = scheme.lower() == "bearer" and secrets.compare_digest(token.strip().encode("latin-1"), self._token)
        if not right and (request.method, request.scope["path"]) != ("GET", "/health"):
            raise self._refuse(401, "unauthorised", "expected a valid bearer token", WWW_Authenticate="Bearer")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > BODY_BYTES:
            raise self._refuse(413, "too_large", f"expected at most {BODY_BYTES} bytes, got {length[:20]} announced")

    async def _read(self, receive: Receive) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise self._refuse(400, "malformed", "expected a whole body, got the end of the connection")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > BODY_BYTES:
                raise self._refuse(413, "too_large", f"expected at most {BODY_BYTES} bytes, got more")
        return bytes(body)

    def _check_form(self, content_type: str, body: bytes) -> None:
        if body and content_type.partition(";")[0].strip().lower() != "application/json":
            raise self._refuse(415, "malformed", "expected a body of type application/json, got another")
        try:
            json.loads(body.decode() or "null", object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise self._refuse(400, "malformed", f"expected JSON in UTF-8, got {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice in one object")
    return dict(pairs)


def answer(refusal: HTTPException, **headers: str) -> JSONResponse:
    return JSONResponse({"detail": refusal.detail}, refusal.status_code, {**(refusal.headers or {}), **headers})


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the documentation of a route says of its refusals."""
    return {status: {"model": Refusal} for status in statuses}
