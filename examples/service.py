"""Forget facts over HTTP: a FastAPI service around one ``cir.Editor``.

    pip install fastapi uvicorn prometheus-client
    export CIR_TOKEN=secret
    python examples/service.py --model some/llama --subspaces subspaces.safetensors --journal edits.cir

``POST /forget``, ``/edits/{number}/undo`` and ``/edits/{number}/redo`` answer when the work is done; ``GET /edits``,
``/metrics`` and ``/docs`` show what was done and how to ask. All but ``GET /health``, which shows no fact, need
``Authorization: Bearer $CIR_TOKEN``. Run one process only, behind a proxy that has TLS and a time limit for headers.
What is refused is answered with ``{"detail": "what was wrong"}``:

    400  the body is not JSON in UTF-8, or has a key twice
    401  no token, or a wrong one; nothing else of the request is looked at before
    404  no such path, or no edit of that number
    405  the path has no such method
    408  the body was not there in time
    409  the fact is forgotten already, or cannot be within the bounds; the edit is not one to undo, or to redo
    413  the body has more than 256 KiB
    415  the body is not application/json
    422  not a fact, or one that the model never knew; not the number of an edit
    500  the service failed, and its log says how
    503  too many changes are waiting, or the journal cannot be written: try again later

Done is 200, or 201 for a fact that was forgotten. uvicorn itself answers, in plain text, 400 to what is not HTTP and
503 where there are too many connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cir
from cir.editing.journal import JournalError

logger = logging.getLogger(__name__)
CONFIG_HELP = 'fields of cir.EditConfig as JSON, such as {"dose": 0.5}'
RETRY_AFTER = "5"  # seconds, about one edit
BODY_BYTES = 256 * 1024  # the largest fact that FactIn takes, in ASCII, has 200 kB
SHOWN = 500  # characters of a message: some of the library's quote what was sent
# Of the parsers that uvicorn may choose, h11 bounds the headers.
SERVER: dict[str, Any] = {"http": "h11", "ws": "none", "limit_concurrency": 64, "timeout_keep_alive": 5}
FAILED = "expected to do what was asked, got a failure; the log of the service says which"
UNWRITTEN = "expected a journal that can be written, got an error; the model is as it was"
GUARDED = [Depends(HTTPBearer(auto_error=False))]  # for the documentation: it is the gate that checks
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Id = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\P{Cc}+$")]  # no control characters
Number = Annotated[int, Field(ge=1, le=10**9)]


class ProbeIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: Text
    target: Text


class FactIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: Id
    sentences: Annotated[list[Text], Field(min_length=1, max_length=32)]
    probes: Annotated[list[ProbeIn], Field(max_length=32)] = []


class EditOut(BaseModel):
    """An edit: recall of its fact, its neighbours' recall and the rise of the text loss as measured when made."""

    number: int
    id: str
    status: str
    stopped: str
    recall_before: float
    recall_after: float
    neighbours_before: float | None
    neighbours_after: float | None
    rise: float
    rank: int
    nbytes: int
    seconds: float


class Health(BaseModel):
    ok: bool
    fingerprint: str
    active_edits: int


class Refusal(BaseModel):
    detail: str


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


class Changes:
    """The one thread that changes the model, and the bounded queue before it."""

    def __init__(self, editor: cir.Editor, metrics: Metrics, queue_size: int) -> None:
        self._editor, self._metrics = editor, metrics
        self._places = threading.BoundedSemaphore(queue_size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cir-editor")

    async def run(self, work: Callable[[], cir.Edit], refused: tuple[int, str]) -> EditOut:
        """What ``work`` does, in its turn; its ValueError becomes ``refused``, a status and a reason."""
        if not self._places.acquire(blocking=False):
            raise self._metrics.refuse(503, "queue_full", "too many edits are waiting", Retry_After=RETRY_AFTER)
        self._metrics.queue.inc()
        future = self._thread.submit(self._attempt, work, refused)
        # On the thread's future: the place is free when the work is over, not when the client has gone.
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._thread.shutdown()
        self._editor.close()

    def _attempt(self, work: Callable[[], cir.Edit], refused: tuple[int, str]) -> EditOut:
        try:
            edit = work()
        except cir.EditError as error:
            raise self._metrics.refuse(409, "out_of_bounds", str(error)) from error
        except (OSError, JournalError) as error:
            logger.error("the journal could not be written: %s", error)
            raise self._metrics.refuse(503, "journal", UNWRITTEN, Retry_After=RETRY_AFTER) from error
        except ValueError as error:
            raise self._metrics.refuse(*refused, str(error)) from error
        return shown(edit, {e.number: status for e, status in self._editor.history}[edit.number])

    def _leave(self, _: Future[EditOut]) -> None:
        self._metrics.queue.dec()
        self._places.release()


def shown(edit: cir.Edit, status: str) -> EditOut:
    return EditOut(
        number=edit.number,
        id=edit.id,
        status=status,
        stopped=edit.stopped,
        recall_before=edit.before.recall,
        recall_after=edit.after.recall,
        neighbours_before=edit.before.neighbours,
        neighbours_after=edit.after.neighbours,
        rise=edit.after.rise,
        rank=edit.rank,
        nbytes=edit.nbytes,
        seconds=edit.seconds,
    )


def create_app(editor: cir.Editor, *, token: str, queue_size: int = 8, body_seconds: float = 10.0) -> FastAPI:
    """The service; it closes ``editor`` when it stops.

    Args:
        queue_size: changes that may wait or run. body_seconds: that a client has to send the body of a request.

    Raises:
        ValueError: on an empty token, a queue without a place, or no time.
    """
    if not token:
        raise ValueError("token: expected one that is not empty, got ''")
    if queue_size < 1:
        raise ValueError(f"queue_size: expected at least 1, got {queue_size}")
    if not body_seconds > 0:
        raise ValueError(f"body_seconds: expected more than 0, got {body_seconds}")
    metrics = Metrics(editor)
    changes = Changes(editor, metrics, queue_size)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(changes.close)

    app = FastAPI(
        title="cir",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the host that the client named
        swagger_ui_oauth2_redirect_url=None,
        responses=answers(400, 405, 408, 413, 415, 500, 503),
    )
    app.add_middleware(Gate, token=token, body_seconds=body_seconds, metrics=metrics)
    _add_failures(app, metrics)
    _add_reads(app, editor, metrics)
    _add_changes(app, editor, metrics, changes)
    return app


def _add_failures(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        return answer(metrics.refuse(422, "invalid", f"{where}: {first['msg']}"))

    @app.exception_handler(Exception)  # logged by the server
    async def failed(_: Request, __: Exception) -> Response:
        return answer(metrics.refuse(500, "failed", FAILED))


def _add_reads(app: FastAPI, editor: cir.Editor, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Health:
        return Health(ok=True, fingerprint=editor.fingerprint, active_edits=len(editor.edits))

    @app.get("/edits", dependencies=GUARDED, responses=answers(401))
    async def edits() -> list[EditOut]:
        return [shown(edit, status) for edit, status in editor.history]

    @app.get("/metrics", dependencies=GUARDED, responses=answers(401), response_class=PlainTextResponse)
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_changes(app: FastAPI, editor: cir.Editor, metrics: Metrics, changes: Changes) -> None:
    # Counted where the work is done: a client that goes away cancels its handler, not the edit.
    @app.post("/forget", status_code=201, dependencies=GUARDED, responses=answers(401, 409, 422))
    async def forget(fact: FactIn) -> EditOut:
        def work() -> cir.Edit:
            forgotten = {edit.fact.sentences: edit.number for edit in editor.edits}
            if number := forgotten.get(tuple(fact.sentences)):
                raise metrics.refuse(409, "conflict", f"fact {fact.id!r}: already forgotten by edit {number}")
            edit = editor.forget(fact.model_dump())
            metrics.edits.inc()
            metrics.seconds.observe(edit.seconds)
            return edit

        return await changes.run(work, (422, "invalid"))

    async def again(number: int, change: Callable[[cir.Edit], cir.Edit], counter: Counter) -> EditOut:
        known = {edit.number: edit for edit, _ in editor.history}
        if number not in known:
            raise metrics.refuse(404, "unknown", f"expected the number of an edit, got {number}")

        def work() -> cir.Edit:
            edit = change(known[number])
            counter.inc()
            return edit

        return await changes.run(work, (409, "conflict"))

    @app.post("/edits/{number}/undo", dependencies=GUARDED, responses=answers(401, 404, 409, 422))
    async def undo(number: Number) -> EditOut:
        return await again(number, editor.undo, metrics.undos)

    @app.post("/edits/{number}/redo", dependencies=GUARDED, responses=answers(401, 404, 409, 422))
    async def redo(number: Number) -> EditOut:
        return await again(number, editor.redo, metrics.redos)


def open_editor(arguments: argparse.Namespace) -> cir.Editor:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return cir.Editor(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        cir.Subspaces.load(arguments.subspaces, model.device),
        neighbours=arguments.neighbours,
        text=Path(arguments.text).read_text(encoding="utf-8") if arguments.text else None,
        journal=arguments.journal,
        config=arguments.config,
    )


def edit_config(text: str) -> cir.EditConfig:
    return cir.EditConfig(**json.loads(text))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Forget facts over HTTP.")
    parser.add_argument("--model", required=True, help="a hub id or a local folder")
    parser.add_argument("--subspaces", required=True, help="what Subspaces.save wrote for that model")
    parser.add_argument("--journal", required=True, help="a file that keeps the edits, done again at each start")
    parser.add_argument("--text", help="a file, on which the loss is measured; by default the built-in text")
    parser.add_argument("--neighbours", help="facts that must stay, JSON lines; by default the contrast facts")
    parser.add_argument("--config", type=edit_config, default="{}", help=CONFIG_HELP)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(argv)
    token = os.environ.get("CIR_TOKEN", "")
    if not token:
        parser.error("expected a token in the environment variable CIR_TOKEN, got none")
    uvicorn.run(create_app(open_editor(arguments), token=token), host=arguments.host, port=arguments.port, **SERVER)


if __name__ == "__main__":
    main()
