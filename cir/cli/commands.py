"""What each command does."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from cir.cli.inputs import Inputs, plain_text
from cir.cli.output import Warnings, complain, say, write_json
from cir.cli.parser import parser
from cir.system.signals import Held, raised
from cir.system.writing import check_file, check_output, write_file, write_folder

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 on an error, 130 where a signal ended the run early."""
    arguments = parser().parse_args(argv)
    logger, warnings = logging.getLogger("cir"), Warnings()
    with raised(), ExitStack() as stack:
        logger.addHandler(warnings)
        stack.callback(logger.removeHandler, warnings)
        if arguments.quiet:
            _silence_transformers()
        try:
            return COMMANDS[arguments.command](arguments)
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED
        except Exception as error:
            if arguments.debug:
                raise
            expected = isinstance(error, ValueError | OSError | ArithmeticError | MemoryError)
            complain(error if expected else f"{type(error).__name__}: {error}; --debug shows where")
            return 1


def _unlearn(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, Subspaces, load_facts, unlearn
    from cir.cli.certificates import certified, evidence_of, signing_key
    from cir.config import BreakingConfig
    from cir.model.checkpoints import load_model, weights_of
    from cir.proof.certificate import Witness

    # Everything that can be wrong is found before the model is loaded.
    nbytes, _ = weights_of(arguments.model, arguments.dtype)
    out = check_output(arguments.out, arguments.overwrite, _paths(arguments), nbytes)
    inputs = Inputs.read(vars(arguments))
    base = CIRConfig.preset(arguments.preset)
    config = replace(base, **_given(arguments, base))
    contrast = None if arguments.contrast is None else load_facts(arguments.contrast)
    subspaces = None if arguments.subspaces is None else Subspaces.load(arguments.subspaces)
    evidence = evidence_of(inputs, relearning=not arguments.no_relearning) if arguments.certify else None
    key = signing_key(arguments)
    model, tokenizer = load_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        offload_for=config if isinstance(config, BreakingConfig) and arguments.offload != "never" else None,
    )
    witness = None if evidence is None else Witness(model, tokenizer, evidence, progress=not arguments.quiet)
    report = unlearn(
        model,
        tokenizer,
        inputs.facts,
        contrast=contrast,
        retain=inputs.retain,
        disruption=inputs.disruption,
        config=config,
        subspaces=subspaces,
        offload=arguments.offload,
        progress=not arguments.quiet,
    )
    method = {"name": "CIR", "model": arguments.model, **asdict(report.config)}
    certificate, failed = (None, None) if witness is None else certified(witness, method)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        if certificate is not None:
            certificate.write(folder, key)

    with Held():
        out = write_folder(out, fill, arguments.overwrite)
        before, after = report.before, report.after
        if before.mean_recall is not None and after.mean_recall is not None:
            say(f"recall     {before.mean_recall:.3f} -> {after.mean_recall:.3f}")
        say(f"text loss  {before.loss:.4f} -> {after.loss:.4f} ({after.rise:+.2%}, budget {config.budget:+.2%})")
        say(f"layers     {report.layers[0]} to {report.layers[1]} changed")
        say(f"stopped    {report.stopped}, after {report.seconds['total']:.0f} s")
        say(f"written    {out}")
    if failed is not None:
        complain(f"written without a certificate: {type(failed).__name__} {failed}")
        return INTERRUPTED if isinstance(failed, KeyboardInterrupt) else 1
    return INTERRUPTED if report.stopped == "interrupted" else 0


def _given(arguments: argparse.Namespace, base: Any) -> dict[str, Any]:
    """The settings among ``arguments``, of which the preset ``base`` must have each."""
    names = (
        *("budget", "worst_window", "disruption_tokens", "full_check", "target_recall", "rounding", "seed"),
        *("floor", "max_steps", "max_length", "rate", "max_epochs"),
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    known = {field.name for field in fields(base)}
    if others := [f"--{name.replace('_', '-')}" for name in given if name not in known]:
        raise ValueError(f"{', '.join(others)}: not of the preset {arguments.preset}")
    return given


def _eval(arguments: argparse.Namespace) -> int:
    from cir import evaluate
    from cir.model.checkpoints import load_model
    from cir.proof.attacks import attack
    from cir.proof.harness import check_installed, harness

    if arguments.json != "-":
        check_file(arguments.json)
    inputs = Inputs.read(vars(arguments))
    if arguments.tasks:
        check_installed()
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    evaluation = evaluate(
        model,
        tokenizer,
        inputs.facts,
        neighbours=inputs.neighbours,
        same_subject=inputs.same_subject,
        text=_read(arguments.text),
        max_tokens=arguments.max_tokens,
        generate=arguments.generate,
    )
    plain = {name: getattr(evaluation, name) for name in ("mean_recall", "accuracy", "loss")}
    result = {**plain, **asdict(evaluation)}
    if arguments.tasks:
        scores = harness(model, tokenizer, arguments.tasks, limit=arguments.task_limit)
        result["tasks"] = {name: asdict(score) for name, score in scores.items()}
    if arguments.attacks:
        original = None
        if arguments.original is not None:
            before, _ = load_model(arguments.original, device="cpu", dtype=arguments.dtype)
            original = {name: parameter.detach() for name, parameter in before.named_parameters()}
        outcomes = attack(
            model, tokenizer, inputs.facts, related=inputs.related, original=original, seed=arguments.seed
        )
        result["attacks"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write_json(arguments.json, result)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cir.cli.certificates import run

    return run(arguments)


def _attack(arguments: argparse.Namespace) -> int:
    from cir import load_facts, relearn
    from cir.data.facts import check_apart
    from cir.measures import mean_recall
    from cir.model.checkpoints import load_model

    if arguments.json != "-":
        check_file(arguments.json)
    facts, probe = load_facts(arguments.relearn), load_facts(arguments.probe)
    try:
        check_apart(facts, probe)
    except ValueError as error:
        # To learn the probed facts themselves is a question one may ask; but it shows nothing of forgetting.
        complain(f"warning: {error}")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    settings = {"optimizer": arguments.optimizer, "lr": arguments.lr, "lora_rank": arguments.lora_rank}
    history = relearn(
        model, tokenizer, facts, probe, **settings, epochs=arguments.epochs, progress=not arguments.quiet
    )
    epochs = [{"mean_recall": mean_recall(recalls), "recall": recalls} for recalls in history]
    write_json(arguments.json, {**settings, "epochs": epochs})
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, profile
    from cir.model.checkpoints import load_model

    out = check_output(arguments.out, True, _paths(arguments))
    inputs = Inputs.read(vars(arguments))
    config = CIRConfig.preset(arguments.preset)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as place:
        trace = Path(place) / "trace.json.gz"
        found = profile(
            model,
            tokenizer,
            inputs.facts,
            retain=inputs.retain,
            disruption=inputs.disruption,
            config=config,
            epochs=arguments.epochs,
            trace=trace,
        )

        def fill(folder: Path) -> None:
            (folder / "profile.json").write_text(found.to_json(), encoding="utf-8")
            found.plot(folder / "profile.png")
            shutil.copy(trace, folder)

        out = write_folder(out, fill, overwrite=True)
    say(found.table())
    say(f"written    {out}: profile.json, profile.png, trace.json.gz (for chrome://tracing or Perfetto)")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from cir import plan

    found = plan(
        arguments.model,
        arguments.facts,
        gpu=arguments.gpu,
        sentences=arguments.sentences,
        tokens=arguments.tokens,
    )
    if arguments.plot:
        write_file(arguments.plot, found.plot)
    say(found.to_json() if arguments.json else found.table())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cir.cli.doctor import run

    return run()


def _journal(arguments: argparse.Namespace) -> int:
    from cir.cli.journals import run

    return run(arguments)


def _fit(arguments: argparse.Namespace) -> int:
    from cir import Subspaces, load_facts
    from cir.data.shipped import builtin_text
    from cir.model.checkpoints import load_model

    out = check_file(arguments.out, arguments.overwrite)
    contrast, texts = load_facts(arguments.contrast), _read(arguments.text)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    subspaces = Subspaces.fit(
        model,
        tokenizer,
        builtin_text() if texts is None else texts,
        contrast,
        progress=not arguments.quiet,
    )
    subspaces.save(out)
    say(f"model      {subspaces.fitted_on['fingerprint'][:12]}")
    say(f"written    {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    """``cir apply`` and ``cir revert``: they differ in the sign."""
    from cir import Edit
    from cir.editing.applied import Applied
    from cir.forgetting.update import fingerprint, fingerprint_of
    from cir.model.checkpoints import load_model, saved_weights, weights_of

    nbytes, _ = weights_of(arguments.model, arguments.dtype)
    out = check_output(arguments.out, arguments.overwrite, _paths(arguments), nbytes)
    edits, applied = [Edit.load(path) for path in arguments.edit], Applied.read(arguments.model)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    targets = edits[0].targets_in(model)
    before = fingerprint(targets)
    applied.change(edits, arguments.sign, before, arguments.force)
    for edit in edits:
        edit.apply_(model, sign=arguments.sign)
    after = fingerprint(targets)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        applied.write(folder)
        saved = fingerprint_of(saved_weights(folder, [target.name for target in targets], model.dtype))
        if saved != after:
            raise OSError(f"expected the checkpoint to read back as {after[:12]}, got {saved[:12]}; it was not kept")

    out = write_folder(out, fill, arguments.overwrite)
    say(f"weights    {before[:12]} -> {after[:12]}, read back equal")
    say(f"written    {out}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from cir.cli.demo import run

    return run(Path(arguments.out), arguments.model, progress=not arguments.quiet)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _paths(arguments: argparse.Namespace) -> list[str]:
    """All that was given but the output, some of which are files and folders."""
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    values = (value if isinstance(value, list) else [value] for value in given.values())
    return [text for value in values for text in value if isinstance(text, str)]


def _read(path: str | None) -> str | None:
    return None if path is None else plain_text(Path(path), "text")


COMMANDS = {
    "demo": _demo,
    "unlearn": _unlearn,
    "verify": _verify,
    "eval": _eval,
    "attack": _attack,
    "profile": _profile,
    "plan": _plan,
    "doctor": _doctor,
    "fit": _fit,
    "journal": _journal,
    "apply": _apply,
    "revert": _apply,
}
