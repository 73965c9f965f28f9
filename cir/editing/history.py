"""The edits of one model in the order they were made, and what has become of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cir.editing.edits import Edit
from cir.editing.journal import Record

STATES = {"undo": ("active", "undone"), "redo": ("undone", "active")}
"""By kind of record: what an edit must be, and what it is then."""


@dataclass
class Entry:
    edit: Edit
    status: str
    """``active``, ``undone`` or ``committed``."""


class History:
    """Edits of the model with that ``fingerprint``, the first with number 1."""

    def __init__(self, fingerprint: str) -> None:
        self.entries: list[Entry] = []
        self._fingerprint = fingerprint

    @property
    def active(self) -> list[Edit]:
        """Those in effect that can be undone."""
        return [entry.edit for entry in self.entries if entry.status == "active"]

    def find(self, edit: Edit | None, status: str) -> Entry:
        """The entry of ``edit``, or the last, that is of that status; raises ValueError where there is none."""
        of = [e for e in self.entries if e.status == status and (edit is None or e.edit.number == edit.number)]
        if not of:
            which = "an edit" if edit is None else f"edit {edit.number} ({edit.id!r})"
            states = {e.edit.number: e.status for e in self.entries}
            raise ValueError(f"expected {which} that is {status}, got {states or 'none at all'}")
        return of[-1]

    def take(self, record: Record) -> None:
        """Do what a journal's record says was done.

        Raises:
            ValueError: if it does not follow from those before, or says nothing that is known.
        """
        if record.kind == "edit":
            self.add(Edit.from_bytes(record.payload))
        elif record.kind == "commit":
            for entry in self.entries:
                entry.status = "committed" if entry.status == "active" else entry.status
        elif record.kind in STATES:
            was, becomes = STATES[record.kind]
            self._numbered(record.about.get("number"), was).status = becomes
        else:
            raise ValueError(f"expected a record of edit, undo, redo or commit, got {record.kind!r:.80}")

    def add(self, edit: Edit) -> None:
        """One that was made; raises ValueError if it is not the next, or of another model."""
        if edit.number != len(self.entries) + 1:
            raise ValueError(f"expected edit {len(self.entries) + 1}, got edit {edit.number}")
        if edit.fingerprint != self._fingerprint:
            raise ValueError(f"expected an edit of {self._fingerprint[:12]}, got one of {edit.fingerprint[:12]}")
        self.entries.append(Entry(edit, "active"))

    def _numbered(self, number: Any, status: str) -> Entry:
        found = [e for e in self.entries if e.edit.number == number and e.status == status]
        if not found:
            raise ValueError(f"expected the number of an edit that is {status}, got {number!r:.80}")
        return found[0]
