"""The options of what makes, keeps and takes back edits."""

from __future__ import annotations

from typing import Any

from cir.cli.options import (
    CONTRAST_HELP,
    FACTS_HELP,
    MODEL_HELP,
    OUT_HELP,
    OVERWRITE_HELP,
    Parser,
    count,
    positive,
    share,
    shared,
)

JOURNAL_HELP = "of the edits of this model"
KEY_HELP = "holds the key that the journal was made with"


def add_editing(commands: Any) -> None:
    """Those of ``fit``, ``forget``, ``undo``, ``edits``, ``apply``, ``revert`` and ``journal``."""
    _add_fit(commands, [shared()])
    _add_forget(commands, [shared()])
    _add_undo(commands, [shared()])
    _add_edits(commands)
    _add_apply_and_revert(commands, [shared()])
    _add_journal(commands)


def _add_forget(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "forget",
        parents=parents,
        help="make a model forget one fact, or a few one by one, as edits that can be undone",
        description="Adds an edit to the journal, from which the next call does it again: the model on disk is not "
        "touched. Exits with 3 where a fact is only partly forgotten, with 1 where one is refused.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    facts = command.add_mutually_exclusive_group(required=True)
    facts.add_argument("--fact", metavar="TEXT", help='a sentence: "The capital of Italy is Rome."')
    facts.add_argument("--facts", metavar="FILE", help=f"one or more, forgotten in turn: {FACTS_HELP}")
    command.add_argument("--journal", metavar="FILE", required=True, help=f"{JOURNAL_HELP}; made where there is none")
    stay = command.add_mutually_exclusive_group()
    stay.add_argument("--contrast", metavar="FACTS", help=f"{CONTRAST_HELP} (default: built-in ones)")
    stay.add_argument("--subspaces", metavar="FILE", help="of `cir fit`, which saves the time of fitting them here")
    command.add_argument("--text", help="file of ordinary text, on which harm is measured (default: built-in text)")
    command.add_argument("--max-steps", type=count, metavar="N", help="steps at most for a fact (default: 40)")
    command.add_argument(
        "--budget", type=positive, help="highest relative rise of the loss on the text, by one edit (default: 0.001)"
    )
    command.add_argument(
        "--worst-window", type=positive, help="highest rise of one window, in nats a token (default: 0.03)"
    )
    command.add_argument(
        "--target-recall", type=share, help="forgotten is at this share of what recall was (default: 0.01)"
    )
    command.add_argument(
        "--keep", type=share, help="of the contrast facts' mean recall, what must stay (default: 0.98)"
    )
    command.add_argument("--save-edit", metavar="FILE", help="also write the edit, for `cir apply`; of one fact")
    _add_kept(command)


def _add_kept(command: Any) -> None:
    command.add_argument("--out", help=f"{OUT_HELP}: with all edits that are in effect then")
    command.add_argument("--overwrite", action="store_true", help="replace what is to be written, where it exists")
    command.add_argument("--key-file", metavar="FILE", help=KEY_HELP)


def _add_undo(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "undo",
        parents=parents,
        help="take an edit of a journal back",
        description="Refused where a fact that a later edit forgot would come back.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--journal", metavar="FILE", required=True, help=JOURNAL_HELP)
    command.add_argument("--edit", type=count, metavar="N", help="its number (default: the last in effect)")
    _add_kept(command)


def _add_edits(commands: Any) -> None:
    command = commands.add_parser(
        "edits",
        help="list the edits of a journal",
        description="Needs no model. `cir journal check` looks for damage.",
    )
    command.add_argument("--journal", metavar="FILE", required=True, help="of which to list them")
    command.add_argument("--key-file", metavar="FILE", help=KEY_HELP)


def _add_fit(commands: Any, parents: list[Parser]) -> None:
    command = commands.add_parser(
        "fit",
        parents=parents,
        help="fit subspaces, once for a model and all that it is to forget",
        description="What ordinary text and contrast facts have in common, kept in a safetensors file.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument(
        "--contrast",
        metavar="FACTS",
        required=True,
        help=f"{CONTRAST_HELP}: {FACTS_HELP}",
    )
    command.add_argument("--text", help="file of ordinary text (default: the built-in text)")
    command.add_argument("--out", required=True, help="the safetensors file; written whole or not at all")
    command.add_argument("--overwrite", action="store_true", help="replace --out where it exists")


def _add_apply_and_revert(commands: Any, parents: list[Parser]) -> None:
    for name, sign, what in (("apply", 1, "add edits to"), ("revert", -1, "take edits out of")):
        change = commands.add_parser(
            name,
            parents=parents,
            help=f"{what} a checkpoint",
            description="Reads the new checkpoint back and compares hashes before it is put in place.",
        )
        change.add_argument("--model", required=True, help=MODEL_HELP)
        change.add_argument("--edit", nargs="+", required=True, help="files of Edit.save")
        change.add_argument("--out", required=True, help=OUT_HELP)
        change.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
        change.add_argument(
            "--force",
            action="store_true",
            help="also to a model that they were not made on"
            if sign == 1
            else "also where no record says they are in",
        )
        change.set_defaults(sign=sign)


def _add_journal(commands: Any) -> None:
    command = commands.add_parser(
        "journal",
        help="see what a journal of edits holds, and mend one that is damaged",
        description="check: exits with 1 where a record was cut short, altered, moved or left out. repair: moves all "
        "from that record on to a file beside it, and so loses what it forgot.",
    )
    command.add_argument("what", choices=("check", "repair"))
    command.add_argument("file", help="of Editor(journal=...), which no process has open")
    command.add_argument("--key-file", metavar="FILE", help=KEY_HELP)
