"""``cir journal``: what an editor's journal holds, and what is wrong with it. No model is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from cir.cli.output import say
from cir.editing.history import History
from cir.editing.journal import Contents, lock, read_journal, set_aside


def run(arguments: argparse.Namespace) -> int:
    """``check`` it or ``repair`` it; 1 where something is wrong and stays."""
    path = Path(arguments.file)
    key = None if arguments.key_file is None else Path(arguments.key_file).read_bytes()
    contents = read_journal(path, key)
    wrong = _told(contents)
    if not contents.tail:
        say(f"all {len(contents.records)} records check" if not wrong else "records check, but not what they say")
        return 1 if wrong else 0
    what = "a last record that was cut short" if contents.cut else "a record that was altered, moved or left out"
    say(f"at byte {contents.good}: {what}, and {len(contents.tail)} bytes from there on")
    if arguments.what == "repair":
        with path.open("ab", buffering=0) as file:
            lock(file, path)
            say(f"moved to {set_aside(path, contents)}")
        return 1 if wrong else 0
    say("`cir journal repair` moves them to a file beside it; what they forgot is there again then")
    return 1


def _told(contents: Contents) -> bool:
    """Print what the records say; whether one does not follow from those before."""
    say(f"model      {str(contents.about.get('fingerprint'))[:12]}")
    history = History(str(contents.about.get("fingerprint")))
    for number, record in enumerate(contents.records, 1):
        about = record.about.get("id", record.about.get("number", ""))
        try:
            history.take(record)
        except ValueError as error:
            say(f"record {number}   {record.kind} {about}: {error}")
            return True
        say(f"record {number}   {record.kind} {about}")
    for entry in history.entries:
        say(f"edit {entry.edit.number}     {entry.status:<10}{entry.edit.id}")
    return False
