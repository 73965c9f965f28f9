"""Where a figure came from, and where it goes: one JSON object a line, appended."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cir.forgetting.report import library_versions

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Commit, machine and versions. ``dirty`` says that the tree had uncommitted changes to tracked files.

    Where there is no git, COMMIT of the environment says which commit it is.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        **library_versions(),
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append ``rows``, each with the environment, to the JSON-lines file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = environment()
    with path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps({**row, **common}) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``path``, none where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def mark_memory() -> int:
    """Start looking for the peak of this process (Linux: VmHWM); its resident bytes now."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would else serve what is measured unseen
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def process_memory(field: str) -> int:
    """Bytes of this process, ``VmRSS`` now or ``VmHWM`` at most since :func:`mark_memory`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
