"""Keep forgotten facts forgotten while you fine-tune: a callback for the Trainer of transformers.

    python examples/trainer_callback.py --model some/llama --edits edits/*.safetensors --text mine.txt --out tuned

``KeepForgotten`` measures the recall of the edits' facts at each evaluation and each save, logs it, and ends the
training when one is recalled at more than a share of what it was before its edit. The script applies the edits,
fine-tunes on a text, and writes ``--out`` only if none came back; its exit status is else 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import cir

logger = logging.getLogger(__name__)


class KeepForgotten(TrainerCallback):
    """Ends the training when a forgotten fact comes back.

    Each process measures on its own, so the model must be whole in each: one GPU or DDP, not FSDP.

    Args:
        edits: in effect in the model that is trained.
        tokenizer: the model's.
        share: of a fact's recall before its edit, above which it is back.
        log: where figures go, as a rule ``trainer.log``; ``trainer.add_callback`` adds a callback that has it.

    Attributes:
        returned: ids of the facts that came back, empty while there are none.
    """

    def __init__(
        self,
        edits: Sequence[cir.Edit],
        tokenizer: Any,
        *,
        share: float = 0.2,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if not edits:
            raise ValueError("edits: expected at least one, got none")
        if not 0 < share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {share}")
        # Facts given to the editor as plain sentences all have the same id: the position tells them apart.
        self._edits = {str(place): edit for place, edit in enumerate(edits)}
        self._facts = [replace(edit.fact, id=place) for place, edit in self._edits.items()]
        self._tokenizer, self._share, self._log = tokenizer, share, log
        self._measured_at = -1
        self.returned: list[str] = []

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(kwargs["model"], state, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(kwargs["model"], state, control)

    def _look(self, model: Any, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step == self._measured_at:
            return
        self._measured_at = state.global_step
        recall = self._recall(model)
        self.returned = [
            edit.id for place, edit in self._edits.items() if recall[place] > self._share * edit.before.recall
        ]
        if self._log is not None:
            self._log({"forgotten_recall": sum(recall.values()) / len(recall), "returned": float(len(self.returned))})
        if self.returned:
            logger.warning("step %d: back are %s; training ends", state.global_step, ", ".join(self.returned))
            control.should_training_stop = True

    def _recall(self, model: Any) -> dict[str, float]:
        training = model.training
        model.eval()  # dropout would lower recall
        try:
            return cir.evaluate(model, self._tokenizer, self._facts).recall
        finally:
            model.train(training)


def windows(tokenizer: Any, text: str, length: int) -> list[dict[str, list[int]]]:
    """``text`` in windows of ``length`` tokens, as the Trainer wants them."""
    ids = tokenizer(text)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise ValueError(f"expected a text of at least {length} tokens, got {len(ids)}")
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fine-tune an edited model, and stop if a fact comes back.")
    parser.add_argument("--model", required=True, help="the model that the edits were made on")
    parser.add_argument("--edits", required=True, nargs="+", help="what Edit.save wrote, all in effect")
    parser.add_argument("--text", required=True, help="a file to fine-tune on")
    parser.add_argument("--out", required=True, help="a folder for the model")
    parser.add_argument("--share", type=float, default=0.2, help="of its recall, above which a fact is back")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between looks at the facts")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    arguments = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model)
    edits = [cir.Edit.load(path) for path in arguments.edits]
    for edit in edits:
        edit.apply_(model)
    rows = windows(tokenizer, Path(arguments.text).read_text(encoding="utf-8"), arguments.length)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            learning_rate=arguments.lr,
            eval_strategy="steps",
            eval_steps=arguments.every,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=default_data_collator,
    )
    watch = KeepForgotten(edits, tokenizer, share=arguments.share, log=trainer.log)
    trainer.add_callback(watch)
    trainer.train()
    trainer.evaluate()  # the last step need not be one at which it was measured
    if watch.returned:
        print(f"back: {', '.join(watch.returned)}; nothing was written", file=sys.stderr)
        return 1
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
