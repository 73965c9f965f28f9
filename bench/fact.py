"""One fact at a time on SmolLM2-135M: an Editor against gradient ascent, side by side in one process.

    python -m bench.fact [--facts F.jsonl --contrast C.jsonl] [--text T.txt] [--measured M.txt] [--single 6]
                         [--edits 1 10 50] [--forms cir ascent] [--attack] [--out bench/results]

Singly, each fact is forgotten from the original weights by each form in turn. Then the facts are edited one upon
another, and after so many all are measured together. Kept is what the model recalls of facts that it was neither
told to forget nor fitted on: those not yet edited. The text on which the loss is measured is not the Editor's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench.records import ROOT, process_memory, write_rows
from cir import EditConfig, EditError, Editor, Fact, Subspaces, load_facts, relearn
from cir.data.sampling import sample
from cir.data.shipped import DATA, builtin_text
from cir.data.tokens import sentence_batches, windows
from cir.forgetting.update import fingerprint, restore, snapshot
from cir.measures import loss_rise, recall, token_losses
from cir.model.checkpoints import demo_model, load_model
from cir.model.finding import find_stack

FORMS = ("cir", "ascent")
ASCENT_STEPS = 40
ASCENT_RATE = 1e-5


class Bench:
    """The model and its measures; facts are forgotten by :meth:`forget_with`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.tokenizer = load_model(demo_model(), device="cpu")
        stack = find_stack(self.model)
        self.mlps = stack.targets(len(stack.mlps) - 1)
        # With the outputs of attention, which edits change too.
        self.targets = list({target.name: target for target in [*self.mlps, *stack.writers(0)]}.values())
        self.weights, self.fingerprint = snapshot(self.targets), fingerprint(self.targets)
        self.facts, self.contrast = load_all(arguments.facts), load_all(arguments.contrast)
        text = builtin_text() if arguments.text is None else Path(arguments.text).read_text(encoding="utf-8")
        measured = text if arguments.measured is None else Path(arguments.measured).read_text(encoding="utf-8")
        self.text = sample(windows(self.tokenizer, measured, 256), 8192)
        self.losses = token_losses(self.model, self.text.rows)
        self.recalls = self.recall(self.facts)
        started = time.perf_counter()
        subspaces = Subspaces.fit(self.model, self.tokenizer, text, self.contrast, progress=False)
        self.fit_seconds = time.perf_counter() - started
        self.editor = Editor(self.model, self.tokenizer, subspaces, text=text)

    def recall(self, facts: Sequence[Fact]) -> dict[str, float]:
        return recall(self.model, self.tokenizer, facts)

    def forget_with(self, form: str, fact: Fact) -> float:
        """Seconds that it took. A refusal leaves the fact as it was, and counts."""
        started = time.perf_counter()
        if form == "ascent":
            self._ascend(fact)
        else:
            try:
                self.editor.forget(fact)
            except (EditError, ValueError) as error:
                print(error)
        return time.perf_counter() - started

    def _ascend(self, fact: Fact) -> None:
        """Adam up the loss of the fact's sentences, all MLP linears, to the recall at which an edit stops."""
        config = EditConfig()
        (batch,) = sentence_batches(
            self.tokenizer, [fact], batch_size=len(fact.sentences), max_length=128, skip_first=0
        )
        labels = batch.input_ids.masked_fill(~batch.attention_mask, -100)
        weights = [target.linear.weight.requires_grad_(True) for target in self.mlps]
        optimizer = torch.optim.Adam(weights, lr=ASCENT_RATE, maximize=True)
        before = self.recall([fact])[fact.id]
        for step in range(1, ASCENT_STEPS + 1):
            optimizer.zero_grad(set_to_none=True)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            self.model(**inputs, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            done = step % config.check_every == 0 and self.recall([fact])[fact.id] <= config.target_recall * before
            if done:
                break
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None

    def undo_edits(self) -> None:
        while self.editor.edits:
            self.editor.undo()

    def undo_all(self) -> None:
        self.undo_edits()
        restore(self.targets, self.weights)

    def measure(self, forgotten: Sequence[Fact]) -> dict[str, Any]:
        ids = {fact.id for fact in forgotten}
        now = self.recall(self.facts)
        rise, stderr = loss_rise(token_losses(self.model, self.text.rows), self.losses, self.text)
        return {
            "target_share": share(now, self.recalls, ids),
            "kept_share": share(now, self.recalls, now.keys() - ids),
            "rise": rise,
            "rise_stderr": stderr,
        }

    def attacked(self, fact: Fact) -> float:
        others = [other for other in self.facts if other is not fact]
        history = relearn(self.model, self.tokenizer, others, [fact], progress=False)
        return history[-1][fact.id] / self.recalls[fact.id]


def load_all(files: Sequence[str]) -> list[Fact]:
    return [fact for file in files for fact in load_facts(file)]


def share(now: dict[str, float], before: dict[str, float], ids: Any) -> float | None:
    return sum(now[i] for i in ids) / sum(before[i] for i in ids) if ids else None


def singly(bench: Bench, forms: Sequence[str], count: int, attack: bool) -> Iterator[dict[str, Any]]:
    for fact in bench.facts[:count]:
        for form in forms:
            Path("/proc/self/clear_refs").write_text("5")
            resident = process_memory("VmRSS")
            seconds = bench.forget_with(form, fact)
            peak = process_memory("VmHWM") - resident
            row = {"bench": "fact.single", "form": form, "fact": fact.id, "seconds": seconds, "peak_bytes": peak}
            row.update(bench.measure([fact]))
            if form == "cir":
                for edit in bench.editor.edits:
                    row.update(steps=edit.steps, edit_bytes=edit.nbytes, stopped=edit.stopped)
            if attack:
                row["attacked_share"] = bench.attacked(fact)
            bench.undo_all()
            yield row


def one_upon_another(bench: Bench, forms: Sequence[str], counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for form in forms:
        times: list[float] = []
        for number, fact in enumerate(bench.facts[: max(counts)], 1):
            times.append(bench.forget_with(form, fact))
            if number in counts:
                row = {"bench": "fact.sequence", "form": form, "edits": number, "seconds": statistics.median(times)}
                yield {**row, "slowest": max(times), **bench.measure(bench.facts[:number])}
        if form == "cir":
            bench.undo_edits()
            same = fingerprint(bench.targets) == bench.fingerprint
            print(f"all undone: the weights are {'the same bits' if same else 'OTHERS'}")
        bench.undo_all()


def show(row: dict[str, Any]) -> None:
    what = row.get("fact") or f"{row['edits']} edits"
    kept = "" if row["kept_share"] is None else f"kept {row['kept_share']:.3f}"
    print(
        f"{row['form']:<8}{what:<20}{row['seconds']:>6.1f} s  target {row['target_share']:.3f}  {kept}  text "
        f"{row['rise']:+.3%} (se {row['rise_stderr']:.3%})"
        + (f"  attacked {row['attacked_share']:.3f}" if "attacked_share" in row else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", nargs="+", default=[str(DATA / "demo_forget.jsonl")])
    parser.add_argument("--contrast", nargs="+", default=[str(DATA / "demo_related.jsonl")])
    parser.add_argument("--text", help="for fitting and for the Editor's budget; default: the built-in text")
    parser.add_argument("--measured", help="text on which the loss is measured; default: --text")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--single", type=int, default=6, help="facts forgotten singly")
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--attack", action="store_true", help="also fine-tune on the other facts after each")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(f"subspaces fitted in {bench.fit_seconds:.0f} s")
    counts = sorted({min(count, len(bench.facts)) for count in arguments.edits})
    rows = chain(
        singly(bench, arguments.forms, arguments.single, arguments.attack),
        one_upon_another(bench, arguments.forms, counts),
    )
    for row in rows:
        show(row)
        write_rows(arguments.out / "fact.jsonl", [{**row, "fit_seconds": bench.fit_seconds}])


if __name__ == "__main__":
    main()
