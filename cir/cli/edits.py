"""One fact at a time: ``cir forget``, ``undo`` and ``edits``, whose state is a journal; and ``fit``, ``apply`` and
``revert``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cir import (
    AlreadyForgottenError,
    CIRConfig,
    Edit,
    EditConfig,
    EditError,
    Editor,
    Fact,
    Subspaces,
    UnknownFactError,
    load_facts,
)
from cir.cli.inputs import paths, plain_text
from cir.cli.output import DONE, FAILED, PARTLY, Outcome, complain, say
from cir.data.facts import check_contrast, probed
from cir.data.shipped import builtin_contrast, builtin_text
from cir.editing.applied import Applied
from cir.editing.history import History
from cir.editing.journal import Contents, JournalError, read_journal
from cir.forgetting.update import fingerprint, fingerprint_of
from cir.measures import recall
from cir.model.checkpoints import load_model, saved_weights, weights_of
from cir.model.finding import find_stack
from cir.model.sites import Target
from cir.system.files import brief
from cir.system.writing import check_file, check_output, write_folder

REFUSALS = (AlreadyForgottenError, UnknownFactError, EditError)


class Kept:
    """A journal as it is on the disk, of which there may be none yet."""

    def __init__(self, path: str, key_file: str | None) -> None:
        self.path = Path(path)
        self.key = None if key_file is None else Path(key_file).read_bytes()
        self.contents = read_journal(self.path, self.key) if self.path.exists() else Contents()
        self.fingerprint = str(self.contents.about.get("fingerprint"))
        self.history = History(self.fingerprint)
        for number, record in enumerate(self.contents.records, 1):
            try:
                self.history.take(record)
            except ValueError as error:
                raise JournalError(f"{path}, record {number}: {error}") from error

    @property
    def in_effect(self) -> list[Edit]:
        return [entry.edit for entry in self.history.entries if entry.status != "undone"]

    @property
    def rounding(self) -> str:
        return str(self.contents.about.get("rounding", EditConfig().rounding))

    def first_layer(self, model: Any) -> int | None:
        """The lowest that its edits change; None of a new journal.

        Raises:
            JournalError: if it is not of ``model``.
        """
        if not self.contents.about:
            return None
        stack = find_stack(model)
        for first in reversed(range(len(stack.mlps))):
            targets = stack.writers(first)
            edits = [entry.edit for entry in self.history.entries]
            if edits and edits[0].factors.keys() != {target.name for target in targets}:
                continue
            if fingerprint(targets) == self.fingerprint:
                return first
        raise JournalError(f"{self.path}: expected the journal of this model, got that of {self.fingerprint[:12]}")


def forget(arguments: argparse.Namespace) -> Outcome:
    """3 where a fact is only partly forgotten, 1 where one is refused: the others are forgotten all the same."""
    # Everything that can be wrong is found before the model is loaded.
    out, settings = _out(arguments), _settings(arguments)
    given = [{"id": arguments.fact, "sentences": [arguments.fact]}] if arguments.facts is None else arguments.facts
    facts = [probed(fact) for fact in load_facts(given)]
    if arguments.save_edit is not None:
        check_file(arguments.save_edit, arguments.overwrite)
        if len(facts) > 1:
            raise ValueError(f"--save-edit: expected one fact, got {len(facts)}; `cir forget` them one by one")
    kept = Kept(arguments.journal, arguments.key_file)
    config = EditConfig(**settings, rounding=kept.rounding)
    text = None if arguments.text is None else plain_text(Path(arguments.text), "text")
    subspaces = None if arguments.subspaces is None else Subspaces.load(arguments.subspaces)
    if subspaces is not None:
        contrast = subspaces.contrast
    elif arguments.contrast is not None:
        contrast = load_facts(arguments.contrast)
    else:
        contrast = builtin_contrast([*facts, *(edit.fact for edit in kept.in_effect)])
    check_contrast(facts, contrast)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    if subspaces is None:
        subspaces = _fitted(model, tokenizer, text, contrast, kept, arguments)
    edits, refused = [], {}
    with Editor(model, tokenizer, subspaces, text=text, journal=kept.path, key=kept.key, config=config) as editor:
        for fact in facts:
            try:
                edits.append(editor.forget(fact))
                _tell(edits[-1], config)
            except REFUSALS as error:
                refused[fact.id] = str(error)
                complain(error)
        if edits and arguments.save_edit is not None:
            edits[0].save(arguments.save_edit)
            say(f"written    {arguments.save_edit}")
        document = {"edits": [_plain(edit) for edit in edits], "refused": refused}
        written = _write(out, model, tokenizer, editor, arguments) if editor.edits else None
    if out is not None and written is None:
        complain("--out: not written, as no edit is in effect")
    status = FAILED if refused else DONE if all(edit.forgotten for edit in edits) else PARTLY
    return status, {**document, "out": written}


def undo(arguments: argparse.Namespace) -> Outcome:
    out, kept = _out(arguments), Kept(arguments.journal, arguments.key_file)
    entries = kept.history.entries
    if not kept.contents.about:
        raise FileNotFoundError(f"--journal: expected a journal, got {kept.path}, which does not exist")
    if arguments.edit is not None and arguments.edit > len(entries):
        raise ValueError(f"--edit: expected the number of one of {len(entries)} edits, got {arguments.edit}")
    edit = kept.history.find(None if arguments.edit is None else entries[arguments.edit - 1].edit, "active").edit
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    # To take back takes no subspaces: only where the edits begin.
    fitted_on = {"fingerprint": kept.fingerprint, "layers": [kept.first_layer(model)]}
    none, config = Subspaces({}, "ridge", fitted_on), EditConfig(rounding=kept.rounding)
    with Editor(model, tokenizer, none, journal=kept.path, key=kept.key, config=config) as editor:
        editor.undo(edit)
        now = recall(model, tokenizer, [edit.fact])[edit.id]
        say(f"undone     edit {edit.number}: {brief(edit.id)}")
        say(f"recall     {edit.after.recall:.3f} -> {now:.3f}")
        written = _write(out, model, tokenizer, editor, arguments)
        return DONE, {"undone": edit.number, "id": edit.id, "recall": now, "out": written}


def edits(arguments: argparse.Namespace) -> Outcome:
    """1 where the journal is damaged: what is listed is then what checks."""
    kept = Kept(arguments.journal, arguments.key_file)
    if not kept.contents.about:
        raise FileNotFoundError(f"--journal: expected a journal, got {kept.path}, which does not exist")
    say(f"{'edit':>4}  {'status':<9}  {'recall':<16}  {'steps':>5}  fact")
    for entry in kept.history.entries:
        edit = entry.edit
        change = f"{edit.before.recall:.3f} -> {edit.after.recall:.3f}"
        partly = "" if edit.forgotten else f"  (partly: {edit.stopped})"
        say(f"{edit.number:>4}  {entry.status:<9}  {change:<16}  {edit.steps:>5}  {brief(edit.id)}{partly}")
    damaged = bool(kept.contents.tail)
    if damaged:
        complain(f"{kept.path}: what follows byte {kept.contents.good} does not check; see `cir journal check`")
    rows = [{**_plain(entry.edit), "status": entry.status} for entry in kept.history.entries]
    return FAILED if damaged else DONE, {"model": kept.fingerprint, "edits": rows, "damaged": damaged}


def fit(arguments: argparse.Namespace) -> Outcome:
    out = check_file(arguments.out, arguments.overwrite)
    contrast = load_facts(arguments.contrast)
    text = builtin_text() if arguments.text is None else plain_text(Path(arguments.text), "text")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    subspaces = Subspaces.fit(model, tokenizer, text, contrast, progress=not arguments.quiet)
    subspaces.save(out)
    own, nbytes = subspaces.fitted_on["fingerprint"], out.stat().st_size
    say(f"model      {own[:12]}")
    say(f"written    {out}, {nbytes / 1e6:.1f} MB")
    return DONE, {"model": own, "layers": subspaces.fitted_on["layers"], "out": str(out), "bytes": nbytes}


def apply(arguments: argparse.Namespace) -> Outcome:
    """``cir apply`` and ``cir revert``: they differ in the sign."""
    nbytes, _ = weights_of(arguments.model, arguments.dtype)
    out = check_output(arguments.out, arguments.overwrite, paths(arguments), nbytes)
    made, applied = [Edit.load(path) for path in arguments.edit], Applied.read(arguments.model)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    targets = made[0].targets_in(model)
    before = fingerprint(targets)
    applied.change(made, arguments.sign, before, arguments.force)
    for edit in made:
        edit.apply_(model, sign=arguments.sign)
    after, out = _checkpoint(out, model, tokenizer, targets, applied, arguments.overwrite)
    say(f"weights    {before[:12]} -> {after[:12]}, read back equal")
    if arguments.sign < 0:
        say("rounding   as before up to rounding; the same bits are in the original checkpoint alone")
    say(f"written    {out}")
    return DONE, {"before": before, "after": after, "edits": [edit.id for edit in made], "out": str(out)}


def _out(arguments: argparse.Namespace) -> Path | None:
    """The folder to be written, if one is, checked."""
    nbytes, _ = weights_of(arguments.model, arguments.dtype)
    if arguments.out is None:
        return None
    return check_output(arguments.out, arguments.overwrite, paths(arguments), nbytes)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_steps", "budget", "worst_window", "target_recall", "keep")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    EditConfig(**given)
    return given


def _fitted(
    model: Any, tokenizer: Any, text: str | None, contrast: Sequence[Fact], kept: Kept, arguments: argparse.Namespace
) -> Subspaces:
    """Subspaces of the layers that the journal's edits change, or of those where the contrast facts are."""
    started, config, first = time.perf_counter(), CIRConfig(), kept.first_layer(model)
    if first is not None:
        depth = len(find_stack(model).mlps)
        config = CIRConfig(layers=(depth - first) / depth)
    texts = builtin_text() if text is None else text
    subspaces = Subspaces.fit(model, tokenizer, texts, contrast, config=config, progress=not arguments.quiet)
    say(
        f"fitted     subspaces, in {time.perf_counter() - started:.1f} s; `cir fit` them once, and --subspaces saves "
        "that time"
    )
    return subspaces


def _tell(edit: Edit, config: EditConfig) -> None:
    before, after = edit.before, edit.after
    say(f"edit {edit.number:<6}{brief(edit.id)}")
    say(f"recall     {before.recall:.3f} -> {after.recall:.3f}")
    if before.neighbours is not None and after.neighbours is not None:
        say(f"neighbours {before.neighbours:.3f} -> {after.neighbours:.3f}")
    say(f"text loss  {after.rise:+.2%} (budget {config.budget:+.2%})")
    say(f"worst      {after.worst:+.4f} nats a token in one window (at most {config.worst_window:+.4f})")
    how = "forgotten " if edit.forgotten else "partly    "
    why = "" if edit.forgotten else f"{edit.stopped}; "
    say(f"{how} {why}{edit.steps} steps, {edit.seconds:.1f} s")


def _plain(edit: Edit) -> dict[str, Any]:
    """What JSON has of an edit: all but its weights."""
    names = ("number", "id", "forgotten", "stopped", "steps", "seconds", "rank", "nbytes", "energy", "fingerprint")
    states = {name: asdict(getattr(edit, name)) for name in ("before", "after")}
    return {**{name: getattr(edit, name) for name in names}, "fact": asdict(edit.fact), **states}


def _write(out: Path | None, model: Any, tokenizer: Any, editor: Editor, arguments: argparse.Namespace) -> str | None:
    """The checkpoint with the edits in effect, as `cir apply` writes it."""
    if out is None:
        return None
    applied, made = Applied.read(arguments.model), editor.edits
    applied.change(made, 1, editor.fingerprint, force=False)
    targets = made[0].targets_in(model) if made else []
    _, out = _checkpoint(out, model, tokenizer, targets, applied, arguments.overwrite)
    say(f"written    {out}, read back equal")
    return str(out)


def _checkpoint(
    out: Path, model: Any, tokenizer: Any, targets: Sequence[Target], applied: Applied, overwrite: bool
) -> tuple[str, Path]:
    """Write it, and read it back: the fingerprint of ``targets``, and where it is."""
    own = fingerprint(targets)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        applied.write(folder)
        saved = fingerprint_of(saved_weights(folder, targets, model.dtype))
        if saved != own:
            raise OSError(f"expected the checkpoint to read back as {own[:12]}, got {saved[:12]}; it was not kept")

    return own, write_folder(out, fill, overwrite)
