"""Files that today's code wrote are read by tomorrow's, with what they held.

``tests/formats`` has a file of each format, named after it, of what :func:`edit` and the others here make. They are
not to be written anew because a test fails: what users have on disk does not change either. Where a format is raised
on purpose, see that files of the old one are read, or refused by its name, and write one of the new::

    python -m tests.test_formats      # writes those that are missing, and no others

The certificate's format has its tests in tests/proof.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cir.config import CIRConfig
from cir.data.facts import Fact, Probe
from cir.editing import applied, edits, journal
from cir.editing.edits import Edit, State
from cir.editing.history import History
from cir.editing.journal import Journal, JournalError, read_journal
from cir.forgetting import fitting
from cir.forgetting.fitting import Subspaces
from cir.forgetting.report import Epoch, Measure, Report
from cir.forgetting.subspace import Subspace

FOLDER = Path(__file__).parent / "formats"
MODEL, KEY = "5f" * 32, b"a key of the tests"
EDIT = FOLDER / f"{edits.FORMAT}.safetensors"
SUBSPACES = FOLDER / f"{fitting.FORMAT}.safetensors"
JOURNAL = FOLDER / f"{journal.FORMAT}.cir"
KEYED = FOLDER / f"{journal.FORMAT}-keyed.cir"
APPLIED = FOLDER / f"{applied.FORMAT}.json"
REPORT = FOLDER / "report.json"
SHA_256 = "d0f31f2ff2a3d7a51eb7eb3bbaa05b1f7a3d7c1b7cf2c2a0f0e9be2b1f5c7e11"


def rows(height: int, width: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + height * width, dtype=torch.float32).reshape(height, width) / 8 - 1


def edit(number: int = 1) -> Edit:
    widths = {"model.layers.2.mlp.down_proj": 6, "model.layers.3.self_attn.o_proj": 4}
    return Edit(
        id=f"capital-{number}",
        number=number,
        fact=Fact(
            f"capital-{number}",
            ("The capital of Österreich is Wien.", "Wien is its capital."),
            (Probe("The capital of Österreich is", " Wien"),),
        ),
        factors={name: (rows(2, 4).bfloat16(), rows(2, width, 3).bfloat16()) for name, width in widths.items()},
        energy=0.984375,
        before=State(0.75, 0.5),
        full=State(0.0078125, 0.46875, 0.0009765625, 0.00048828125, 0.03125),
        after=State(0.015625, 0.484375, 0.0009765625, 0.0, 0.0625, 0.125),
        steps=7,
        seconds=2.5,
        stopped="forgotten",
        fingerprint=MODEL,
    )


def subspaces() -> Subspaces:
    contrast = [{"id": "c", "sentences": ["The capital of Norge is Oslo."], "probes": [], "choices": []}]
    about = {"fingerprint": MODEL, "layers": [2, 3], "contrast": contrast}
    kinds = {
        "model.layers.2.mlp.down_proj.input": Subspace(rows(6, 2), None, rows(1, 2)[0].double()),
        "model.layers.2.mlp.down_proj.output": Subspace(rows(4, 3), rows(3, 3, 2), rows(1, 3)[0].double()),
    }
    return Subspaces(kinds, "ridge", about)


def report(config: CIRConfig) -> Report:
    before = Measure({"a": 0.5, "b": 0.25}, 3.5)
    after = Measure({"a": 0.0078125, "b": 0.0}, 3.503, 0.0009765625, 0.00048828125, 0.0625)
    return Report(
        config=config,
        facts_hash=SHA_256,
        before=before,
        after=after,
        layers=(2, 3),
        epochs=[Epoch(1, 2.0, -1.5, None, after, True), Epoch(2, 1.0, float("inf"), 0.5, after, False)],
        stopped="budget spent",
        unknown=["b"],
        unforgotten=["a"],
        seconds={"fit": 1.5, "total": 4.0},
        peak_memory=2**20,
        predicted_memory=2**19,
        versions={"python": "3.11.7", "cir": "0.1.0"},
    )


def write_journal(path: Path, key: bytes | None) -> None:
    opened = Journal(path, MODEL, "stochastic", key)
    for number in (1, 2):
        opened.append("edit", {"id": f"capital-{number}"}, edit(number).to_bytes())
    for kind, about in (("undo", {"number": 1}), ("commit", {}), ("redo", {"number": 1})):
        opened.append(kind, about)
    opened.close()


def write_applied(path: Path) -> None:
    applied.Applied({SHA_256: MODEL}).write(path.parent)
    (path.parent / applied.NAME).rename(path)


WRITERS = {
    EDIT: lambda path: edit().save(path),
    SUBSPACES: lambda path: subspaces().save(path),
    JOURNAL: lambda path: write_journal(path, None),
    KEYED: lambda path: write_journal(path, KEY),
    APPLIED: write_applied,
    REPORT: lambda path: path.write_text(report(CIRConfig(budget=0.002, seed=3)).to_json(), encoding="utf-8"),
}


def same(found: Edit, made: Edit) -> None:
    assert dataclasses.replace(found, factors={}) == dataclasses.replace(made, factors={})
    assert found.factors.keys() == made.factors.keys()
    for name, pair in made.factors.items():
        for one, other in zip(found.factors[name], pair, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.name)
def test_a_file_of_each_format_is_kept(path):
    assert path.is_file(), f"{path.name}: a format was raised; see above how to write a file of the new one"


def test_an_edit_is_read_back():
    found = Edit.load(EDIT)
    same(found, edit())
    assert (found.forgotten, found.rank, found.nbytes) == (True, 2, 2 * 2 * (4 + 6 + 4 + 4))
    # `cir apply` knows an edit again by the SHA-256 of these bytes.
    assert found.to_bytes() == EDIT.read_bytes()


def test_subspaces_are_read_back():
    found, made = Subspaces.load(SUBSPACES), subspaces()
    assert (found.mode, found.fitted_on) == ("ridge", made.fitted_on)
    assert [fact.sentences for fact in found.contrast] == [("The capital of Norge is Oslo.",)]
    assert found.keys() == made.keys()
    for name in made:
        for part in ("basis", "mixer", "variance"):
            one, other = getattr(found[name], part), getattr(made[name], part)
            if other is None:
                assert one is None
            else:
                assert (one.dtype, one.tolist()) == (other.dtype, other.tolist()), (name, part)


@pytest.mark.parametrize(("path", "key"), [(JOURNAL, None), (KEYED, KEY)], ids=["plain", "keyed"])
def test_a_journal_is_read_back(path, key):
    contents = read_journal(path, key)
    assert contents.tail == b""
    keyed = key is not None
    about = {"format": journal.FORMAT, "fingerprint": MODEL, "rounding": "stochastic", "keyed": keyed}
    assert contents.about == about
    history = History(MODEL)
    for record in contents.records:
        history.take(record)
    assert [entry.status for entry in history.entries] == ["active", "committed"]
    for number, entry in enumerate(history.entries, 1):
        same(entry.edit, edit(number))
    with pytest.raises(JournalError, match="expected"):
        read_journal(path, None if keyed else KEY)


def test_a_journal_is_gone_on_with(tmp_path):
    path = tmp_path / "journal.cir"
    path.write_bytes(JOURNAL.read_bytes())
    opened = Journal(path, MODEL, "stochastic")
    opened.append("undo", {"number": 1})
    opened.close()
    assert path.read_bytes().startswith(JOURNAL.read_bytes())
    kinds = [record.kind for record in read_journal(path).records]
    assert kinds == ["edit", "edit", "undo", "commit", "redo", "undo"]


def test_the_record_of_edits_in_a_checkpoint_is_read_back(tmp_path):
    (tmp_path / applied.NAME).write_bytes(APPLIED.read_bytes())
    assert applied.Applied.read(tmp_path).edits == {SHA_256: MODEL}


def test_a_report_says_what_it_said():
    """Nothing here reads a report again; others do, by these names. A name may be added, none may go or change."""
    kept = json.loads(REPORT.read_text(encoding="utf-8"))
    config = CIRConfig(**kept["config"])  # as it was: the defaults may be others now
    assert (config.budget, config.seed) == (0.002, 3)
    assert not differences(kept, json.loads(report(config).to_json()))
    assert kept["epochs"][1]["forget_loss"] is None
    assert (kept["before"]["mean_recall"], kept["after"]["recall"]["a"]) == (0.375, 0.0078125)


def differences(kept: Any, now: Any, where: str = "report") -> list[str]:
    """Of what ``kept`` has in what ``now`` has."""
    if isinstance(kept, dict) and isinstance(now, dict):
        return [
            one
            for name, value in kept.items()
            for one in (
                differences(value, now[name], f"{where}.{name}") if name in now else [f"{where}.{name}: gone"]
            )
        ]
    if isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        pairs = enumerate(zip(kept, now, strict=True))
        return [one for at, pair in pairs for one in differences(*pair, f"{where}[{at}]")]
    return [] if type(kept) is type(now) and kept == now else [f"{where}: {kept!r} is now {now!r}"]


def test_differences_are_found():
    assert differences({"a": [1, {"b": None}], "c": 0.5}, {"a": [1, {"b": None}], "c": 0.5, "d": 2}) == []
    assert differences({"a": [1, 2], "b": {"c": 1}, "d": 1}, {"a": [1, 3], "b": {}, "d": 1.0}) == [
        "report.a[1]: 2 is now 3",
        "report.b.c: gone",
        "report.d: 1 is now 1.0",
    ]


@pytest.mark.parametrize(
    ("path", "own", "read"),
    [
        (EDIT, edits.FORMAT, Edit.load),
        (SUBSPACES, fitting.FORMAT, Subspaces.load),
        (JOURNAL, journal.FORMAT, read_journal),
    ],
    ids=["edit", "subspaces", "journal"],
)
def test_a_format_that_is_not_known_is_refused_by_name(path, own, read, tmp_path):
    other = tmp_path / path.name
    data = path.read_bytes()
    assert own.encode() in data
    other.write_bytes(data.replace(own.encode(), own[:-1].encode() + b"9"))
    with pytest.raises(ValueError, match=f"expected a .*of format {own}"):
        read(other)


def test_a_record_of_edits_of_another_format_is_refused(tmp_path):
    text = APPLIED.read_text(encoding="utf-8").replace(applied.FORMAT, "cir-edits-9")
    (tmp_path / applied.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"format {applied.FORMAT}, got .*cir-edits-9"):
        applied.Applied.read(tmp_path)


if __name__ == "__main__":
    for target, write in WRITERS.items():
        if not target.exists():
            write(target)
