"""Forget the facts of a file, from cron or Airflow; those that the journal holds already are skipped.

    python examples/batch.py --model some/llama --subspaces subspaces.safetensors --journal edits.cir \\
        --facts facts.jsonl --out edits

    BashOperator(task_id="forget", bash_command="python examples/batch.py --model ...", max_active_tis_per_dag=1)

Each edit is written to ``--out`` as a safetensors file and as a LoRA adapter, and each fact gives a line of JSON with
what was measured when its edit was made. The exit status is 0 if all are forgotten, 1 if some were refused, and 2 if
the work could not be done, on a journal that another process has open, for example.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cir

CONFIG_HELP = 'fields of cir.EditConfig as JSON, such as {"dose": 0.5}'


def forget_all(editor: cir.Editor, facts: Sequence[cir.Fact], leave: float) -> Iterator[tuple[cir.Edit | None, dict]]:
    """For each fact its edit, None if it was refused, and what to report.

    An edit that leaves more than ``leave`` of a fact's recall is undone, and the fact refused: a fact is either
    forgotten or untouched.
    """
    for fact in facts:
        held = next((edit for edit in editor.edits if edit.fact.sentences == fact.sentences), None)
        if held is not None:
            yield held, {"id": fact.id, "status": "skipped", **_measured(held)}
            continue
        try:
            edit = editor.forget(fact)
        except (ValueError, cir.EditError) as error:
            yield None, {"id": fact.id, "status": "refused", "reason": str(error)}
            continue
        if edit.after.recall > leave * edit.before.recall:
            editor.undo(edit)
            reason = f"recall is above {leave:g} of what it was ({edit.stopped}); undone"
            yield None, {"id": fact.id, "status": "refused", "reason": reason, **_measured(edit)}
            continue
        yield edit, {"id": fact.id, "status": "forgotten", **_measured(edit)}


def ship(edit: cir.Edit, out: Path, base_model: str) -> None:
    """Write what is missing of the two files of an edit; each is written whole or not at all."""
    name = f"{edit.number:04d}-{re.sub(r'[^A-Za-z0-9-]+', '_', edit.id)[:80]}"
    if not (out / f"{name}.safetensors").exists():
        edit.save(out / f"{name}.safetensors")
    if not (out / name).exists():
        edit.export_lora(out / name, base_model)


def _measured(edit: cir.Edit) -> dict[str, float]:
    return {
        "number": edit.number,
        "recall_before": edit.before.recall,
        "recall_after": edit.after.recall,
        "seconds": edit.seconds,
    }


def open_editor(arguments: argparse.Namespace) -> cir.Editor:
    model, tokenizer = cir.load_model(arguments.model)
    return cir.Editor(
        model,
        tokenizer,
        cir.Subspaces.load(arguments.subspaces, model.device),
        neighbours=arguments.neighbours,
        text=Path(arguments.text).read_text(encoding="utf-8") if arguments.text else None,
        journal=arguments.journal,
        config=arguments.config,
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    out, refused = Path(arguments.out), 0
    try:
        facts = cir.load_facts(arguments.facts)  # before the model: it is the quicker to fail
        out.mkdir(parents=True, exist_ok=True)
        with open_editor(arguments) as editor:
            for edit, line in forget_all(editor, facts, arguments.leave):
                if edit is None:
                    refused += 1
                else:
                    ship(edit, out, arguments.model)
                print(json.dumps(line), flush=True)
    except (ValueError, OSError, MemoryError) as error:
        print(f"batch: {error}", file=sys.stderr)
        return 2
    return 1 if refused else 0


def edit_config(text: str) -> cir.EditConfig:
    return cir.EditConfig(**json.loads(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Forget the facts of a file that are not forgotten yet.")
    parser.add_argument("--model", required=True, help="a hub id or a local folder")
    parser.add_argument("--subspaces", required=True, help="what Subspaces.save wrote for that model")
    parser.add_argument("--journal", required=True, help="a file that keeps the edits, done again at each start")
    parser.add_argument("--facts", required=True, help="what cir.load_facts reads")
    parser.add_argument("--out", required=True, help="a folder of its own for the edits of this journal")
    parser.add_argument("--text", help="a file, on which the loss is measured; by default the built-in text")
    parser.add_argument("--neighbours", help="facts that must stay, JSON lines; by default the contrast facts")
    parser.add_argument("--config", type=edit_config, default="{}", help=CONFIG_HELP)
    parser.add_argument("--leave", type=float, default=0.05, help="share of its recall that a fact may keep")
    return parser


if __name__ == "__main__":
    sys.exit(main())
