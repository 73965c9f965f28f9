"""What each command does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir.cli.inputs import Inputs, plain_text
from cir.cli.parser import parser

if TYPE_CHECKING:
    from cir.proof.certificate import Evidence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 on an error, 130 where a signal ended the run early."""
    arguments = parser().parse_args(argv)
    if arguments.quiet:
        _silence_transformers()
    try:
        return COMMANDS[arguments.command](arguments)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        print(f"cir: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _unlearn(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, Subspaces, load_facts, unlearn
    from cir.config import BreakingConfig
    from cir.model.checkpoints import check_output, load_model, write_folder
    from cir.proof.certificate import Witness

    # Everything that can be wrong is found before the model is loaded.
    out = check_output(arguments.out, arguments.overwrite, _paths(arguments))
    inputs = Inputs.read(vars(arguments))
    base = CIRConfig.preset(arguments.preset)
    config = replace(base, **_given(arguments, base))
    contrast = None if arguments.contrast is None else load_facts(arguments.contrast)
    subspaces = None if arguments.subspaces is None else Subspaces.load(arguments.subspaces)
    evidence = _evidence(inputs, relearning=not arguments.no_relearning) if arguments.certify else None
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
    certificate = None if witness is None else witness.certificate(method)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        if certificate is not None:
            certificate.write(folder)

    out = write_folder(out, fill, arguments.overwrite)
    before, after = report.before, report.after
    if before.mean_recall is not None and after.mean_recall is not None:
        print(f"recall     {before.mean_recall:.3f} -> {after.mean_recall:.3f}")
    print(f"text loss  {before.loss:.4f} -> {after.loss:.4f} ({after.rise:+.2%}, budget {config.budget:+.2%})")
    print(f"layers     {report.layers[0]} to {report.layers[1]} changed")
    print(f"stopped    {report.stopped}, after {report.seconds['total']:.0f} s")
    print(f"written    {out}")
    return INTERRUPTED if report.stopped == "interrupted" else 0


def _given(arguments: argparse.Namespace, base: Any) -> dict[str, Any]:
    """The settings among ``arguments``, of which the preset ``base`` must have each."""
    names = (
        *("budget", "worst_window", "disruption_tokens", "full_check", "target_recall", "rounding", "seed"),
        *("floor", "max_steps", "rate", "max_epochs"),
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
    return _write_json(arguments.json, result)


def _evidence(inputs: Inputs, **settings: Any) -> Evidence:
    from cir.proof.certificate import Evidence

    if inputs.disruption is None:
        raise ValueError("expected text on which the loss is certified, with --disruption or --data, got none")
    return Evidence(
        inputs.facts,
        inputs.neighbours,
        inputs.disruption,
        inputs.related,
        same_subject=inputs.same_subject,
        sources=inputs.sources,
        **settings,
    )


def _verify(arguments: argparse.Namespace) -> int:
    from cir.model.checkpoints import load_model
    from cir.proof.certificate import Certificate, verify

    certificate = Certificate.read(arguments.folder)
    stated = certificate.content
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    settings = {**stated["settings"], "relearning": stated["settings"]["relearning"] and not arguments.no_relearning}
    evidence = _evidence(Inputs.read({**stated["sources"], **given}), **settings)
    model, tokenizer = load_model(arguments.folder, device=arguments.device, dtype=arguments.dtype)
    differences = verify(certificate, model, tokenizer, evidence, progress=not arguments.quiet)
    for difference in differences:
        print(f"differs    {difference}")
    print("The certificate does not hold." if differences else "The certificate holds.")
    return 1 if differences else 0


def _attack(arguments: argparse.Namespace) -> int:
    from cir import load_facts, relearn
    from cir.data.facts import check_apart
    from cir.measures import mean_recall
    from cir.model.checkpoints import load_model

    facts, probe = load_facts(arguments.relearn), load_facts(arguments.probe)
    try:
        check_apart(facts, probe)
    except ValueError as error:
        # To learn the probed facts themselves is a question one may ask; but it shows nothing of forgetting.
        print(f"cir: warning: {error}", file=sys.stderr)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    settings = {"optimizer": arguments.optimizer, "lr": arguments.lr, "lora_rank": arguments.lora_rank}
    history = relearn(
        model, tokenizer, facts, probe, **settings, epochs=arguments.epochs, progress=not arguments.quiet
    )
    epochs = [{"mean_recall": mean_recall(recalls), "recall": recalls} for recalls in history]
    return _write_json(arguments.json, {**settings, "epochs": epochs})


def _profile(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, profile
    from cir.model.checkpoints import load_model

    inputs, out = Inputs.read(vars(arguments)), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    config = CIRConfig.preset(arguments.preset)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    found = profile(
        model,
        tokenizer,
        inputs.facts,
        retain=inputs.retain,
        disruption=inputs.disruption,
        config=config,
        epochs=arguments.epochs,
        trace=out / "trace.json.gz",
    )
    (out / "profile.json").write_text(found.to_json(), encoding="utf-8")
    found.plot(out / "profile.png")
    print(found.table())
    print(f"written    {out}: profile.json, profile.png, trace.json.gz (for chrome://tracing or Perfetto)")
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
        found.plot(arguments.plot)
    print(found.to_json() if arguments.json else found.table())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cir.cli.doctor import run

    return run()


def _fit(arguments: argparse.Namespace) -> int:
    from cir import Subspaces, load_facts
    from cir.data.shipped import builtin_text
    from cir.model.checkpoints import load_model

    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"expected a new file, got {out}, which exists; --overwrite replaces it")
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
    print(f"model      {subspaces.fitted_on['fingerprint'][:12]}")
    print(f"written    {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    """``cir apply`` and ``cir revert``: they differ in the sign."""
    from cir import Edit
    from cir.forgetting.update import fingerprint, fingerprint_of
    from cir.model.checkpoints import check_output, load_model, saved_weights, write_folder

    out = check_output(arguments.out, arguments.overwrite, _paths(arguments))
    edits = [Edit.load(path) for path in arguments.edit]
    contents = [edit.to_bytes() for edit in edits]
    if again := [path for path, own in zip(arguments.edit, contents, strict=True) if contents.count(own) > 1]:
        raise ValueError(f"--edit: expected each edit once, got the same in {' and '.join(again)}")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    targets = edits[0].targets_in(model)
    before = fingerprint(targets)
    if arguments.sign == 1 and not arguments.force and (others := [e.id for e in edits if e.fingerprint != before]):
        raise ValueError(
            f"expected edits of the model {before[:12]}, got {', '.join(others)} of another; --force applies them"
        )
    for edit in edits:
        edit.apply_(model, sign=arguments.sign)
    after = fingerprint(targets)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = fingerprint_of(saved_weights(folder, [target.name for target in targets]))
        if saved != after:
            raise OSError(f"expected the checkpoint to read back as {after[:12]}, got {saved[:12]}; it was not kept")

    out = write_folder(out, fill, arguments.overwrite)
    print(f"weights    {before[:12]} -> {after[:12]}, read back equal")
    print(f"written    {out}")
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


def _write_json(path: str, value: object) -> int:
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return 0
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return 0


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
    "apply": _apply,
    "revert": _apply,
}
