from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cir.data.facts import load_facts
from cir.editing.edits import FORMAT, Edit, State
from cir.editing.history import History
from cir.editing.journal import Record
from tests.fuzz import examples
from tests.tiny import facts

OWN = "f" * 64


def an_edit(number: int, **changes) -> Edit:
    state = State(recall=0.5, neighbours=None)
    edit = Edit(
        id="seven",
        number=number,
        fact=load_facts(facts(1))[0],
        factors={"a.down_proj": (torch.ones(2, 3), torch.ones(2, 4))},
        energy=1.0,
        before=state,
        full=state,
        after=state,
        steps=1,
        seconds=1.0,
        stopped="forgotten",
        fingerprint=OWN,
    )
    return replace(edit, **changes)


def record(number: int = 1, **changes) -> Record:
    return Record("edit", {}, an_edit(number, **changes).to_bytes())


def test_does_what_the_records_say():
    history = History(OWN)
    for step in (record(1), record(2), Record("undo", {"number": 1}, b""), Record("commit", {}, b""), record(3)):
        history.take(step)
    history.take(Record("redo", {"number": 1}, b""))
    assert [entry.status for entry in history.entries] == ["active", "committed", "active"]
    assert [edit.number for edit in history.active] == [1, 3]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (record(2), "expected edit 1, got edit 2"),
        (record(1, fingerprint="e" * 64), "expected an edit of ffffffffffff, got one of eeeeeeeeeeee"),
        (Record("undo", {"number": 1}, b""), "expected the number of an edit that is active, got 1"),
        (Record("redo", {"number": None}, b""), "expected the number of an edit that is undone, got None"),
        (Record("undo", {}, b""), "expected the number of an edit that is active, got None"),
        (Record("open", {}, b""), "expected a record of edit, undo, redo or commit, got 'open'"),
        (Record("edit", {}, b"nothing"), "expected an edit, got SafetensorError"),
    ],
)
def test_what_does_not_follow_is_refused(step, said):
    history = History(OWN)
    with pytest.raises(ValueError, match=said):
        history.take(step)
    assert not history.entries


def altered(**changes) -> bytes:
    """An edit's file with other figures."""
    tensors, about = an_edit(1)._tensors()
    return save(tensors, {FORMAT: json.dumps({**json.loads(about[FORMAT]), **changes})})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (save({"a.B": torch.ones(1, 2)}), r"expected a file of format cir-edit-1, got metadata \[\]"),
        (altered(energy=float("nan")), "expected JSON"),
        (altered(seconds="1"), "expected finite figures, got '1'"),
        (altered(number="1"), "number: expected int, got '1'"),
        (altered(after={"recall": 0.5, "neighbours": None, "rise": "0"}), "expected finite figures, got '0'"),
        (altered(after={"recall": 0.5}), "expected an edit, got TypeError"),
        (altered(note="more"), "expected an edit, got TypeError"),
        (altered(fact={"sentences": []}), "expected 'sentences'"),
        (an_edit(1, factors={}).to_bytes(), r"expected factors B and A of linears, got \[\]"),
        (
            an_edit(1, factors={"a": (torch.ones(2, 3), torch.ones(1, 3))}).to_bytes(),
            "a: expected B .r, D_out. and A",
        ),
        (
            an_edit(1, factors={"a": (torch.ones(2, 3), torch.full((2, 3), float("inf")))}).to_bytes(),
            "a: expected finite factors, got NaN or infinity",
        ),
    ],
)
def test_files_that_are_no_whole_edit_are_refused(tmp_path, data, said):
    (tmp_path / "edit").write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        Edit.load(tmp_path / "edit")
    assert str(tmp_path / "edit") in str(error.value)


@given(st.data())
@settings(max_examples=examples(80), deadline=None)
def test_no_bytes_do_more_than_be_refused(data):
    whole = an_edit(1).to_bytes()
    start, count = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    damaged = whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + count :]
    with contextlib.suppress(ValueError):
        assert Edit.from_bytes(damaged).factors
