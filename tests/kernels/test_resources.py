"""Every kernel, compiled ahead of time for GPUs that are not there: what it needs of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cir_kernels._dispatch import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = {
    "_update_kernel",
    "_direct_kernel",
    "_gram_kernel",
    "_scatter_kernel",
    "_project_kernel",
    "_moments_kernel",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One for each kernel, configuration and target, of a process whose kernels are compiled and not interpreted."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    out = tmp_path_factory.mktemp("resources")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.resources", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (out / "resources.jsonl").read_text().splitlines()]


def test_every_kernel_is_there_on_every_target(rows):
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "_subtract_kernel",
        "_moments_kernel",
        "_separate_kernel",
        *PRODUCTS,
    }
    for target in ("sm_80", "sm_90", "sm_100"):
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels


def test_no_register_is_spilled_and_shared_memory_fits(rows):
    spilled = [row for row in rows if row["spill_bytes"]]
    assert not spilled, spilled[:3]
    assert all(row["shared_bytes"] <= row["shared_limit"] for row in rows)
    assert all(row["occupancy"] > 0 for row in rows)


def test_products_run_on_tensor_cores(rows):
    for row in rows:
        products = row["kernel"] in PRODUCTS and not row["types"].startswith("*fp64")
        if products:
            assert row["tensor_cores"], row
    # Full tiles of half-precision products take Hopper's warpgroup instructions.
    for name in ("_update_kernel", "_direct_kernel", "_gram_kernel", "_scatter_kernel"):
        of_half = [
            row
            for row in rows
            if row["kernel"] == name and row["target"] == "sm_90" and "fp64" not in row["types"].split()[0]
        ]
        assert of_half
        assert all(row["tensor_cores"] == ["wgmma.mma_async"] for row in of_half), name
