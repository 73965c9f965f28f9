"""Forget facts over HTTP: a FastAPI service around one ``cir.Editor``.

    pip install fastapi uvicorn prometheus-client
    export CIR_TOKEN=secret
    python -m examples.service --model some/llama --subspaces subspaces.safetensors --journal edits.cir

``POST /forget`` answers 202 with a job, which ``GET /jobs/{id}`` shows until it is done or refused. With ``?wait=1``
it answers when the work is done, as do ``/edits/{number}/undo`` and ``/redo``. ``POST /ask`` has the model go on from
a prompt; ``GET /edits``, ``/metrics`` and ``/docs`` show what was done and how to ask. All but ``GET /health``, which
shows no fact, need ``Authorization: Bearer $CIR_TOKEN``. Run one process only, behind a proxy that has TLS and a time
limit for headers. What is refused is answered with ``{"detail": "what was wrong"}``:

    400  the body is not JSON in UTF-8, or has a key twice
    401  no token, or a wrong one; nothing else of the request is looked at before
    404  no such path, no edit of that number, or no such job
    405  the path has no such method
    408  the body was not there in time
    409  the fact is forgotten already, or cannot be within the bounds; the edit is not one to undo, or to redo
    413  the body has more than 256 KiB
    415  the body is not application/json
    422  not a fact, or one that the model never knew; not the number of an edit; not a prompt
    500  the service failed, and its log says how
    503  too many changes are waiting, or the journal cannot be written: try again later

Done is 200, or 201 for a fact that was forgotten. A job that was refused is shown with 200, and says in its body with
what status and why; jobs are gone after a restart, edits are not. uvicorn itself answers, in plain text, 400 to what
is not HTTP and 503 where there are too many connections.
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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest

import cir
from cir.editing.journal import JournalError
from examples.forms import EditOut, FactIn, Health, JobName, JobOut, Number, PromptIn, RefusedOut, SaidOut, shown
from examples.gate import Gate, Metrics, answer, answers

logger = logging.getLogger(__name__)
CONFIG_HELP = 'fields of cir.EditConfig as JSON, such as {"dose": 0.5}'
RETRY_AFTER = "5"  # seconds, about one edit
# Of the parsers that uvicorn may choose, h11 bounds the headers.
SERVER: dict[str, Any] = {"http": "h11", "ws": "none", "limit_concurrency": 64, "timeout_keep_alive": 5}
FAILED = "expected to do what was asked, got a failure; the log of the service says which"
UNWRITTEN = "expected a journal that can be written, got an error; the model is as it was"
REFUSALS = {
    cir.EditError: (409, "out_of_bounds"),
    cir.AlreadyForgottenError: (409, "conflict"),
    cir.UnknownFactError: (422, "not_known"),
}
JOBS = 1000  # kept, the last ones: many times as many as may wait
GUARDED = [Depends(HTTPBearer(auto_error=False))]  # for the documentation: it is the gate that checks
Out = TypeVar("Out")
Say = Callable[[str, int], str]  # what a model goes on with from a prompt, in so many tokens at most


class Changes:
    """The one thread that changes and asks the model, the bounded queue before it, and the last jobs."""

    def __init__(self, editor: cir.Editor, metrics: Metrics, queue_size: int) -> None:
        self._editor, self._metrics = editor, metrics
        self._jobs: dict[str, JobOut] = {}
        self._places = threading.BoundedSemaphore(queue_size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cir-editor")

    async def run(self, work: Callable[[], Out], refused: tuple[int, str]) -> Out:
        """What ``work`` gives, in its turn; its ValueError becomes ``refused``, a status and a reason."""
        return await asyncio.wrap_future(self._submit(partial(self._attempt, work, refused)))

    def start(self, work: Callable[[], EditOut], refused: tuple[int, str]) -> JobOut:
        """The same as a job."""
        name = secrets.token_hex(8)
        waiting = self._jobs[name] = JobOut(id=name, status="waiting")
        try:
            self._submit(partial(self._do, name, work, refused))
        except HTTPException:
            del self._jobs[name]
            raise
        while len(self._jobs) > JOBS:
            del self._jobs[next(iter(self._jobs))]
        return waiting

    def job(self, name: str) -> JobOut:
        if name not in self._jobs:
            raise self._metrics.refuse(404, "unknown", f"expected one of the last {JOBS} jobs, got {name}")
        return self._jobs[name]

    def _do(self, name: str, work: Callable[[], EditOut], refused: tuple[int, str]) -> None:
        self._jobs[name] = JobOut(id=name, status="running")
        try:
            outcome = JobOut(id=name, status="done", edit=self._attempt(work, refused))
        except HTTPException as error:  # not kept itself: with it, all that its frames hold would be
            why = RefusedOut(status=error.status_code, detail=error.detail)
            outcome = JobOut(id=name, status="refused", refused=why)
        self._jobs[name] = outcome

    def _submit(self, work: Callable[[], Out]) -> Future[Out]:
        if not self._places.acquire(blocking=False):
            raise self._metrics.refuse(503, "queue_full", "too many edits are waiting", Retry_After=RETRY_AFTER)
        self._metrics.queue.inc()
        future = self._thread.submit(work)
        # On the thread's future: the place is free when the work is over, not when the client has gone.
        future.add_done_callback(self._leave)
        return future

    def close(self) -> None:
        self._thread.shutdown()
        self._editor.close()

    def _attempt(self, work: Callable[[], Out], refused: tuple[int, str]) -> Out:
        try:
            return work()
        except tuple(REFUSALS) as error:
            why = next(why for kind, why in REFUSALS.items() if isinstance(error, kind))
            raise self._metrics.refuse(*why, str(error)) from error
        except (OSError, JournalError) as error:
            logger.error("the journal could not be written: %s", error)
            raise self._metrics.refuse(503, "journal", UNWRITTEN, Retry_After=RETRY_AFTER) from error
        except ValueError as error:
            raise self._metrics.refuse(*refused, str(error)) from error
        except Exception as error:  # not left to the server: nobody may be waiting for a job
            logger.exception("what was asked has failed")
            raise self._metrics.refuse(500, "failed", FAILED) from error

    def _leave(self, _: Future[Any]) -> None:
        self._metrics.queue.dec()
        self._places.release()


def create_app(
    editor: cir.Editor, *, token: str, say: Say | None = None, queue_size: int = 8, body_seconds: float = 10.0
) -> FastAPI:
    """The service; it closes ``editor`` when it stops.

    Args:
        say: answers ``POST /ask``, which is not there without it.
        queue_size: changes and questions that may wait or run. body_seconds: that a client has to send the body of
            a request.

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
    if say is not None:
        _add_ask(app, say, changes)
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
    def now(edit: cir.Edit) -> EditOut:
        return shown(edit, {e.number: status for e, status in editor.history}[edit.number])

    # Counted where the work is done: a client that goes away cancels its handler, not the edit.
    @app.post(
        "/forget",
        status_code=202,
        dependencies=GUARDED,
        responses={201: {"model": EditOut}, **answers(401, 409, 422)},
    )
    async def forget(fact: FactIn, response: Response, wait: bool = False) -> EditOut | JobOut:
        def work() -> EditOut:
            edit = editor.forget(fact.model_dump())
            metrics.edits.inc()
            metrics.seconds.observe(edit.seconds)
            return now(edit)

        if wait:
            response.status_code = 201
            return await changes.run(work, (422, "invalid"))
        job = changes.start(work, (422, "invalid"))
        response.headers["Location"] = f"/jobs/{job.id}"
        return job

    @app.get("/jobs/{name}", dependencies=GUARDED, responses=answers(401, 404, 422))
    async def job(name: JobName) -> JobOut:
        return changes.job(name)

    async def again(number: int, change: Callable[[cir.Edit], cir.Edit], counter: Counter) -> EditOut:
        known = {edit.number: edit for edit, _ in editor.history}
        if number not in known:
            raise metrics.refuse(404, "unknown", f"expected the number of an edit, got {number}")

        def work() -> EditOut:
            edit = change(known[number])
            counter.inc()
            return now(edit)

        return await changes.run(work, (409, "conflict"))

    @app.post("/edits/{number}/undo", dependencies=GUARDED, responses=answers(401, 404, 409, 422))
    async def undo(number: Number) -> EditOut:
        return await again(number, editor.undo, metrics.undos)

    @app.post("/edits/{number}/redo", dependencies=GUARDED, responses=answers(401, 404, 409, 422))
    async def redo(number: Number) -> EditOut:
        return await again(number, editor.redo, metrics.redos)


def _add_ask(app: FastAPI, say: Say, changes: Changes) -> None:
    @app.post("/ask", dependencies=GUARDED, responses=answers(401, 422))
    async def ask(asked: PromptIn) -> SaidOut:
        text = await changes.run(partial(say, asked.prompt, asked.max_tokens), (422, "invalid"))
        return SaidOut(text=text)


def continued(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """The likeliest words after ``prompt``, one token after the other."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    length, most = ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if not length or (most is not None and length + max_tokens > most):
        raise ValueError(f"prompt: expected 1 to {most} tokens with those to come, got {length} and {max_tokens}")
    written = model.generate(
        input_ids=ids.long(),
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    return tokenizer.decode(written[0, length:], skip_special_tokens=True)


def open_editor(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> cir.Editor:
    return cir.Editor(
        model,
        tokenizer,
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
    model, tokenizer = cir.load_model(arguments.model)
    editor = open_editor(arguments, model, tokenizer)
    app = create_app(editor, token=token, say=partial(continued, model, tokenizer))
    uvicorn.run(app, host=arguments.host, port=arguments.port, **SERVER)


if __name__ == "__main__":
    main()
