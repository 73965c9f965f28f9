"""Forget facts over HTTP: a FastAPI service around one ``cir.Editor``.

    pip install fastapi uvicorn prometheus-client
    export CIR_TOKEN=secret
    python examples/service.py --model some/llama --subspaces subspaces.safetensors --journal edits.cir

``POST /forget``, ``/edits/{number}/undo`` and ``/edits/{number}/redo`` need ``Authorization: Bearer $CIR_TOKEN`` and
answer when the work is done. ``GET /health``, ``/edits`` and ``/metrics`` need no token: they show the ids of facts,
so keep the port inside. Run one process only, behind a proxy that has TLS and bounds the size of bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import cir

CONFIG_HELP = 'fields of cir.EditConfig as JSON, such as {"dose": 0.5}'
RETRY_AFTER = "5"  # seconds, about one edit
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


class ProbeIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: Text
    target: Text


class FactIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(min_length=1, max_length=200)]
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
        return HTTPException(status, message, headers=named)


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

    def edit(self, number: int) -> cir.Edit:
        known = {edit.number: edit for edit, _ in self._editor.history}
        if number not in known:
            raise self._metrics.refuse(404, "unknown", f"expected the number of an edit, got {number}")
        return known[number]

    def listed(self) -> list[EditOut]:
        return [shown(edit, status) for edit, status in self._editor.history]

    def close(self) -> None:
        self._thread.shutdown()
        self._editor.close()

    def _attempt(self, work: Callable[[], cir.Edit], refused: tuple[int, str]) -> EditOut:
        try:
            edit = work()
        except cir.EditError as error:
            raise self._metrics.refuse(409, "out_of_bounds", str(error)) from error
        except ValueError as error:
            raise self._metrics.refuse(*refused, str(error)) from error
        except Exception:
            self._metrics.refusals.labels("failed").inc()
            raise
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


def create_app(editor: cir.Editor, *, token: str, queue_size: int = 8) -> FastAPI:
    """The service; it closes ``editor`` when it stops.

    Raises:
        ValueError: on an empty token or a queue without a place.
    """
    if not token:
        raise ValueError("token: expected one that is not empty, got ''")
    if queue_size < 1:
        raise ValueError(f"queue_size: expected at least 1, got {queue_size}")
    metrics = Metrics(editor)
    changes = Changes(editor, metrics, queue_size)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(changes.close)

    app = FastAPI(title="cir", lifespan=lifespan)
    _add_reads(app, editor, metrics, changes)
    _add_changes(app, editor, metrics, changes, token)
    return app


def _add_reads(app: FastAPI, editor: cir.Editor, metrics: Metrics, changes: Changes) -> None:
    @app.get("/health")
    async def health() -> Health:
        return Health(ok=True, fingerprint=editor.fingerprint, active_edits=len(editor.edits))

    @app.get("/edits")
    async def edits() -> list[EditOut]:
        return changes.listed()

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_changes(app: FastAPI, editor: cir.Editor, metrics: Metrics, changes: Changes, token: str) -> None:
    def authorised(given: Credentials) -> None:
        presented = given.credentials if given else ""
        if not secrets.compare_digest(presented.encode(), token.encode()):
            raise metrics.refuse(401, "unauthorised", "expected a valid bearer token", WWW_Authenticate="Bearer")

    guarded = [Depends(authorised)]

    # Counted where the work is done: a client that goes away cancels its handler, not the edit.
    @app.post("/forget", status_code=201, dependencies=guarded)
    async def forget(fact: FactIn) -> EditOut:
        def work() -> cir.Edit:
            edit = editor.forget(fact.model_dump())
            metrics.edits.inc()
            metrics.seconds.observe(edit.seconds)
            return edit

        return await changes.run(work, (422, "invalid"))

    async def again(number: int, change: Callable[[cir.Edit], cir.Edit], counter: Counter) -> EditOut:
        known = changes.edit(number)

        def work() -> cir.Edit:
            edit = change(known)
            counter.inc()
            return edit

        return await changes.run(work, (409, "conflict"))

    @app.post("/edits/{number}/undo", dependencies=guarded)
    async def undo(number: int) -> EditOut:
        return await again(number, editor.undo, metrics.undos)

    @app.post("/edits/{number}/redo", dependencies=guarded)
    async def redo(number: int) -> EditOut:
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
    uvicorn.run(create_app(open_editor(arguments), token=token), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
