"""What each of two processes does with a model that is sharded over them: started by tests/distributed/test_shards.py
with ``torchrun``, it leaves what came of it in ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import cir
from cir import cli
from cir.data.facts import load_facts
from cir.forgetting.update import fingerprint
from cir.model.checkpoints import whole_state
from cir.model.finding import find_stack
from cir.proof.attacks import attack
from cir.proof.certificate import Evidence, Witness
from tests.tiny import TEXT, VOCABULARY, facts, taught, word_tokenizer

CONFIG = cir.CIRConfig(layers=0.75, budget=99.0, worst_window=99.0, max_steps=3, retain_tokens=1024)
TOLD, KEPT = facts(12)[:4], facts(12)[4:]
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


def biased_llama() -> Any:
    """A Llama that knows facts, with biases, and an odd number of rows to be divided by two."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, **HEADS, intermediate_size=41, initializer_range=0.2, mlp_bias=True, attention_bias=True
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return taught(model, word_tokenizer(), facts(12))


def forgotten(model: Any) -> dict[str, Any]:
    """All that is to be the same however the model is sharded."""
    tokenizer, found = word_tokenizer(), {}
    found["before"] = fingerprint(find_stack(model, sharded=True).targets(3))
    fitted = cir.Subspaces.fit(model, tokenizer, TEXT, KEPT, config=CONFIG, progress=False)
    # A basis is one of many of its subspace: what it takes away of all directions is what is compared.
    found["fitted"] = {name: subspace.collapse_(torch.eye(len(subspace.basis))) for name, subspace in fitted.items()}
    report = cir.unlearn(model, tokenizer, TOLD, contrast=KEPT, retain=TEXT, config=CONFIG, progress=False)
    figures = report.to_dict()
    found["report"] = {name: figures[name] for name in ("before", "after", "epochs", "stopped", "unforgotten")}
    evaluated = cir.evaluate(model, tokenizer, TOLD, neighbours=KEPT, text=TEXT, max_tokens=512, generate=2)
    found["evaluation"] = {name: measure.value for name, measure in evaluated.measures.items()}
    return found


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    state = whole_state(model)
    return {name: p.detach().clone() for name, p in (model.state_dict() if state is None else state).items()}


def sharded(folder: Path, way: str) -> Any:
    if way == "tp":
        return cir.load_model(folder / "model", shard="tp")[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for number, layer in enumerate(model.model.layers):
        fully_shard(layer, reshard_after_forward=number != 2)
    return fully_shard(model)


def outside(model: Any) -> list[Any]:
    """What a run must leave as it was."""
    states = [(m.training, m.__dict__.get("forward"), m._forward_hooks.keys()) for m in model.modules()]
    return [*states, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]]


def stopped(folder: Path, how: str) -> tuple[str, float]:
    """The second process alone is to stop after a step: how the run ended, and the recall it left."""
    model, rank = sharded(folder, "fsdp"), dist.get_rank()

    def on_step(event: cir.StepEvent) -> bool:
        if rank == 1 and event.step == 2 and how == "signal":
            signal.raise_signal(signal.SIGINT)
        return rank == 1 and event.step == 2 and how == "callback"

    report = cir.unlearn(
        model, word_tokenizer(), TOLD, contrast=(), retain=TEXT, config=CONFIG, progress=False, on_step=on_step
    )
    return report.stopped, report.after.mean_recall or 0.0


def refusals(folder: Path) -> dict[str, str]:
    """What is said of models, or asked of them, where that is not supported."""
    model, tokenizer, said = sharded(folder, "fsdp"), word_tokenizer(), {}
    asked = {
        "the editor": lambda: cir.Editor(model, tokenizer, cir.Subspaces({}, "ridge"), text=TEXT),
        "the paper's way": lambda: cir.unlearn(model, tokenizer, TOLD, config=cir.CIRConfig.preset("paper")),
        "attacks": lambda: attack(model, tokenizer, TOLD),
        "relearning": lambda: cir.relearn(model, tokenizer, TOLD, KEPT),
        "certificates": lambda: Witness(model, tokenizer, Evidence(load_facts(TOLD), load_facts(KEPT), TEXT, [])),
        "profile": lambda: cir.profile(model, tokenizer, TOLD),
        "locate": lambda: cir.locate(model, tokenizer, TOLD),
        "benchmark": lambda: cir.benchmark("tofu-forget10", model, tokenizer),
    }
    by_two = AutoModelForCausalLM.from_pretrained(folder / "model")
    fully_shard(by_two, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    unplanned = AutoModelForCausalLM.from_pretrained(folder / "model")
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(unplanned.model.layers[3].mlp, mesh, {"up_proj": ColwiseParallel()})
    experts = AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, **HEADS, intermediate_size=40, num_local_experts=4)
    )
    for name, other in (("two dimensions", by_two), ("no plan", unplanned), ("experts", fully_shard(experts))):
        asked[name] = lambda other=other: cir.unlearn(other, tokenizer, TOLD, retain=TEXT, progress=False)
    for name, call in asked.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def words(folder: Path, out: str) -> list[str]:
    """A command that forgets."""
    given = {"model": "model", "facts": "facts.jsonl", "contrast": "stay.jsonl", "retain": "text.txt", "out": out}
    named = [word for option, name in given.items() for word in (f"--{option}", str(folder / name))]
    return ["unlearn", *named, "--max-steps=2", "--budget=99", "--worst-window=99", "--layers=0.5"]


def typed(folder: Path) -> dict[str, Any]:
    """The exit statuses of the command, once and once more, and what this process says."""
    said, complained, statuses = io.StringIO(), io.StringIO(), []
    with redirect_stdout(said), redirect_stderr(complained):
        statuses += [cli.main(words(folder, "two")), cli.main([*words(folder, "three"), "--certify"])]
    return {"statuses": statuses, "said": said.getvalue(), "complained": complained.getvalue()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"typed": typed(folder)}
    for way in ("fsdp", "tp"):
        model = sharded(folder, way)
        before = outside(model)
        found[way] = forgotten(model)
        found[way]["as it was"] = outside(model) == before
        found[way]["weights"] = weights_of(model)
    found["callback"], found["signal"] = stopped(folder, "callback"), stopped(folder, "signal")
    found["refusals"] = refusals(folder)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
