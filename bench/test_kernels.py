"""The cases of ``bench.kernels`` under pytest-benchmark: ``pytest bench/test_kernels.py`` on a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.kernels import Case, cases, forms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def name(case: Case) -> str:
    return f"{case.op}-T{case.rows}-D{case.width}-k{case.rank}"


@pytest.mark.parametrize("form", ["triton", "eager", "compile"])
@pytest.mark.parametrize("case", list(cases()), ids=name)
def test_kernel(benchmark, case, form):
    run, error_in_units = forms(case)
    assert error_in_units() < 4
    benchmark.group = name(case)

    def step() -> None:
        run[form]()
        torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
