"""``cir journal``: what an editor's journal holds, and what is wrong with it. No model is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cir.cli.output import DONE, FAILED, Outcome, say
from cir.editing.history import History
from cir.editing.journal import Contents, lock, read_journal, set_aside


def run(arguments: argparse.Namespace) -> Outcome:
    """``check`` it or ``repair`` it; 1 where something is wrong and stays."""
    path = Path(arguments.file)
    key = None if arguments.key_file is None else Path(arguments.key_file).read_bytes()
    contents = read_journal(path, key)
    told = _told(contents)
    status = FAILED if told["wrong"] else DONE
    if not contents.tail:
        say("records check, but not what they say" if told["wrong"] else f"all {len(contents.records)} records check")
        return status, {**told, "damage": None, "moved_to": None}
    what = "a last record that was cut short" if contents.cut else "a record that was altered, moved or left out"
    damage = {"byte": contents.good, "what": what, "bytes": len(contents.tail)}
    say(f"at byte {contents.good}: {what}, and {len(contents.tail)} bytes from there on")
    if arguments.what == "repair":
        with path.open("ab", buffering=0) as file:
            lock(file, path)
            aside = set_aside(path, contents)
        say(f"moved to {aside}")
        return status, {**told, "damage": damage, "moved_to": str(aside)}
    say("`cir journal repair` moves them to a file beside it; what they forgot is there again then")
    return FAILED, {**told, "damage": damage, "moved_to": None}


def _told(contents: Contents) -> dict[str, Any]:
    """Print what the records say; ``wrong`` says of one that it does not follow from those before."""
    own, records, wrong = str(contents.about.get("fingerprint")), [], None
    say(f"model      {own[:12]}")
    history = History(own)
    for number, record in enumerate(contents.records, 1):
        about = record.about.get("id", record.about.get("number", ""))
        try:
            history.take(record)
        except ValueError as error:
            wrong = f"record {number}, {record.kind} {about}: {error}"
            say(f"record {number}   {record.kind} {about}: {error}")
            break
        records.append({"kind": record.kind, **record.about})
        say(f"record {number}   {record.kind} {about}")
    edits = [{"number": e.edit.number, "status": e.status, "id": e.edit.id} for e in history.entries]
    for edit in edits if wrong is None else ():
        say(f"edit {edit['number']}     {edit['status']:<10}{edit['id']}")
    return {"model": own, "records": records, "edits": edits, "wrong": wrong}
