"""Requests to the service in ``examples``: good ones, and ones that are wrong in every way that a client has."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI

import cir
from cir.data.facts import load_facts, probed
from cir.editing.edits import Edit, State
from cir.editing.journal import JournalError
from cir.forgetting.update import NonFiniteError
from examples import gate, service

TOKEN = "secret"
INTERNAL = "/srv/journal.cir"
"""In the messages of failures, where it must stay."""
FAILURES: dict[str, tuple[Exception, int]] = {
    "disk": (OSError(28, "No space left on device", INTERNAL), 503),
    "journal": (JournalError(f"{INTERNAL}: expected the journal that was opened, got none: it was deleted"), 503),
    "numbers": (NonFiniteError(f"expected finite gradients, got NaN at {INTERNAL}"), 500),
    "memory": (MemoryError(INTERNAL), 500),
    "bug": (KeyError(INTERNAL), 500),
    "bounds": (cir.EditError("neighbours suffer"), 409),
    "never known": (cir.UnknownFactError("expected a fact that the model knows"), 422),
    "forgotten": (cir.AlreadyForgottenError("already forgotten by edit 1"), 409),
}
"""What an editor raises on a fact of this id, and what is answered."""
FORGET = "/forget?wait=1"
ANYWHERE = {400, 401, 404, 405, 408, 413, 415}
"""What may be answered before a route is found, so that no route documents it."""
PAGES = {"/docs", "/redoc", "/openapi.json"}
LONGEST_REFUSAL, LONGEST = 4096, 256 * 1024
"""Bytes of an answer."""
WAIT = 0.03
"""Seconds in which a body must be there."""


@dataclass(frozen=True)
class Request:
    kind: str
    expected: set[int]
    method: str
    path: str
    body: bytes = b""
    tokens: tuple[str, ...] = (f"Bearer {TOKEN}",)
    length: str | None = "right"
    type: str | None = "application/json"
    ending: str = "whole"
    """How the body ends: ``whole``, ``half`` with silence, ``gone`` with the connection, or ``endless``."""
    unread: bool = False
    """Whether it must be answered before any of the body is read."""


@dataclass
class Answer:
    status: int | None = None
    type: str = ""
    body: bytes = b""
    read: int = 0
    """Bytes of the request's body."""


class Stub:
    """An editor without a model: it reads facts as the real one does, and fails where the id of one says so."""

    fingerprint = "0" * 64

    def __init__(self) -> None:
        self.history: tuple[tuple[Edit, str], ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for edit, status in self.history if status != "undone")

    def forget(self, given: Any) -> Edit:
        fact = probed(load_facts([given])[0])
        if fact.id in FAILURES:
            raise FAILURES[fact.id][0]
        measured = State(recall=0.5, neighbours=float("nan"))
        edit = Edit(fact.id, len(self.history) + 1, fact, {}, 1.0, *[measured] * 3, 1, 0.1, "forgotten", "0" * 64)
        self.history += ((edit, "active"),)
        return edit

    def undo(self, edit: Edit) -> Edit:
        return self._change(edit, "active", "undone")

    def redo(self, edit: Edit) -> Edit:
        return self._change(edit, "undone", "active")

    def close(self) -> None:
        pass

    def _change(self, edit: Edit, before: str, after: str) -> Edit:
        if (edit, before) not in self.history:
            raise ValueError(f"expected edit {edit.number} ({edit.id!r}) that is {before}")
        self.history = tuple((e, after if e is edit else status) for e, status in self.history)
        return edit


GOOD = {
    "id": "fact #",
    "sentences": ["the capital of land# is town#"],
    "probes": [{"prompt": "land# has", "target": " town#"}],
}
"""A fact; the number of the request stands for each ``#``."""
PROBE = GOOD["probes"][0]


def _fact(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def _raw(text: str) -> bytes:
    """A fact whose id is ``text``, as it stands."""
    return _fact(id="raw").replace(b'"raw"', text.encode("utf-8", "surrogatepass"))


NOT_JSON = {
    "cut": _fact()[:-5],
    "a key twice": _fact()[:-1] + b', "id": "other"}',
    "a key twice within": _fact().replace(b'"target"', b'"prompt": "b", "target"'),
    "not UTF-8": _fact(id="raw").replace(b"raw", b"\xff\xfe"),
    "Latin-1": json.dumps({**GOOD, "id": "café"}, ensure_ascii=False).encode("latin-1"),
    "UTF-16": _fact().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + _fact(),
    "a surrogate in UTF-8": _raw('"\ud800"'),
    "a bare line break": _raw('"a\nb"'),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"id":' * 40_000,
    "two documents": _fact() * 2,
    "only spaces": b"   ",
    "words": b"forget everything",
    "a form": b"id=1&sentences=a",
}
NOT_FACTS = {
    "nothing": b"",
    "null": b"null",
    "a number": b"1e999",
    "a list": b"[" + _fact() + b"]",
    "text": b'"a fact"',
    "NaN as id": _raw("NaN"),
    "infinity as id": _raw("-Infinity"),
    "a float as id": _raw("1e400"),
    "4000 digits as id": _raw("9" * 4000),
    "no id": _fact(id=None),
    "a list as id": _fact(id=["a"]),
    "a lone surrogate as id": _raw(r'"\ud800"'),
    "a lone surrogate in a sentence": _fact(sentences=["a \udfff b"]),
    "a lone surrogate in a probe": _fact(probes=[{"prompt": "a \ud800", "target": " b"}]),
    "a lone surrogate as key": _fact(**{"\ud800": 1}),
    "NUL in the id": _fact(id="a\0b"),
    "an escape in the id": _fact(id="\x1b[31m"),
    "a line break in the id": _fact(id="a\nb"),
    "DEL in the id": _fact(id="\x7f"),
    "C1 in the id": _fact(id="\x85"),
    "an empty id": _fact(id=""),
    "a long id": _fact(id="\U0010ffff" * 201),
    "a very long id": _fact(id="x" * 200_000),
    "a long key": _fact(**{"x" * 100_000: 1}),
    "many keys": _fact(**{f"key{i}": i for i in range(10_000)}),
    "many faults": _fact(sentences=[""] * 60_000),
    "no sentences": _fact(sentences=[]),
    "a sentence of another type": _fact(sentences=[1]),
    "one sentence, not in a list": _fact(sentences="a b"),
    "33 sentences": _fact(sentences=["a b"] * 33),
    "a long sentence": _fact(sentences=["a" * 2001]),
    "a blank sentence": _fact(sentences=[" \t"]),
    "deep sentences": _fact(sentences="raw").replace(b'"raw"', b"[" * 100 + b"]" * 100),
    "a probe without target": _fact(probes=[{"prompt": "a"}]),
    "a blank target": _fact(probes=[{"prompt": "\U0010ffff" * 2000, "target": " "}]),
    "33 probes": _fact(probes=[PROBE] * 33),
    "nothing to ask": _fact(sentences=["word"], probes=[]),
    "an infinite key": _fact(dose=float("inf")),
}
GOOD_FACTS = {
    "a fact": _fact(),
    "another key order": json.dumps(dict(reversed(GOOD.items()))).encode(),
    "no probes": json.dumps({k: v for k, v in GOOD.items() if k != "probes"}).encode(),
    "an odd id": _fact(id="\U0010ffff\u202e" * 100),
    "a pair of surrogates": _fact().replace(b"land#", rb"land# \ud83d\ude00"),
    "the longest": _fact(sentences=[f"{i} #" + "a" * 1990 for i in range(32)]),
}
PROMPTS = {
    b'{"prompt": "land"}': 200,
    rb'{"prompt": "\u0000", "max_tokens": 256}': 200,
    **dict.fromkeys((b"{}", b'{"prompt": ""}', rb'{"prompt": "\ud800"}', _fact()), 422),
    **dict.fromkeys((b'{"prompt": "a", "max_tokens": %s}' % n for n in (b"0", b"257", b"1.5", b"1e999")), 422),
    json.dumps({"prompt": "a" * 2001}).encode(): 422,
}
NUMBERS: list[tuple[set[int], tuple[str, ...]]] = [
    ({200, 404, 409}, ("1", "2", "3")),
    ({404}, ("1000000000", "999999")),
    ({422}, ("0", "-1", "x", "1.5", "1e3", "NaN", "\0", "\ufffd", "%31", "²", "9" * 5000, "1000000001")),
]


def _asks() -> Iterator[Request]:
    """Requests that come with the token and whole, right and wrong ones."""
    for path in ("/health", "/edits", "/metrics", *sorted(PAGES)):
        yield Request("a page", {200}, "GET", path)
        wrong = {200} if path in PAGES else {405}  # there, and there alone, GET may be HEAD
        yield Request("another method", wrong, "HEAD", path)
        yield Request("another method", {405}, "DELETE", path)
    for method in ("GET", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW"):
        yield Request("another method", {405}, method, FORGET, body=_fact())
    for path in ("/", "/nowhere", "/health/", "/forget/", "/edits/1/commit", "/edits//undo", "/\0", "//x/y"):
        yield Request("another path", {404}, "POST", path)
        yield Request("another path", {404}, "GET", path + "\ufffd" * 3000)
    for expected, bodies in (({201}, GOOD_FACTS), ({400}, NOT_JSON), ({422}, NOT_FACTS)):
        for kind, body in bodies.items():
            yield Request(kind, expected, "POST", FORGET, body=body)
    yield Request("NUL in a sentence", {201, 422}, "POST", FORGET, body=_fact(sentences=["a# b\0 \x1b[31m c"]))
    yield Request("5000 digits as id", {400, 422}, "POST", FORGET, body=_raw("9" * 5000))
    for wait, status in (("", 202), ("?wait=0", 202), ("?wait=x", 422), ("?wait=" + "9" * 5000, 422)):
        yield Request("to wait", {status}, "POST", f"/forget{wait}", body=_fact())
    yield Request("a job that fails", {202}, "POST", "/forget", body=_fact(id="disk"))
    for job, status in (("0" * 16, 404), ("F" * 16, 422), ("0" * 16 + "\n", 422), ("9" * 5000, 422), ("²" * 16, 422)):
        yield Request("a job", {status}, "GET", f"/jobs/{job}")
    for body, status in PROMPTS.items():
        yield Request("a prompt", {status}, "POST", "/ask", body=body)
    yield Request("the same fact", {201, 409}, "POST", FORGET, body=_fact(sentences=["the same again"]))
    for name, (_, status) in FAILURES.items():
        yield Request(f"a failure: {name}", {status}, "POST", FORGET, body=_fact(id=name))
    for statuses, numbers in NUMBERS:
        for number in numbers:
            yield Request("a number", statuses, "POST", f"/edits/{number}/undo")
            yield Request("a number", statuses, "POST", f"/edits/{number}/redo")


def _faults() -> Iterator[dict[str, Any]]:
    """What may be wrong with a request whatever it asks, in the order in which the service looks."""
    right = f"Bearer {TOKEN}"
    wrong = ("", "Bearer", "Bearer  ", "Bearer Secret", "Basic c2VjcmV0", TOKEN, f"{right}2", "Bearer \xff\0", "\0")
    for tokens in ((), (right, right), (f"Bearer {'x' * 10_000}",), *((token,) for token in wrong)):
        yield {"tokens": tokens, "expected": {401}, "unread": True}
    for length in ("262145", "200000000", "9" * 20, "9" * 5000, "-1", "abc", "1e3", "", "\xb2"):
        yield {"length": length, "expected": {413}, "unread": True}
    yield {"ending": "endless", "length": None, "expected": {413}}
    yield {"ending": "half", "expected": {408}}
    yield {"ending": "half", "length": None, "expected": {408}}
    yield {"ending": "gone", "expected": {400}}
    subtypes = ("problem+json", "json5", "xml", "x-www-form-urlencoded", "a" * 10_000)
    for wrong_type in (None, "", "json", "\xff", "text/plain", *(f"application/{subtype}" for subtype in subtypes)):
        yield {"type": wrong_type, "expected": {415}}


ASKS, FAULTS = list(_asks()), list(_faults())


def requests(count: int, seed: int = 0) -> Iterator[Request]:
    """Requests of every kind in turn, each second one with a fault or two."""
    chance = random.Random(seed)
    asks, faults = chance.sample(ASKS, len(ASKS)), chance.sample(FAULTS, len(FAULTS))
    for number in range(count):
        request = asks[number % len(asks)]
        request = replace(request, body=request.body.replace(b"#", str(number).encode()))
        if (number + number // len(asks)) % 2:
            found = [faults[number // 2 % len(faults)], *chance.sample(faults, chance.choice((0, 0, 1)))]
            # What the service finds first comes last, and says what is expected.
            for fault in sorted(found, key=FAULTS.index, reverse=True):
                request = _with(request, fault)
        if request.length == "right" and chance.random() < 0.3:
            request = replace(request, length=None)
        yield request


def _with(request: Request, fault: dict[str, Any]) -> Request:
    if "tokens" in fault and (request.method, request.path) == ("GET", "/health"):
        return replace(request, tokens=fault["tokens"])
    if "type" in fault and not request.body:
        request = replace(request, body=b"{}")
    return replace(request, kind=f"{request.kind}, {str(fault)[:80]}", **fault)


async def ask(app: FastAPI, request: Request) -> Answer:
    """What ``app`` answers, asked as a server would ask it."""
    answer = Answer()
    pieces = _pieces(request)

    async def receive() -> dict[str, Any]:
        piece = next(pieces, None)
        if piece is not None:
            answer.read += len(piece["body"])
            return piece
        if request.ending == "half":
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.type = dict(message["headers"]).get(b"content-type", b"").decode()
        else:
            answer.body += message.get("body", b"")

    path, _, query = request.path.partition("?")
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": query.encode(), "root_path": ""}
    scope |= {"method": request.method, "path": path, "headers": _headers(request)}
    try:
        await asyncio.wait_for(app(scope, receive, send), 0.3 if request.ending == "half" else 10)
    except Exception as error:  # raised again for the server's log, after the answer
        answer.type += "" if answer.status else repr(error)
    return answer


def _headers(request: Request) -> list[tuple[bytes, bytes]]:
    length = str(len(request.body)) if request.length == "right" else request.length
    named = [("host", "x"), ("content-length", length), ("content-type", request.type)]
    named += [("authorization", token) for token in request.tokens]
    return [(name.encode(), value.encode("latin-1")) for name, value in named if value is not None]


def _pieces(request: Request) -> Iterator[dict[str, Any]]:
    if request.ending == "endless":
        yield from ({"type": "http.request", "body": bytes(65536), "more_body": True} for _ in range(3200))
        return
    whole = request.ending == "whole"
    body = request.body if whole else request.body[: len(request.body) // 2]
    starts = range(0, len(body), 50_000) or range(1)
    for start in starts:
        more = start != starts[-1] or not whole
        yield {"type": "http.request", "body": body[start : start + 50_000], "more_body": more}


def faults_of(request: Request, answer: Answer, documented: set[int]) -> Iterator[str]:
    """What is wrong with ``answer``."""
    if answer.status not in request.expected:
        yield f"expected {sorted(request.expected)}, got {answer.status or 'no answer'}"
    if answer.status not in documented:
        yield f"expected a status that is documented, {sorted(documented)}, got {answer.status}"
    refused = answer.status is None or answer.status >= 400
    longest = LONGEST_REFUSAL if refused else LONGEST
    if len(answer.body) > longest:
        yield f"expected at most {longest} bytes, got {len(answer.body)}"
    if request.unread and answer.read:
        yield f"expected the body to be left, got {answer.read} bytes read"
    if answer.read > gate.BODY_BYTES + 65536:
        yield f"expected at most {gate.BODY_BYTES} bytes to be read, got {answer.read}"
    if INTERNAL.encode() in answer.body:
        yield "expected nothing internal, got a path"
    if refused or answer.type.startswith("application/json"):
        yield from _wrong_json(answer, refused)
    elif request.path not in PAGES | {"/metrics"}:
        yield f"expected JSON, got {answer.type}"


def _wrong_json(answer: Answer, refused: bool) -> Iterator[str]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        parsed = json.loads(answer.body.decode(), parse_constant=refuse)
    except ValueError as error:
        yield f"expected JSON, got {error}: {answer.body[:80]!r} {answer.type[:80]}"
        return
    detail = parsed.get("detail") if isinstance(parsed, dict) and len(parsed) == 1 else None
    if refused and not isinstance(detail, str):
        yield f"expected a detail in words, got {answer.body[:80]!r}"


def documented(schema: dict[str, Any], request: Request) -> set[int]:
    """The statuses that the documentation of the service has for ``request``."""
    for template, operations in schema["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), request.path.partition("?")[0]):
            operation = operations.get(request.method.lower())
            return {int(status) for status in operation["responses"]} if operation else ANYWHERE
    return ANYWHERE | {200} if request.path in PAGES else ANYWHERE


def create(editor: Any) -> FastAPI:
    return service.create_app(editor, token=TOKEN, say=lambda prompt, count: prompt * count, body_seconds=WAIT)


def sweep(count: int, seed: int = 0, create: Callable[[Any], FastAPI] = create, editor: Any = None) -> list[str]:
    """The faults of the answers to ``count`` requests, each with its request.

    Args:
        create: makes the service of an editor. editor: one that does as :class:`Stub`, by default that.
    """

    async def all_of_them() -> list[str]:
        app = create(Stub() if editor is None else editor)
        schema, found = app.openapi(), []
        async with app.router.lifespan_context(app):
            for number, request in enumerate(requests(count, seed)):
                answer = await ask(app, request)
                where = f"request {number}, {request.method} {request.path[:40]!r} ({request.kind})"
                found += [f"{where}: {fault}" for fault in faults_of(request, answer, documented(schema, request))]
        return found

    return asyncio.run(all_of_them())
