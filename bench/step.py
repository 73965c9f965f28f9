"""A batch of facts, and one fact, on a random model: seconds a fact and peak memory.

    python -m bench.step [--model 8b|small] [--out bench/results]

W1, a batch, in the paper's way, against the eager forms: facts of three sentences (12 to 32 tokens) in batches of 32,
k = 24/36, a retain step after each forget step, a budget check after each epoch. W2, one fact: three sentences, of
which a random model has one token each tell it, subspaces of an eighth of the directions at hand, 15 steps of
:class:`Forgetter` with nothing measured on the way, from call to return. ``8b`` is the configuration of Llama-3.1-8B
in bfloat16 with 112 facts, for a GPU; ``small`` that of SmolLM2-135M in float32 with 32 facts and smaller retain
batches, for any machine. Weights are random, seeds fixed, nothing is downloaded. Each form runs in a process of its
own, ours twice: the second run is what counts, and the first, which compiles kernels, is reported beside it.

Forms: ``ours``; ``eager``, the plain way (autograd's weight gradients, tokens in lists, ``pca_lowrank``, the full
forward); ``trimmed``, the same without the layers above the loss layers, as the authors' code has it; ``ascent``,
gradient ascent on the facts by plain SGD with the same retain steps and checks; ``saving``, ours with the weights
above the loss layers on the host.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cir
from bench.eager import EagerCIR
from bench.records import ROOT, mark_memory, process_memory, write_rows
from cir import CIRConfig, Subspaces
from cir.config import BreakingConfig
from cir.data.facts import load_facts
from cir.data.tokens import Batch
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.forgetter import Forgetter
from cir.measures import token_losses
from cir.model.capture import answering
from cir.model.sites import find_stack
from cir.proof.relearning import sentence_loss

WORDS = 4096
ONE_FACT_STEPS = 15
TASKS = [
    ("W2", "ours", 1),
    ("W1", "ours", 10),
    ("W1", "eager", 2),
    ("W1", "ascent", 2),
    ("W1", "ours", 2),
    ("W1", "saving", 10),
    ("W1", "trimmed", 2),
]
"""Task, form, and update epochs: forms are compared over two, as ten of the eager one take minutes on any GPU."""


@dataclass(frozen=True)
class Workload:
    """``checked``: tokens of a budget check. ``words``: of the shortest and the longest sentence."""

    llama: dict[str, Any]
    dtype: torch.dtype
    facts: int
    config: BreakingConfig
    checked: int
    words: tuple[int, int] = (12, 32)


PAPER = replace(CIRConfig.paper(), budget=1e9, retain_tokens=12 * 128 * 8)
ONE_FACT = CIRConfig(rank=1 / 8, floor=-1e3)
"""The floor is so low that there is always a step to take."""
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
WORKLOADS = {
    "8b": Workload(LLAMA_8B, torch.bfloat16, 112, PAPER, 4096),
    "small": Workload(
        SMOLLM2, torch.float32, 32, replace(PAPER, retain_batch_size=2, retain_tokens=2 * 128 * 4), 512
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


class Run:
    """One form on one workload, from the random weights."""

    def __init__(self, workload: Workload, epochs: int, model: Any = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = replace(workload.config, max_epochs=epochs, disruption_tokens=workload.checked)
        self.model = (random_model(workload, self.device) if model is None else model).requires_grad_(False)
        self.tokenizer = word_tokenizer()
        draw = random.Random(0)
        self.facts = load_facts(
            [
                {"id": f"f{i}", "sentences": [words(draw, draw.randint(*workload.words)) for _ in range(3)]}
                for i in range(workload.facts)
            ]
        )
        self.retain = words(draw, self.config.retain_tokens)
        self.disruption = words(draw, max(workload.checked, 512))
        self.stack = find_stack(self.model)
        self.layers = self.config.layers(len(self.stack.mlps))
        self.targets = self.stack.targets(self.layers[-1])

    def batch(self, form: str) -> None:
        """W1 by ``form``."""
        if form in ("ours", "saving"):
            options = {"retain": self.retain, "disruption": self.disruption, "config": self.config}
            options["offload"] = "always" if form == "saving" else "never"
            cir.unlearn(self.model, self.tokenizer, self.facts, **options, progress=False)
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

    def one_fact(self) -> Callable[[], None]:
        """W2: what is done beforehand, and then the call."""
        fact, *others = self.facts
        subspaces = Subspaces.fit(self.model, self.tokenizer, self.retain, others, config=ONE_FACT, progress=False)
        first = ONE_FACT.first_layer(len(self.stack.mlps))
        targets = self.stack.writers(first)

        def forget() -> None:
            with answering(self.model, self.stack, first) as tape:
                forgetter = Forgetter(tape, targets, self.tokenizer, [fact], subspaces, ONE_FACT)
                for _ in range(ONE_FACT_STEPS):
                    forgetter.apply(forgetter.step())

        return forget

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def measured(name: str, task: str, form: str, epochs: int) -> dict[str, Any]:
    """One form of one task, in this process: seconds, and peak memory beyond the weights."""
    run = Run(WORKLOADS[name], epochs)
    call = run.one_fact() if task == "W2" else lambda: run.batch(form)
    first = seconds(call, run.device) if form in ("ours", "saving") else None
    before = memory_before(run.device)
    again = seconds(call, run.device)
    facts = 1 if task == "W2" else len(run.facts)
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
        "weight_bytes": run.weight_bytes(),
        "epochs": epochs,
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    eager: dict[tuple[str, int], float] = {}
    print(
        f"{'task':<6}{'form':<8}{'epochs':>7}{'seconds':>9}{'a fact':>9}{'speed-up':>10}{'peak MiB':>10}", flush=True
    )
    for task, form, epochs in TASKS:
        if form == "saving" and not torch.cuda.is_available():
            continue  # it saves the memory of a GPU
        with spawn.Pool(1) as pool:
            row = pool.apply(measured, (arguments.model, task, form, epochs))
        if form == "eager":
            eager[task, epochs] = row["seconds"]
        row["speedup"] = eager[task, epochs] / row["seconds"] if (task, epochs) in eager else None
        write_rows(arguments.out / "step.jsonl", [row])
        ratio = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        print(
            f"{task:<6}{form:<8}{epochs:>7}{row['seconds']:>9.2f}{row['seconds_a_fact']:>9.3f}{ratio:>10}"
            f"{row['peak_bytes'] / 2**20:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
