"""What runs each command, and the commands that only look."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from cir.cli.inputs import Inputs, paths, plain_text
from cir.cli.output import DONE, FAILED, INTERRUPTED, Outcome, complain, logged, say, write_json
from cir.cli.parser import parser, read
from cir.cli.processes import launched, way_to_shard
from cir.system.signals import raised
from cir.system.writing import check_file, check_output, write_file, write_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, which `cir --help` explains. Raises SystemExit on wrong usage."""
    arguments = read(sys.argv[1:] if argv is None else argv)
    arguments.quiet = arguments.quiet or not sys.stderr.isatty()
    where = getattr(arguments, "json", None)
    with raised(), logged(arguments.verbose):
        try:
            with ExitStack() as stack:
                arguments.process = stack.enter_context(launched(arguments.command))
                if arguments.process:
                    arguments.quiet, where = True, None
                if where is not None:
                    if where != "-":
                        check_file(where)
                    stack.enter_context(redirect_stdout(sys.stderr))
                if arguments.quiet:
                    _without_bars()
                status, document = COMMANDS[arguments.command](arguments)
            if where is not None:
                write_json(where, document)
            return status
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED
        except Exception as error:
            if arguments.debug:
                raise
            expected = isinstance(error, ValueError | OSError | ArithmeticError | MemoryError)
            complain(error if expected else f"{type(error).__name__}: {error}; --debug shows where")
            return FAILED


def _eval(arguments: argparse.Namespace) -> Outcome:
    from cir import evaluate
    from cir.model.checkpoints import load_model
    from cir.proof.attacks import attack
    from cir.proof.harness import check_installed, harness

    inputs = Inputs.read(vars(arguments))
    if arguments.tasks:
        check_installed()
    shard = way_to_shard(arguments.device, arguments.shard)
    if shard is not None and (arguments.tasks or arguments.attacks):
        raise ValueError("expected neither --tasks nor --attacks in several processes")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype, shard=shard)
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
    return DONE, result


def _attack(arguments: argparse.Namespace) -> Outcome:
    from cir import load_facts, relearn
    from cir.data.facts import check_apart
    from cir.measures import mean_recall
    from cir.model.checkpoints import load_model

    facts, probe = load_facts(arguments.relearn), load_facts(arguments.probe)
    try:
        check_apart(facts, probe)
    except ValueError as error:
        # To learn the probed facts themselves is a question one may ask; but it shows nothing of forgetting.
        complain(f"warning: {error}")
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    names = ("optimizer", "lr", "lora_rank", "steps", "probe_every", "all_parameters")
    settings = {name: getattr(arguments, name) for name in names}
    history = relearn(
        model, tokenizer, facts, probe, **settings, epochs=arguments.epochs, progress=not arguments.quiet
    )
    epochs = [{"mean_recall": mean_recall(recalls), "recall": recalls} for recalls in history]
    return DONE, {**settings, "epochs": epochs}


def _profile(arguments: argparse.Namespace) -> Outcome:
    from cir import CIRConfig, profile
    from cir.model.checkpoints import load_model

    out = check_output(arguments.out, True, paths(arguments))
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
    return DONE, {**json.loads(found.to_json()), "out": str(out)}


def _plan(arguments: argparse.Namespace) -> Outcome:
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
    say(found.table())
    return DONE, json.loads(found.to_json())


def _demo(arguments: argparse.Namespace) -> Outcome:
    from cir.cli.demo import run

    return run(Path(arguments.out), arguments.model, progress=not arguments.quiet), None


def _without_bars() -> None:
    """Those of the packages that load models and data sets."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported


def _read(path: str | None) -> str | None:
    return None if path is None else plain_text(Path(path), "text")


def _completion(arguments: argparse.Namespace) -> Outcome:
    if find_spec("shtab") is None:
        raise ValueError("expected the package shtab, which is not installed: pip install 'cir[completion]'")
    print(import_module("shtab").complete(parser(), arguments.shell))
    return DONE, None


def _of(module: str, name: str) -> Callable[[argparse.Namespace], Outcome]:
    """A command of another file, imported when it runs: it takes torch, which takes seconds."""

    def run(arguments: argparse.Namespace) -> Outcome:
        found: Outcome = getattr(import_module(f"cir.cli.{module}"), name)(arguments)
        return found

    return run


COMMANDS = {
    "demo": _demo,
    "unlearn": _of("unlearning", "run"),
    "forget": _of("edits", "forget"),
    "undo": _of("edits", "undo"),
    "edits": _of("edits", "edits"),
    "verify": _of("certificates", "run"),
    "eval": _eval,
    "attack": _attack,
    "profile": _profile,
    "plan": _plan,
    "completion": _completion,
    "doctor": _of("doctor", "run"),
    "fit": _of("edits", "fit"),
    "journal": _of("journals", "run"),
    "apply": _of("edits", "apply"),
    "revert": _of("edits", "apply"),
}
