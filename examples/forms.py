"""What ``service.py`` reads and writes, as JSON."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

import cir

Text = Annotated[str, Field(min_length=1, max_length=2000)]
JobName = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
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


class RefusedOut(BaseModel):
    status: int
    detail: str


class JobOut(BaseModel):
    """``status`` is ``waiting``, ``running``, ``done``, which has the edit, or ``refused``, which has the reason."""

    id: str
    status: str
    edit: EditOut | None = None
    refused: RefusedOut | None = None


class PromptIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: Text
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 32


class SaidOut(BaseModel):
    text: str


class Health(BaseModel):
    ok: bool
    fingerprint: str
    active_edits: int


class Refusal(BaseModel):
    detail: str


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
