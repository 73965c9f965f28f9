from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cir.editing.journal import Journal, JournalError

OWN = "f" * 64


def write(path, *records):
    """A closed journal with ``records``, and where each ends."""
    ends = []
    journal = Journal(path, OWN)
    for record in records:
        journal.append(*record)
        ends.append(path.stat().st_size)
    journal.close()
    return ends


def read(path):
    journal = Journal(path, OWN)
    journal.close()
    return [(record.kind, record.about, record.payload) for record in journal.records]


THREE = [("edit", {"id": "a"}, b"\x00\n\xff" * 50), ("undo", {"number": 1}, b""), ("edit", {"id": "b"}, b"{}\n")]


def test_gives_back_what_was_written_also_in_pieces(tmp_path):
    path = tmp_path / "new" / "journal"
    write(path, *THREE[:2])
    write(path, THREE[2])
    assert read(path) == THREE


def test_keeps_the_records_before_a_cut(tmp_path, caplog):
    whole = tmp_path / "whole"
    ends = write(whole, *THREE)
    data = whole.read_bytes()
    for length in range(ends[0], len(data)):
        path = tmp_path / f"cut-{length}"
        path.write_bytes(data[:length])
        kept = sum(end <= length for end in ends)
        assert read(path) == THREE[:kept]
        aside = path.with_name(f"{path.name}.bad-{ends[kept - 1]}")
        assert aside.exists() == (length != ends[kept - 1])
        assert not aside.exists() or aside.read_bytes() == data[ends[kept - 1] : length]
        write(path, ("commit", {}, b""))
        assert read(path) == [*THREE[:kept], ("commit", {}, b"")]
    assert "do not check" in caplog.text


@pytest.mark.parametrize("change", ["payload", "about", "order", "gap"])
def test_finds_what_was_altered(tmp_path, change):
    path = tmp_path / "journal"
    ends = write(path, *THREE)
    data = path.read_bytes()
    first, second, third = data[: ends[0]], data[ends[0] : ends[1]], data[ends[1] :]
    path.write_bytes(
        {
            "payload": first.replace(b"\xff", b"\xfe", 1) + second + third,
            "about": first + second.replace(b'"number": 1', b'"number": 2') + third,
            "order": first + third + second,
            "gap": first + third,
        }[change]
    )
    data = path.read_bytes()
    with pytest.raises(JournalError, match=r"expected records that follow from one another, got one at byte \d+"):
        read(path)
    assert path.read_bytes() == data
    Journal(path, OWN, repair=True).close()
    assert read(path) == ([] if change == "payload" else THREE[:1])


def test_no_bit_of_an_earlier_record_loses_later_ones_in_silence(tmp_path):
    path = tmp_path / "journal"
    ends = write(path, *THREE)
    data = path.read_bytes()
    for place in range(ends[1]):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(JournalError):
            read(path)
    assert not list(tmp_path.glob("*.bad-*"))


def test_what_was_set_aside_before_is_not_written_over(tmp_path):
    path = tmp_path / "journal"
    (end,) = write(path, THREE[0])
    for more in (b"first", b"second"):
        with path.open("ab") as file:
            file.write(more)
        assert read(path) == THREE[:1]
    assert (tmp_path / f"journal.bad-{end}").read_bytes() == b"first"
    assert (tmp_path / f"journal.bad-{end}-1").read_bytes() == b"second"


@pytest.mark.parametrize("content", [b"\n", b"something else\n", b'{"kind": "open"}\n', b"[]\n"])
def test_refuses_what_is_no_journal_and_leaves_it(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="another file"):
        Journal(path, OWN)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_the_journal_of_another_model(tmp_path):
    write(tmp_path / "journal", *THREE)
    with pytest.raises(JournalError, match="journal of this model, eeeeeeeeeeee, got that of ffffffffffff"):
        Journal(tmp_path / "journal", "e" * 64)
    assert read(tmp_path / "journal") == THREE


def test_refuses_a_second_process(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, OWN)
    code = f"from cir.editing.journal import Journal; Journal({str(path)!r}, {OWN!r})"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "got one in use" in second.stderr
    journal.append(*THREE[0])
    journal.close()
    assert read(path) == THREE[:1]


def test_a_record_that_cannot_be_synced_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    journal = Journal(path, OWN)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(*THREE[0])
    journal.append(*THREE[1])
    journal.close()
    assert read(path) == [THREE[1]]
