from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir.editing.journal import Journal, JournalError, read_journal, set_aside
from tests.fuzz import examples

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
    contents = read_journal(path)
    assert not contents.cut
    assert set_aside(path, contents).read_bytes() == data[contents.good :]
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


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"other\n", b'{"kind": "open"}\n', b"[]\n", b"\x00" * 99, b"[" * 70000]
)
def test_refuses_what_is_no_journal_and_leaves_it(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(
        JournalError, match="another file" if content else "an empty one, from which all may have been lost"
    ):
        Journal(path, OWN)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_the_journal_of_another_model(tmp_path):
    write(tmp_path / "journal", *THREE)
    with pytest.raises(
        JournalError, match="journal of this model, fingerprint eeeeeeeeeeee, got that of 'ffffffffffff'"
    ):
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


def test_what_can_neither_be_written_nor_taken_back_ends_it(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    journal = Journal(path, OWN)

    class Broken:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            self._file.write(data[:5])
            raise OSError(5, "Input/output error")

        def truncate(self, size):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_file", Broken(journal._file))
        with pytest.raises(OSError, match="Input/output"):
            journal.append(*THREE[0])
    with pytest.raises(JournalError, match=r"could neither write .* nor take that back .*; open it again"):
        journal.append(*THREE[0])
    journal.close()
    assert read(path) == []


@pytest.mark.parametrize("what", ["deleted", "replaced", "another has written to it"])
def test_a_journal_that_is_no_longer_there_is_noticed(tmp_path, what):
    path = tmp_path / "journal"
    journal = Journal(path, OWN)
    journal.append(*THREE[0])
    data = path.read_bytes()
    if what == "another has written to it":
        with path.open("ab") as file:
            file.write(b"more")
    else:
        path.unlink()
    if what == "replaced":
        path.write_bytes(data)
    with pytest.raises(JournalError, match=what):
        journal.append(*THREE[1])
    journal.close()


def test_the_rounding_is_recorded_and_must_be_the_same(tmp_path):
    path = tmp_path / "journal"
    Journal(path, OWN, "stochastic").close()
    with pytest.raises(JournalError, match="rounding nearest, got that of 'stochastic'"):
        Journal(path, OWN, "nearest")
    Journal(path, OWN, "stochastic").close()


def test_with_a_key_nobody_else_can_write_a_record(tmp_path):
    path, key = tmp_path / "journal", b"k" * 16
    with pytest.raises(JournalError, match="expected a key of 16 bytes or more, got 3"):
        Journal(path, OWN, key=b"abc")
    assert not path.exists()
    journal = Journal(path, OWN, key=key)
    journal.append(*THREE[0])
    journal.close()
    assert [record.kind for record in read_journal(path, key).records] == ["edit"]
    with pytest.raises(JournalError, match="expected the key that this journal was made with, got none"):
        read_journal(path)
    with pytest.raises(JournalError, match="expected the key that this journal was made with, got another"):
        read_journal(path, b"l" * 16)
    forged = tmp_path / "forged"
    write(forged, *THREE)
    with pytest.raises(JournalError, match="expected a journal made with a key, got one without"):
        Journal(forged, OWN, key=key)
    # A record of a chain without the key, put behind those with it, is not taken.
    contents = read_journal(forged)
    line = forged.read_bytes()[: contents.good]
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(JournalError, match="expected records that follow"):
        Journal(path, OWN, key=key)


def test_lengths_are_bounded(tmp_path):
    path = tmp_path / "journal"
    (end,) = write(path, THREE[1])
    data = path.read_bytes()
    for length in (-1, 2**40, True, None, "1"):
        path.write_bytes(data.replace(b'"length": 0', b'"length": ' + json.dumps(length).encode()))
        with pytest.raises(JournalError):
            read(path)
    journal = Journal(tmp_path / "new", OWN)
    with pytest.raises(JournalError, match="expected a record of at most"):
        journal.append("edit", {"id": "x" * 2**16})
    journal.close()
    assert end


def test_what_was_made_before_there_was_more_to_record_is_read(tmp_path):
    path = tmp_path / "journal"
    first = {"about": {"fingerprint": OWN, "format": "cir-journal-1"}, "before": "", "kind": "open", "length": 0}
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**first, "sha256": digest}, sort_keys=True) + "\n\n")
    write(path, *THREE)
    assert read(path) == THREE


@given(st.data())
@settings(max_examples=examples(60), deadline=None)
def test_whatever_happens_to_the_bytes_nothing_is_lost_in_silence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "journal"
    write(path, *THREE)
    whole = path.read_bytes()
    start, count = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    damaged = whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + count :]
    path.write_bytes(damaged)
    try:
        found = read(path)
    except JournalError:
        assert path.read_bytes() == damaged
    else:
        assert found == THREE[: len(found)]
        # Of the last record too something was left out; what there is is kept aside.
        assert found == THREE or list(folder.glob("*.bad-*")) or damaged == whole[: len(damaged)]
