"""Forgetting on a random model, as users call it and against eager forms: seconds a fact and peak memory.

    python -m bench.step [--model 8b|small|tiny] [--tasks unlearn edit ...] [--out bench/results]

``unlearn``: :func:`cir.unlearn` whole, with the defaults and all they check, from call to return: facts of three
sentences (12 to 32 tokens, the last one the answer), as many contrast facts as are built in, and as many steps of
every fact as 29 capitals took of SmolLM2 (a random model has nothing to forget and would go on to the last).
``edit``: :meth:`cir.Editor.forget` whole, of a fact that the random model was taught; the subspaces are there.
``W1``: the same facts in the paper's way, against the eager forms: batches of 32, k = 24/36, a retain step after each
forget step, a budget check after each epoch. ``8b`` is the configuration of Llama-3.1-8B in bfloat16 with 112 facts,
for a GPU; ``small`` that of SmolLM2-135M in float32 with 32 facts and smaller retain batches, for any machine; and
``tiny`` a rehearsal. Weights are random, seeds fixed, nothing is downloaded. Each form runs in a process of its own,
ours twice: the second run is what counts, and the first, which compiles kernels, is reported beside it.

Forms: ``ours``; ``eager``, the plain way (autograd's weight gradients, tokens in lists, ``pca_lowrank``, the full
forward); ``trimmed``, the same without the layers above the loss layers, as the authors' code has it; ``ascent``,
gradient ascent on the facts by plain SGD with the same retain steps and checks; ``saving``, ours with the weights
above the loss layers on the host.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cir
from bench.eager import EagerCIR
from bench.records import ROOT, mark_memory, process_memory, write_rows
from cir import CIRConfig, Edit, EditError, Editor, Fact, Report, Subspaces
from cir.config import BreakingConfig, EditConfig
from cir.data.facts import load_facts
from cir.data.tokens import Batch
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.questions import joined, questions
from cir.forgetting.update import fingerprint, sign_step, sizes
from cir.measures import token_losses
from cir.model.capture import answering
from cir.model.finding import find_stack
from cir.proof.relearning import sentence_loss

WORDS = 4096
CONTRAST = 48
"""Facts that are told to stay: as many as are built in."""
TAUGHT, TEACHING_RATE, LESSONS = -2.0, 0.05, 60
"""Log-odds at which a fact is known that is to be edited out, and the steps towards it, see :func:`sign_step`."""
TASKS = [
    ("unlearn", "ours", 12),
    ("edit", "ours", 12),
    ("W1", "eager", 2),
    ("W1", "ours", 2),
    ("W1", "saving", 2),
    ("W1", "ascent", 2),
    ("W1", "trimmed", 2),
]
"""Task, form, and how much of it: epochs of ``W1``, else steps, at most, which is what SmolLM2's facts took."""


@dataclass(frozen=True)
class Workload:
    """``checked``: tokens of a budget check. ``words``: of the shortest and the longest sentence. ``layers``: share
    of the depth that the default updates.
    """

    llama: dict[str, Any]
    dtype: torch.dtype
    facts: int
    config: BreakingConfig
    checked: int
    words: tuple[int, int] = (12, 32)
    layers: float = 0.3


PAPER = replace(CIRConfig.paper(), budget=1e9, retain_tokens=12 * 128 * 8)
DEFAULT = CIRConfig(floor=-1e3, relearning_floor=-1e3, budget=1e9, worst_window=1e9)
"""As users have it, but that nothing ends it: every fact is left in every step."""
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    **SMOLLM2,
    "vocab_size": 45100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SMALL = replace(PAPER, retain_batch_size=2, retain_tokens=2 * 128 * 4)
WORKLOADS = {
    "8b": Workload(LLAMA_8B, torch.bfloat16, 112, PAPER, 32768),
    "small": Workload(SMOLLM2, torch.float32, 32, SMALL, 512),
    "tiny": Workload(
        TINY, torch.bfloat16, 3, replace(SMALL, rank_activation=4, rank_gradient=4, loss_layers=(1, 3)), 512
    ),
}


def random_model(workload: Workload, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**workload.llama), dtype=workload.dtype)
    return model.eval()


def word_tokenizer() -> Any:
    """Words w0, w1, ... are a token each: ids all over the smallest vocabulary here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, **{f"w{i}": 1 + 11 * i for i in range(WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>")


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(count))


def fact(draw: random.Random, name: str, length: tuple[int, int]) -> Fact:
    """Three sentences that lead to one word; the first is asked."""
    answer = words(draw, 1)
    prompts = [words(draw, draw.randint(*length) - 1) for _ in range(3)]
    probes = [{"prompt": prompts[0], "target": f" {answer}"}]
    return load_facts([{"id": name, "sentences": [f"{p} {answer}" for p in prompts], "probes": probes}])[0]


class Run:
    """One form on one workload, from the random weights."""

    def __init__(self, workload: Workload, count: int, model: Any = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.count = count
        self.config = replace(workload.config, max_epochs=count, disruption_tokens=workload.checked)
        self.model = (random_model(workload, self.device) if model is None else model).requires_grad_(False)
        self.tokenizer = word_tokenizer()
        draw = random.Random(0)
        drawn = [fact(draw, f"f{i}", workload.words) for i in range(workload.facts + CONTRAST)]
        self.facts, self.contrast = drawn[: workload.facts], drawn[workload.facts :]
        self.retain = words(draw, self.config.retain_tokens)
        self.disruption = words(draw, max(2 * workload.checked, 1024))
        self.stack = find_stack(self.model)
        self.layers = self.config.layers(len(self.stack.mlps))
        self.share = workload.layers
        self.targets = self.stack.targets(self.layers[-1])

    def batch(self, form: str) -> None:
        """W1 by ``form``."""
        if form in ("ours", "saving"):
            options = {"retain": self.retain, "disruption": self.disruption, "config": self.config}
            options["offload"] = "always" if form == "saving" else "never"
            cir.unlearn(self.model, self.tokenizer, self.facts, **options, on_signal="raise", progress=False)
            return
        batches = fact_batches(self.tokenizer, self.facts, self.config, self.device)
        retain, rows = text_batches(self.tokenizer, self.retain, self.disruption, self.config, self.device)
        rows = rows[: self.config.disruption_tokens // rows.shape[1]]
        before = token_losses(self.model, rows)
        weights = [target.linear.weight.requires_grad_(True) for target in self.targets]
        try:
            self._eager(form, batches, retain, lambda: token_losses(self.model, rows) - before)
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def _eager(self, form: str, batches: list[Batch], retain: list[Batch], check: Callable[[], Any]) -> None:
        config = self.config
        eager = EagerCIR(self.model, self.stack, self.layers, config, trims=form != "eager")
        eager.record(batches)
        eager.record_retain(retain)
        if form != "ascent":
            eager.epoch(batches)
        for _ in range(config.max_epochs):
            if form != "ascent":
                eager.epoch(batches, config.retain_rate)
            else:
                for batch in batches:
                    self._ascend(batch)
                    eager.retain_step(config.retain_rate)
            check()

    def _ascend(self, batch: Batch) -> None:
        sentence_loss(self.model, self.stack, batch).backward()
        with torch.no_grad():
            for target in self.targets:
                weight = target.linear.weight
                weight.add_(weight.grad, alpha=self.config.rate)
                weight.grad = None

    def unlearn(self) -> Report:
        """The default, as users call it."""
        tokens = self.config.disruption_tokens
        config = replace(DEFAULT, max_steps=self.count, layers=self.share, disruption_tokens=tokens)
        return cir.unlearn(
            self.model,
            self.tokenizer,
            self.facts,
            contrast=self.contrast,
            retain=self.retain,
            disruption=self.disruption,
            config=config,
            on_signal="raise",
            progress=False,
        )

    def edit(self) -> Callable[[], Edit | None]:
        """What is done beforehand, and then the call; each of the next fact."""
        facts, share = self.facts[:2], CIRConfig(layers=self.share)
        subspaces = Subspaces.fit(
            self.model, self.tokenizer, self.retain, self.contrast, config=share, progress=False
        )
        self._teach(facts)
        subspaces.fitted_on["fingerprint"] = fingerprint(self.stack.writers(subspaces.fitted_on["layers"][0]))
        config = EditConfig(max_steps=self.count, keep=1e-6)  # what a random model recalls of others is noise
        editor = Editor(self.model, self.tokenizer, subspaces, text=self.disruption, config=config)

        def forget() -> Edit | None:
            try:
                return editor.forget(facts.pop(0))
            except EditError:  # after all its steps: a random model may have nothing that is the fact's alone
                return None

        return forget

    def _teach(self, facts: list[Fact]) -> None:
        """Steps by the signs of the gradient until ``facts`` are known."""
        first = CIRConfig(layers=self.share).first_layer(len(self.stack.mlps))
        with answering(self.model, self.stack, first) as tape:
            asked = questions(tape, self.tokenizer, facts, max_length=128, at_once=512)
            for lesson in range(LESSONS):
                rows = joined([part.read(tape) for part in asked])
                if float(rows.odds.min()) > TAUGHT:
                    return
                lengths = [TEACHING_RATE * size for size in sizes(tape.mlps)]
                sign_step(tape.mlps, rows.tokens, lengths, lesson)
        raise RuntimeError(f"expected facts to be known after {LESSONS} lessons, got log-odds {rows.odds.tolist()}")

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def measured(name: str, task: str, form: str, count: int) -> dict[str, Any]:
    """One form of one task, in this process: seconds, and peak memory beyond the weights."""
    run = Run(WORKLOADS[name], count)
    calls: dict[str, Callable[[], object]] = {"unlearn": run.unlearn, "W1": lambda: run.batch(form)}
    call = run.edit() if task == "edit" else calls[task]
    first = seconds(call, run.device)[0] if form in ("ours", "saving") else None
    before = memory_before(run.device)
    again, told = seconds(call, run.device)
    facts = 1 if task == "edit" else len(run.facts)
    return {
        "bench": "step",
        "model": name,
        "task": task,
        "form": form,
        "facts": facts,
        "seconds": again,
        "seconds_a_fact": again / facts,
        "first_seconds": first,
        "peak_bytes": peak_memory(run.device) - before,
        "total_bytes": peak_memory(run.device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if run.device.type == "cuda" else None,
        "weight_bytes": run.weight_bytes(),
        "epochs": count if task == "W1" else None,
        "steps": told.steps if isinstance(told, Edit) else count if task == "unlearn" else None,
        "phases": told.seconds if isinstance(told, Report) else None,
        "log_odds": [epoch.forget_loss for epoch in told.epochs] if isinstance(told, Report) else None,
        "recall": [told.before.recall, told.after.recall] if isinstance(told, Edit) else None,
    }


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Of a call, and what it returned."""
    start = time.perf_counter()
    told = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, told


def memory_before(device: torch.device) -> int:
    """Start looking for the peak; bytes in use now."""
    if device.type != "cuda":
        return mark_memory()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else process_memory("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORKLOADS), default="8b" if torch.cuda.is_available() else "small")
    every = list(dict.fromkeys(f"{task}:{form}" for task, form, _ in TASKS))
    parser.add_argument("--tasks", nargs="+", choices=every, default=every)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    eager: dict[str, float] = {}
    failed = False
    print(
        f"{'task':<8}{'form':<8}{'count':>7}{'seconds':>9}{'a fact':>9}{'speed-up':>10}{'peak MiB':>10}", flush=True
    )
    for task, form, count in TASKS:
        if f"{task}:{form}" not in arguments.tasks or (form == "saving" and not torch.cuda.is_available()):
            continue  # saving saves the memory of a GPU
        try:
            with spawn.Pool(1) as pool:
                row = pool.apply(measured, (arguments.model, task, form, count))
        except Exception as error:  # of this one alone: the others are measured all the same
            failed = True
            told = {"bench": "step", "model": arguments.model, "task": task, "form": form, "failed": repr(error)}
            write_rows(arguments.out / "step.jsonl", [told])
            traceback.print_exception(error)
            continue
        if form == "eager":
            eager[task] = row["seconds"]
        row["speedup"] = eager[task] / row["seconds"] if task in eager else None
        write_rows(arguments.out / "step.jsonl", [row])
        ratio = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        print(
            f"{task:<8}{form:<8}{count:>7}{row['seconds']:>9.2f}{row['seconds_a_fact']:>9.3f}{ratio:>10}"
            f"{row['peak_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
