"""What would run here, and whether it is right: what to send with a report of a fault."""

from __future__ import annotations

import platform

import torch

from cir.forgetting.report import library_versions
from cir_kernels._dispatch import CLOSE, HAS_TRITON, LEAST_CAPABILITY, TRIALS, disagreement


def run() -> int:
    """Print it; 1 where a kernel that would be used is not right."""
    for name, version in {"python": platform.python_version(), **library_versions()}.items():
        print(f"{name:<14}{version}")
    devices = range(torch.cuda.device_count())
    if not devices:
        print(f"{'device':<14}cpu, {torch.get_num_threads()} threads: every operation runs in its PyTorch form")
        return 0
    failed = [of for number in devices for of in _wrong_on(torch.device("cuda", number))]
    print(f"\n{len(failed)} kernels are not right: PyTorch is used for them" if failed else "\nall kernels are right")
    return 1 if failed else 0


def _wrong_on(device: torch.device) -> list[str]:
    """Print what is said of each kernel; those that are not right."""
    about = torch.cuda.get_device_properties(device)
    print(f"{device!s:<14}{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if not HAS_TRITON or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        print(f"{'':<14}every operation runs in its PyTorch form: kernels need triton and compute capability 8.0")
        return []
    wrong = []
    for operation in TRIALS:
        for dtype in CLOSE:
            reason = disagreement(operation, device, dtype)
            name = f"{operation}, {str(dtype).removeprefix('torch.')}"
            print(f"  {name:<32}{reason or 'right'}")
            wrong += [name] if reason else []
    return wrong
