"""What every kernel needs of sm_80, sm_90 and sm_100: registers, spills, shared memory, occupancy. Needs no GPU.

    python -m bench.resources [--out bench/results]

The operations are called at the shapes of Llama-3.1-8B and SmolLM2-135M with launches recorded instead of made,
so that what is compiled is what would run; ptxas and cuobjdump come with triton.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import cir_kernels as ck
from bench.records import ROOT, write_rows

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a block may have, and about what a multiprocessor has."""
REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.bool: "i1",
}
TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernel launches are appended to the list instead of made."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, arguments, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches() -> list[Launch]:
    """Those of every operation over the shapes and dtypes that matter."""
    ops = torch.ops.cir_kernels
    with recorded() as found:
        for dtype, rows, width in itertools.product(
            (torch.bfloat16, torch.float16, torch.float32), (64, 1280, 4096), (4096, 14336)
        ):
            x = torch.empty(rows, width, dtype=dtype)
            for rank, mask in ((24, None), (36, None), (64, None), (512, None), (24, x[:, 0] > 0)):
                if dtype != torch.bfloat16 and rank in (36, 64):
                    continue  # the same kernels as at 24
                state = ck.new_moments(width, torch.empty(width, rank + min(rank, 64) + 32))
                ops.collapse(x, torch.empty(width, rank), None, mask, x, "triton")
                ops.accumulate_moments(x, state.omega, mask, state.count, state.total, state.action, "triton")
            for sum_type, mean in itertools.product((torch.float32, torch.float64), (None, torch.empty(width))):
                # Packed as moments have it, the others full.
                packed = sum_type == torch.float64 and mean is None
                c = torch.empty(1, dtype=sum_type).expand((width * (width + 1) // 2,) if packed else (width, width))
                ops.accumulate_scatter(c, x, mean, None, "triton")
            g = torch.empty(rows, 1536, dtype=dtype)
            w = torch.empty(1536, width, dtype=dtype)
            for rounding in ck.ROUNDINGS:
                remainder = torch.empty(w.shape, dtype=torch.int16) if rounding == "compensated" else None
                if remainder is None or dtype == torch.bfloat16:
                    ops.outer_update(w, g, x, state.count.float(), rounding, 0, remainder, False, "triton")
            ops.outer_update(w, g, x, state.count.float(), "stochastic", 0, None, True, "triton")
    return found


def source(launch: Launch) -> tuple[ASTSource, dict[str, int]]:
    """What triton would compile for a launch, specialised on ones and on multiples of 16 as it does."""
    kernel, arguments, options = launch
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    compiling = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    values.update(options)
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), compiling


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory (spills), of the one kernel in ``cubin``."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", printed).group(1)) for key in ("REG", "STACK", "LOCAL")}


def overtaken(ttgir: str) -> list[str]:
    """Shared buffers that a copy may overwrite while an asynchronous product still reads them.

    A product that is still pending when the next copies are issued needs a slot more than the copies are ahead.
    Triton gives every operand of a loop as many slots as the loop has stages, but for one that is used elsewhere too.
    """
    if not any(int(pending) for pending in re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ttgir)):
        return []
    slots = {m[1]: int(m[2]) for m in re.finditer(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)}
    source = re.compile(r"(%\w+) = ttg\.memdesc_(?:index|trans|subslice|reshape|reinterpret) (%\w+)")
    origin = {m[1]: m[2] for m in source.finditer(ttgir)}
    read = set()
    for m in re.finditer(r"warp_group_dot (%\w+), (%\w+),.*isAsync = true", ttgir):
        for operand in m.groups():
            while operand in origin:
                operand = origin[operand]
            read.add(operand)
    most = max((slots[name] for name in read if name in slots), default=0)
    return sorted(name for name in read if slots.get(name, most) < most)


def occupancy(target: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's threads that blocks of this size fill."""
    threads = 32 * warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_LIMIT[target] // shared if shared else BLOCKS
    return min(by_registers, by_shared, THREADS // threads, BLOCKS) * threads / THREADS


def measure(found: list[Launch]) -> list[dict[str, Any]]:
    """A row for each distinct kernel and target; compiled in as many processes as there are cores."""
    distinct = {}
    for launch in found:
        compiled_from, options = source(launch)
        for target in TARGETS:
            key = f"{launch[0].__name__} {compiled_from.hash()} {options} {target}"
            distinct.setdefault(key, (launch, compiled_from, options, target))
    # Threads would take turns: the compiler holds the interpreter's lock. Forked, nothing needs to be pickled.
    _TO_COMPILE[:] = distinct.values()
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(_measure_one, range(len(_TO_COMPILE)), chunksize=1)


_TO_COMPILE: list[tuple[Launch, ASTSource, dict[str, int], int]] = []


def _measure_one(place: int) -> dict[str, Any]:
    launch, compiled_from, options, target = _TO_COMPILE[place]
    compiled = triton.compile(compiled_from, target=GPUTarget("cuda", target, 32), options=options)
    used = resources(compiled.asm["cubin"])
    return {
        "bench": "resources",
        "kernel": launch[0].__name__,
        "target": f"sm_{target}",
        "types": " ".join(t for t in compiled_from.signature.values() if t.startswith("*")),
        "constants": {name: value for name, value in launch[2].items() if name.isupper()},
        **options,
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[target],
        "occupancy": occupancy(target, used["REG"], compiled.metadata.shared, options["num_warps"]),
        "overtaken": overtaken(compiled.asm["ttgir"]),
        "tensor_cores": sorted(set(TENSOR_CORES.findall(compiled.asm["ptx"]))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    rows = measure(launches())
    print(
        f"{'kernel':<18}{'target':<8}{'regs':>5}{'spill':>6}{'shared':>8}{'occ.':>6}  tensor cores; types; constants"
    )
    for r in rows:
        constants = " ".join(f"{name}={value}" for name, value in r["constants"].items())
        print(
            f"{r['kernel']:<18}{r['target']:<8}{r['registers']:>5}{r['spill_bytes']:>6}{r['shared_bytes']:>8}"
            f"{r['occupancy']:>6.0%}  {', '.join(r['tensor_cores']) or '-'}; {r['types']}; {constants}"
        )
    write_rows(arguments.out / "resources.jsonl", rows)


if __name__ == "__main__":
    main()
