"""Every kernel, compiled ahead of time for GPUs that are not there: what it needs of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.resources import overtaken
from cir_kernels._dispatch import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = {
    "_update_kernel",
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
    if version("triton").startswith("3.6."):  # which allots them, and whose the rows in bench/results are
        assert not spilled, spilled[:3]
    assert all(row["shared_bytes"] <= row["shared_limit"] for row in rows)
    assert all(row["occupancy"] > 0 for row in rows)


def test_no_copy_overtakes_a_product(rows):
    assert any(row["target"] == "sm_90" and "wgmma.mma_async" in row["tensor_cores"] for row in rows)
    assert not [row for row in rows if row["overtaken"]]


def test_a_buffer_short_of_a_slot_is_seen():
    short = """
      %b_x_46 = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
      %b_o_47 = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
      %b_x_144 = ttg.memdesc_index %b_x_46[%i] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b_o_150 = ttg.memdesc_index %b_o_47[%j] : !ttg.memdesc<3x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      %151 = ttng.warp_group_dot %b_x_144, %b_o_150, %acc {inputPrecision = 0 : i32, isAsync = true} : ...
      %152:3 = ttng.warp_group_dot_wait %151, %b_x_144, %b_o_150 {pendings = 1 : i32} : ...
    """
    assert overtaken(short) == ["%b_x_46"]
    assert overtaken(short.replace("<2x64x64", "<3x64x64")) == []
    assert overtaken(short.replace("pendings = 1", "pendings = 0")) == []


def test_products_run_on_tensor_cores(rows):
    for row in rows:
        products = row["kernel"] in PRODUCTS and not row["types"].startswith("*fp64")
        if products:
            assert row["tensor_cores"], row
    # Full tiles of half-precision products take Hopper's warpgroup instructions.
    for name in ("_update_kernel", "_scatter_kernel"):
        of_half = [
            row
            for row in rows
            if row["kernel"] == name and row["target"] == "sm_90" and "fp64" not in row["types"].split()[0]
        ]
        assert of_half
        assert all(row["tensor_cores"] == ["wgmma.mma_async"] for row in of_half), name
