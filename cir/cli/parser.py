"""The options of every command. They are read without torch, so that help comes at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cir import __version__
from cir.cli.editing_options import add_editing
from cir.cli.options import (
    CONTRAST_HELP,
    FACTS_HELP,
    MODEL_HELP,
    OUT_HELP,
    OVERWRITE_HELP,
    Parser,
    count,
    positive,
    real,
    rounding,
    share,
    shared,
    sources,
    texts,
    whole,
)
from cir.cli.output import meant
from cir.cli.settings import words_of
from cir.system.files import shown

PRESETS = ("default", "paper", "repselect")
GPUS = ("a100-40", "a100-80", "l40s", "rtx4090", "rtx5090", "rtx-pro-6000", "h100", "h200", "b200")
JSON_TO: dict[str, Any] = {
    "metavar": "OUT",
    "nargs": "?",
    "const": "-",
    "default": "-",
    "help": "where to write (default: standard output)",
}
SHARD: dict[str, Any] = {
    "choices": ("fsdp", "tp"),
    "help": "how the model is divided over the processes that torchrun starts: their weights gathered layer by layer "
    "(default), or tensor parallel by the model's plan",
}
WITHOUT_JSON = ("demo", "completion")
SHELLS = ("bash", "zsh", "fish", "tcsh")
EPILOG = """Start with `cir demo`: it needs no GPU and takes minutes.

exit status:
  0    done
  1    an error, a refusal, or something was found wrong
  2    wrong usage
  3    done, but a fact is not wholly forgotten, or the required recall is not reached
  130  interrupted"""


def parser() -> Parser:
    """The parser of the ``cir`` command; ``command`` of what it returns is the command's name."""
    found = Parser(
        prog="cir",
        description="Make a language model forget chosen facts (Collapse of Irrelevant Representations).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"cir {__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="command")
    _add_demo(commands)
    _add_unlearn(commands, [shared(), sources(), texts()])
    _add_verify(commands, [shared(), sources()])
    _add_eval(commands, [shared(), sources()])
    _add_attack(commands, [shared()])
    _add_profile(commands, [shared(), sources(), texts()])
    _add_plan(commands)
    commands.add_parser(
        "doctor",
        help="see what would run here, and whether it is right",
        description="Versions, devices, and each kernel beside its PyTorch form. Exits with 1 if one differs.",
    )
    add_editing(commands)
    completion = commands.add_parser(
        "completion",
        help="print what makes a shell complete these commands",
        description="For bash: eval \"$(cir completion bash)\"; needs shtab (pip install 'cir[completion]').",
    )
    completion.add_argument("shell", choices=SHELLS)
    found.commands = commands.choices
    for name, command in found.commands.items():
        _add_common(name, command)
    return found


def _add_common(name: str, command: Parser) -> None:
    """What every command has."""
    if "json" not in command.options() and name not in WITHOUT_JSON:
        command.add_argument(
            "--json", action="store_const", const="-", help="print JSON, and all else to standard error"
        )
    command.add_argument("--quiet", action="store_true", help="no progress bars; there are none without a terminal")
    command.add_argument(
        "--verbose", action="count", default=0, help="show what is done: INFO of the logs, given twice DEBUG"
    )
    command.add_argument("--debug", action="store_true", help="show where an error comes from")


def read(words: Sequence[str]) -> argparse.Namespace:
    """What the command line ``words`` says, with what the file of its ``--config`` says where it does not; ends the
    process with 2 and one line where something is wrong.
    """
    words, top = list(words), parser()
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    top.check_options(words[:at])
    if at == len(words):
        return top.parse_args(words)
    name, rest = words[at], words[at + 1 :]
    if name not in top.commands:
        top.error(f"expected a command, got {shown(name)}{meant(name, top.commands)}")
    own = top.commands[name]
    own.check_options(rest)
    if name == "unlearn":
        try:
            words = [*words[: at + 1], *words_of(own, rest), *rest]
        except (ValueError, OSError) as error:
            own.error(str(error))
    arguments = top.parse_args(words)
    if name == "unlearn" and arguments.model is None:
        own.error("expected a model, with --model or in the file of --config, got none")
    return arguments


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="watch a small model forget capitals",
        description="SmolLM2-135M forgets the capitals of 28 countries; then an attacker tries to bring back six "
        "by training on the other 22. Shows what it knew, knows and relearns, and what was kept.",
    )
    command.add_argument("--out", default="cir-demo", help="folder for plot and report (default: %(default)s)")
    command.add_argument("--model", help=f"{MODEL_HELP}; by default SmolLM2-135M")


def _add_unlearn(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "unlearn",
        parents=parents,
        help="make a model forget facts and save it",
        description="Writes a checkpoint that plain transformers loads, and report.json beside it. The model is "
        "the best one found whose loss on neutral text rose by no more than the budget.",
    )
    command.add_argument("--model", help=f"{MODEL_HELP}; here or in --config")
    command.add_argument("--out", required=True, help=OUT_HELP)
    command.add_argument(
        "--adapter",
        action="store_true",
        help="write a LoRA adapter in place of a checkpoint; the model may be quantized",
    )
    command.add_argument("--adapter-rank", type=count, metavar="R", help="rank of the adapter at most (default: 128)")
    command.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON that gives options by name; those given here go first. Every run writes such a file, "
        "config.yaml, into its --out",
    )
    command.add_argument(
        "--budget", type=real, help="highest relative rise of the loss on that text (default: 0.001)"
    )
    command.add_argument(
        "--disruption-tokens",
        type=count,
        metavar="N",
        help="of that text, measured after each epoch (default: 32768)",
    )
    command.add_argument(
        "--full-check", action=argparse.BooleanOptionalAction, help="at the end, measure all of that text"
    )
    command.add_argument("--target-recall", type=real, help="stop as soon as mean recall is this low")
    command.add_argument(
        "--require-recall",
        type=share,
        metavar="X",
        help="exit with 3 if mean recall is above this in the end; all is written all the same",
    )
    command.add_argument("--contrast", metavar="FACTS", help=f"{CONTRAST_HELP} (default: built-in ones)")
    command.add_argument("--subspaces", metavar="FILE", help="of `cir fit`, in place of --contrast")
    command.add_argument("--floor", type=real, help="log-odds at which an answer is gone (default: -4)")
    command.add_argument("--max-steps", type=count, help="steps at most (default: 40)")
    command.add_argument(
        "--layers",
        type=real,
        metavar="SHARE",
        help="of the model's depth, from the top, that is updated (default: from just below where the facts come "
        "together)",
    )
    command.add_argument(
        "--worst-window", type=real, help="highest rise of the loss of one window, in nats a token (default: 0.1)"
    )
    command.add_argument("--rate", type=real, help="of the other presets: size of a forget step")
    command.add_argument("--max-epochs", type=count, help="of the other presets: passes over the facts at most")
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="paper: the authors' way, for Llama-3.1-8B; repselect: their later one",
    )
    command.add_argument(
        "--rounding",
        type=rounding,
        metavar="HOW",
        help="of updated 16-bit weights: nearest, stochastic or compensated (default: nearest of paper, else "
        "stochastic)",
    )
    command.add_argument("--seed", type=whole, help="of every random choice (default: 0)")
    command.add_argument(
        "--certify",
        action=argparse.BooleanOptionalAction,
        help="measure and attack the model before and after, and write certificate.json and a page beside the "
        "weights; needs --neighbours and --disruption",
    )
    command.add_argument("--no-relearning", action="store_true", help="certify without attacks by fine-tuning")
    command.add_argument(
        "--sign", metavar="KEY", help="sign the certificate with this private Ed25519 key, a PEM file"
    )
    command.add_argument("--max-length", type=count, metavar="N", help="tokens of a sentence at most (default: 128)")
    command.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    command.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="of the other presets: have the weights above the loss layers wait on the host (default: where the "
        "GPU's memory is short)",
    )
    command.add_argument("--shard", **SHARD)


def _add_verify(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "verify",
        parents=parents,
        help="recompute the certificate of a checkpoint",
        description="Says where it differs, and exits with 1 if it does, and what was not verified. Files that have "
        "moved, or lie elsewhere, are named anew.",
    )
    command.add_argument("folder", help="that `cir unlearn --certify` wrote")
    command.add_argument("--disruption", metavar="TEXT", help="the text on which the loss was certified")
    command.add_argument(
        "--original", metavar="MODEL", help="the model from before, to verify what was measured of it"
    )
    command.add_argument("--public-key", metavar="KEY", help="of who must have signed it, a PEM file")
    command.add_argument(
        "--no-relearning", action="store_true", help="leave out the attacks by fine-tuning: much faster"
    )


def _add_eval(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "eval",
        parents=parents,
        help="measure recall of facts and loss on text, and try cheap attacks",
        description="Changes nothing.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--text", metavar="TEXT", help="file on which to measure the loss, in nats a token")
    command.add_argument("--max-tokens", type=count, help="of that text, evenly spread (default: all)")
    command.add_argument(
        "--generate", type=whole, default=0, metavar="N", help="look for the answers in N greedy tokens too"
    )
    command.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="also tasks of lm-eval, mmlu say (pip install 'cir[eval]')"
    )
    command.add_argument("--task-limit", type=count, metavar="N", help="questions of each task at most")
    command.add_argument(
        "--attacks",
        action="store_true",
        help="also try quantization, sampling and, with --related, few-shot prompts and a linear probe",
    )
    command.add_argument(
        "--original", metavar="MODEL", help="the model before it forgot, for the attack that undoes small changes"
    )
    command.add_argument("--seed", type=whole, default=0, help="of the attacks' draws (default: %(default)s)")
    command.add_argument("--shard", **SHARD)
    command.add_argument("--json", **JSON_TO)


def _add_attack(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "attack",
        parents=parents,
        help="try to bring forgotten facts back by fine-tuning on related ones",
        description="Trains all MLP layers on one set of facts and measures recall of another after "
        "each epoch. Saves nothing: the model on disk is not touched.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--relearn", metavar="FACTS", required=True, help="facts to train on: " + FACTS_HELP)
    command.add_argument("--probe", metavar="FACTS", required=True, help="facts to measure; they need probes")
    command.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="(default: %(default)s)")
    command.add_argument("--lr", type=positive, default=1e-5, help="learning rate (default: %(default)s)")
    command.add_argument(
        "--lora-rank", type=whole, default=0, metavar="R", help="train adapters of this rank; 0 for the weights"
    )
    command.add_argument("--epochs", type=count, default=6, help="passes over the facts (default: %(default)s)")
    command.add_argument("--steps", type=count, metavar="N", help="so many instead, of 32 sentences each")
    command.add_argument("--probe-every", type=count, metavar="N", help="steps between looks (default: an epoch's)")
    command.add_argument("--all-parameters", action="store_true", help="train all of the model, not the MLPs alone")
    command.add_argument("--json", **JSON_TO)


def _add_profile(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "profile",
        parents=parents,
        help="see where the time of unlearning goes",
        description="Forgets for some epochs under torch's profiler: seconds and FLOPs by phase. Saves no model.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--preset", choices=PRESETS, default="default", help="as for `cir unlearn`")
    command.add_argument("--epochs", type=count, default=1, help="(default: %(default)s)")
    command.add_argument("--out", default="cir-profile", help="folder for what is found (default: %(default)s)")


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="see what a run will need and take on a GPU, before it is rented",
        description="From the configuration of a model alone: no weights are loaded and no GPU is needed.",
    )
    command.add_argument("--model", required=True, help="a folder, a config.json or a hub id")
    command.add_argument("--gpu", required=True, choices=GPUS, help="which it is to run on")
    command.add_argument("--facts", type=count, required=True, metavar="N", help="how many")
    command.add_argument("--sentences", type=count, default=3, metavar="N", help="of each (default: %(default)s)")
    command.add_argument("--tokens", type=count, default=20, metavar="N", help="of a sentence (default: %(default)s)")
    command.add_argument("--plot", metavar="PNG", help="draw the seconds of each phase")
