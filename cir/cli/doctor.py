"""What would run here, and whether it is right: what to send with a report of a fault."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from cir.cli.output import DONE, FAILED, Outcome
from cir.forgetting.report import library_versions
from cir_kernels._dispatch import CLOSE, HAS_TRITON, LEAST_CAPABILITY, TRIALS, disagreement


def run(arguments: argparse.Namespace) -> Outcome:
    """Print it; 1 where a kernel that would be used is not right."""
    versions = {"python": platform.python_version(), **library_versions()}
    for name, version in versions.items():
        print(f"{name:<14}{version}")
    devices = [_looked_at(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    failed = [f"{about['name']}: {name}" for about in devices for name, said in about["kernels"].items() if said]
    if not devices:
        print(f"{'device':<14}cpu, {torch.get_num_threads()} threads: every operation runs in its PyTorch form")
    elif failed:
        print(f"\n{len(failed)} kernels are not right: PyTorch is used for them")
    else:
        print("\nall kernels are right")
    found = {"versions": versions, "threads": torch.get_num_threads(), "devices": devices, "wrong": failed}
    return FAILED if failed else DONE, found


def _looked_at(device: torch.device) -> dict[str, Any]:
    """Print what is said of each kernel: None of one that is right."""
    about = torch.cuda.get_device_properties(device)
    print(f"{device!s:<14}{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    kernels: dict[str, str | None] = {}
    if not HAS_TRITON or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        print(f"{'':<14}every operation runs in its PyTorch form: kernels need triton and compute capability 8.0")
    else:
        for operation in TRIALS:
            for dtype in CLOSE:
                name = f"{operation}, {str(dtype).removeprefix('torch.')}"
                kernels[name] = disagreement(operation, device, dtype)
                print(f"  {name:<32}{kernels[name] or 'right'}")
    return {"name": str(device), "gpu": about.name, "bytes": about.total_memory, "kernels": kernels}
