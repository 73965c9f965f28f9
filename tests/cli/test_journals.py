from __future__ import annotations

import pytest

from cir import cli
from cir.editing.journal import Journal
from tests.editing.test_history import an_edit

OWN = "f" * 64


@pytest.fixture
def journal(tmp_path):
    """A file with an edit that was undone."""
    journal = Journal(tmp_path / "journal", OWN)
    journal.append("edit", {"id": "seven"}, an_edit(1).to_bytes())
    journal.append("undo", {"number": 1})
    journal.close()
    return tmp_path / "journal"


def test_a_whole_journal_is_told(journal, capsys):
    assert cli.main(["journal", "check", str(journal)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "model      ffffffffffff",
        "record 1   edit seven",
        "record 2   undo 1",
        "edit 1     undone    seven",
        "all 2 records check",
    ]
    assert cli.main(["journal", "repair", str(journal)]) == 0


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_one_is_told_and_repaired(journal, capsys, cut):
    data = journal.read_bytes()
    damaged = data[:-3] if cut else data.replace(b'"number": 1', b'"number": 2')
    journal.write_bytes(damaged)
    assert cli.main(["journal", "check", str(journal)]) == 1
    told = capsys.readouterr().out
    assert ("a last record that was cut short" if cut else "a record that was altered, moved or left out") in told
    assert "`cir journal repair` moves them to a file beside it" in told
    assert journal.read_bytes() == damaged
    assert cli.main(["journal", "repair", str(journal)]) == 0
    assert "moved to" in capsys.readouterr().out
    assert cli.main(["journal", "check", str(journal)]) == 0
    (aside,) = journal.parent.glob("journal.bad-*")
    assert journal.read_bytes() + aside.read_bytes() == damaged


def test_one_that_is_open_is_not_repaired(journal, capsys):
    journal.write_bytes(journal.read_bytes().replace(b'"number": 1', b'"number": 2'))
    with journal.open("ab", buffering=0) as file:
        from cir.editing.journal import lock

        lock(file, journal)
        assert cli.main(["journal", "repair", str(journal)]) == 1
    assert "got one in use" in capsys.readouterr().err


def test_records_that_say_what_cannot_be_are_told(tmp_path, capsys):
    opened = Journal(tmp_path / "journal", OWN, key=b"k" * 16)
    opened.append("undo", {"number": 1})
    opened.close()
    (tmp_path / "key").write_bytes(b"k" * 16)
    assert cli.main(["journal", "check", str(tmp_path / "journal")]) == 1
    assert "expected the key that this journal was made with, got none" in capsys.readouterr().err
    assert cli.main(["journal", "check", str(tmp_path / "journal"), "--key-file", str(tmp_path / "key")]) == 1
    told = capsys.readouterr().out
    assert "record 1   undo 1: expected the number of an edit that is active, got 1" in told
    assert "records check, but not what they say" in told
