"""The Triton kernels against float64, in the interpreter or, where there is one, on a GPU.

Each error is bounded by a small multiple of what the PyTorch form makes in the same dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import cir_kernels as ck
from cir_kernels import _dispatch, _trials, reference
from cir_kernels.rounding import dither, join, random_bits, split
from tests import oracle

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(
    not (_dispatch.HAS_TRITON and (ON_GPU or _dispatch.INTERPRETING)),
    reason="needs triton, and a GPU or its interpreter",
)
SHAPES = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """``x`` in other strides, between NaN that must not be read."""
    if how == "rows":
        wide = x.new_full((len(x), 2 * x.shape[1] + 1), torch.nan)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    if how == "columns":
        return x.T.clone(memory_format=torch.contiguous_format).T
    return x.clone()


def no_worse(got: torch.Tensor, torch_form: torch.Tensor, want: torch.Tensor, units: int = 4) -> None:
    """The error of ``got`` is at most 3 times that of PyTorch's form, beside a few units of the largest entry."""
    assert not torch.isnan(got).any()
    error, allowed = (got.double() - want).norm(), 3 * (torch_form.double() - want).norm()
    unit = torch.finfo(got.dtype).eps if got.dtype != torch.float64 else 2.0**-22
    assert float(error) <= float(allowed + units * unit * want.norm() / max(1, want.numel()) ** 0.5)


def orthonormal(width: int, rank: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(rand(width, width, seed=seed))[0][:, :rank].float()


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 150),
    how=st.sampled_from(["plain", "rows", "columns"]),
    mixed=st.booleans(),
    masked=st.booleans(),
    in_place=st.booleans(),
    data=st.data(),
)
def test_collapse(dtype, rows, width, how, mixed, masked, in_place, data):
    rank = data.draw(st.integers(0, min(width, 90)))
    basis = orthonormal(width, rank)
    mixer = rand(rank, rank, seed=2).float() if mixed else None
    mask = rand(rows, seed=3) > 0 if masked else None
    x = strided(rand(rows, width, dtype=dtype), how)
    want = reference.collapse(x.double(), basis.double(), None if mixer is None else mixer.double(), mask)
    torch_form = ck.collapse(x, basis, mixer, mask, backend="torch")
    out = x if in_place else strided(torch.full_like(x, torch.nan), how)
    got = ck.collapse(x, basis, mixer, mask, out, backend="triton")
    assert got is out
    no_worse(got, torch_form, want)
    if mask is not None:
        assert not got[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
@given(
    pieces=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    width=st.integers(2, 100),
    how=st.sampled_from(["plain", "rows", "columns"]),
    masked=st.booleans(),
    data=st.data(),
)
def test_moments(dtype, pieces, width, how, masked, data):
    omega = rand(width, data.draw(st.integers(1, width)), seed=3).bfloat16()
    x = rand(sum(pieces), width, dtype=dtype)
    mask = rand(len(x), seed=4) > 0 if masked else torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    state = ck.new_moments(width, omega, DEVICE)
    for piece, kept in zip(x.split(pieces), mask.split(pieces), strict=True):
        ck.accumulate_moments(state, strided(piece, how), kept if masked else None, backend="triton")
    kept_rows = x[mask].double()
    assert int(state.count) == len(kept_rows)
    sums = float(kept_rows.abs().sum()) + 1
    torch.testing.assert_close(state.total, kept_rows.sum(0), atol=sums * 2.0**-22, rtol=0)  # float32, as in PyTorch
    want = kept_rows.T @ (kept_rows @ omega.double())
    plain = x[mask].T @ (x[mask] @ omega.to(dtype))
    no_worse(state.action, plain, want, units=64)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: the interpreter has no pipelines to race in")
@pytest.mark.parametrize("rows", [64, 256, 1280, 4096])
@pytest.mark.parametrize("columns", [80, 608])
def test_moments_of_whole_layers(rows, columns):
    # At these sizes an H100 gave sums that were 4 % off, where two buffers served three products.
    x, omega = rand(rows, 4096).bfloat16(), rand(4096, columns, seed=1).bfloat16()
    state = ck.accumulate_moments(ck.new_moments(4096, omega, DEVICE), x, backend="triton")
    want = x.double().T @ (x.double() @ omega.double())
    assert float((state.action - want).norm() / want.norm()) < 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_keep_small_directions_beside_huge_rows(dtype):
    # As tests/test_kernels.py: two rows are 1e5 times the others, whose variance must be held all the same.
    x = rand(150, 40)
    x[:, 20:] *= 1e-2
    x[17] *= 1e5
    x[90] *= -3e4
    x = x.to(dtype)
    omega = rand(40, 30, seed=2).bfloat16()
    state = ck.accumulate_moments(ck.new_moments(40, omega, DEVICE), x, backend="triton")
    rows = x.double()
    small = torch.linalg.eigh(rows.T @ rows)[1][:, :-2]  # what the two rows do not span

    def held(action):  # share of those directions' variance in the columns of the action, and the action's error
        basis = torch.linalg.qr(small @ (small.T @ action))[0][:, :20]
        want = small.T @ (rows.T @ (rows @ omega.double()))
        error = float((small.T @ action - want).norm() / want.norm())
        return float((rows @ basis).square().sum() / (rows @ small).square().sum()), error

    exact, _ = held(rows.T @ (rows @ omega.double()))
    variance, error = held(state.action)
    assert abs(variance / exact - 1) < 1e-5
    assert error < (2**-9 if dtype == torch.bfloat16 else 1e-5)
    # What float32 throughout would do.
    variance, error = held((rows.float().T @ (rows.float() @ omega.float())).double())
    assert error > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@settings(SHAPES, max_examples=6)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 150),
    packed=st.booleans(),
    centred=st.booleans(),
    masked=st.booleans(),
)
def test_scatter(dtype, sum_dtype, rows, width, packed, centred, masked):
    x, mean = rand(rows, width, dtype=dtype), rand(width, seed=1).float() if centred else None
    mask = rand(rows, seed=3) > 0 if masked else None
    shape = (width * (width + 1) // 2,) if packed else (width, width)
    c = torch.zeros(shape, dtype=sum_dtype, device=DEVICE)
    if not packed:
        c += torch.full_like(c, torch.nan).triu(1)  # neither read nor written
    for piece, kept in zip(x.split(40), (mask if masked else x[:, 0] < torch.inf).split(40), strict=True):
        ck.accumulate_scatter(c, piece, mean, kept if masked else None, backend="triton")
    kept = (x if mask is None else x[mask]).double() - (0 if mean is None else mean.double())
    want = kept.T @ kept
    got = ck.symmetric(c, width)
    assert not torch.isnan(got).any()
    in_float32 = (kept.float().T @ kept.float()).double()
    no_worse(got, in_float32 if sum_dtype == torch.float32 else want, want, units=16)


def test_scatter_in_float64_keeps_small_directions_beside_a_huge_row():
    x = rand(100, 16, dtype=torch.float32)
    x[3] *= 1e5
    c = torch.zeros(16, 16, dtype=torch.float64, device=DEVICE)
    ck.accumulate_scatter(c, x, backend="triton")
    values = torch.linalg.eigvalsh(x.double().T @ x.double())
    torch.testing.assert_close(torch.linalg.eigvalsh(ck.symmetric(c, 16))[:-1], values[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
@given(sizes=st.lists(st.tuples(st.integers(0, 130), st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3))
def test_outer_norm(dtype, sizes):
    groups = []
    for i, (rows, d_in, d_out) in enumerate(sizes):
        grads = [strided(rand(rows, d_out, seed=10 * i + j, dtype=dtype), "rows") for j in range(1 + i % 2)]
        groups.append((grads, strided(rand(rows, d_in, seed=10 * i + 5, dtype=dtype), "columns")))
    want = sum(float((g.double().T @ a.double()).square().sum()) for grads, a in groups for g in grads)
    got = float(ck.outer_norm_sq(groups))
    scale = sum(float(g.double().square().sum() * a.double().square().sum()) for grads, a in groups for g in grads)
    assert got == pytest.approx(want, rel=1e-4 if ON_GPU else 1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ck.ROUNDINGS)
@settings(SHAPES, max_examples=8)
@given(
    rows=st.integers(0, 70),
    d_out=st.integers(1, 150),
    d_in=st.integers(1, 150),
    how=st.sampled_from(["plain", "rows", "columns"]),
    sign=st.booleans(),
)
def test_outer_update(dtype, rounding, rows, d_out, d_in, how, sign):
    if rounding == "compensated" and dtype != torch.bfloat16:
        return
    g, a = rand(rows, d_out, dtype=dtype), strided(rand(rows, d_in, seed=1, dtype=dtype), how)
    w = strided(rand(d_out, d_in, seed=2, dtype=dtype), how)
    scale, product = torch.tensor(-1e-2, device=DEVICE), g.double().T @ a.double()
    sign = sign and float(product.abs().min()) > 1e-4  # nearer to zero, rounding decides
    results = []
    for backend in ("triton", "torch"):
        own = strided(w, how)
        remainder = torch.zeros(w.shape, dtype=torch.int16, device=DEVICE) if rounding == "compensated" else None
        more = {"rounding": rounding, "seed": 5, "remainder": remainder, "sign": sign}
        ck.outer_update_(own, g, a, scale, **more, backend=backend)
        results.append(own if remainder is None else join(own.contiguous(), remainder))
    want = w.double() + scale.double() * (product.sign() if sign else product)
    no_worse(results[0], results[1], want)
    if dtype != torch.float32 and rounding == "stochastic":  # the same noise, whatever the launch
        assert float((results[0] != results[1]).float().mean()) < 0.01


def test_stochastic_rounding_is_unbiased_and_compensated_loses_nothing():
    w = torch.linspace(0.5, 2.0, 4000, device=DEVICE)[None, :].float()
    places = torch.arange(4000, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        total = torch.zeros_like(w)
        for seed in range(200):
            rounded = dither(w, random_bits(places[:1], places, seed), dtype).to(dtype)
            assert float((rounded.float() - w).abs().max()) <= 2 * torch.finfo(dtype).eps
            total += rounded.float()
        # 200 draws of variance at most ulp^2 / 4, averaged over 4000 places.
        assert abs(float((total / 200 - w).mean())) < 5 * torch.finfo(dtype).eps / 2 / (200 * 4000) ** 0.5
    # An update a thousandth of a unit in the last place: nearest drops all of it, compensated none.
    g, a = torch.ones(1, 8, device=DEVICE).bfloat16(), torch.ones(1, 40, device=DEVICE).bfloat16()
    weights = {name: torch.ones(8, 40, device=DEVICE).bfloat16() for name in ("nearest", "compensated")}
    remainder = torch.zeros(8, 40, dtype=torch.int16, device=DEVICE)
    for _ in range(2000):
        reference.outer_update_(weights["nearest"], g, a, torch.tensor(2.0**-17, device=DEVICE))
        reference.outer_update_(
            weights["compensated"], g, a, torch.tensor(2.0**-17, device=DEVICE), "compensated", 0, remainder
        )
    assert torch.equal(weights["nearest"], torch.ones_like(weights["nearest"]))
    assert torch.equal(
        join(weights["compensated"], remainder), torch.full((8, 40), 1 + 2000 * 2.0**-17, device=DEVICE)
    )


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120))
def test_a_weight_and_its_remainder_are_the_float32_they_stand_for(value):
    w = torch.tensor([value], dtype=torch.float32)
    high, low = split(w)
    assert torch.equal(join(high, low).view(torch.int32), w.view(torch.int32))
    assert abs(float(high) - value) <= abs(value) * 2.0**-8 + 2.0**-133


def test_results_do_not_change_from_run_to_run():
    x, omega = rand(130, 90, dtype=torch.bfloat16), rand(90, 40, seed=1).float()
    runs = []
    for _ in range(2):
        state = ck.accumulate_moments(ck.new_moments(90, omega, DEVICE), x, backend="triton")
        runs.append((state.action, ck.outer_norm_sq([([x], x)])))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_compiles_into_one_graph():
    basis = orthonormal(8, 3)

    def step(x, w, g):
        state = ck.new_moments(8, basis, DEVICE)
        ck.accumulate_moments(state, x)
        a = ck.collapse(x, basis)
        return ck.outer_update_(w, g, a, ck.outer_norm_sq([([g], a)]).float()), state.action

    x, w, g = rand(5, 8).float(), rand(6, 8, seed=1).float(), rand(5, 6, seed=2).float()
    want = step(x.clone(), w.clone(), g)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x.clone(), w.clone(), g)
    torch.testing.assert_close(got, want)


def test_backend_is_chosen_by_argument_then_environment_then_device(monkeypatch):
    x, basis = rand(4, 6).float(), orthonormal(6, 2)
    assert _dispatch.resolve(None, x, "collapse") == ("triton" if ON_GPU else "torch")
    monkeypatch.setenv(_dispatch.BACKEND, "triton")
    assert _dispatch.resolve(None, x, "collapse") == "triton"
    assert _dispatch.resolve("torch", x, "collapse") == "torch"
    with pytest.raises(ValueError, match="expected 'torch' or 'triton', got 'cuda'"):
        ck.collapse(x, basis, backend="cuda")
    with pytest.raises(RuntimeError, match="not float64"):
        ck.collapse(x.double(), basis, backend="triton")


@pytest.mark.parametrize("operation", _dispatch.TRIALS)
def test_a_kernel_that_is_right_stands_its_trial_and_one_that_is_not_does_not(operation, monkeypatch):
    dtypes = DTYPES if ON_GPU else [torch.bfloat16]
    if not ON_GPU:  # the interpreter takes its time
        monkeypatch.setattr(_trials, "ROWS", 32)
        monkeypatch.setattr(_trials, "WIDTH", 128)
    _dispatch.disagreement.cache_clear()
    for dtype in dtypes:
        assert _dispatch.disagreement(operation, torch.device(DEVICE), dtype) is None
    right = _dispatch.TRIALS[operation]
    monkeypatch.setitem(_dispatch.TRIALS, operation, lambda *on: (right(*on)[1].double() * 1.05, right(*on)[1]))
    _dispatch.disagreement.cache_clear()
    reason = _dispatch.disagreement(operation, torch.device(DEVICE), torch.bfloat16)
    assert "its result is 0.05 of its length from PyTorch's" in reason
    monkeypatch.setitem(_dispatch.TRIALS, operation, lambda *on: 1 / 0)
    _dispatch.disagreement.cache_clear()
    assert _dispatch.disagreement(operation, torch.device(DEVICE), torch.bfloat16).startswith("ZeroDivisionError")
    _dispatch.disagreement.cache_clear()


def test_where_a_kernel_is_not_right_pytorch_is_used_and_a_warning_says_so_once(monkeypatch, caplog):
    class OnGPU:
        is_cuda, device, dtype = True, torch.device("cuda"), torch.float32

    monkeypatch.setattr(_dispatch, "_obstacle", lambda x: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(_dispatch.TRIALS, "collapse", lambda *on: (torch.ones(2), torch.ones(2) * 2))
    _dispatch.disagreement.cache_clear()
    assert [_dispatch.resolve(None, OnGPU(), "collapse") for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "its kernel is not right on a GPU: its result is 0.5 of its length" in caplog.text
    assert _dispatch.resolve("triton", OnGPU(), "collapse") == "triton"  # asked for
    _dispatch.disagreement.cache_clear()


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    code = "import torch, cir_kernels as c; c.collapse(torch.ones(2, 3), torch.ones(3, 1), backend='triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "expected one that can run here, got 'triton', but x is on cpu" in done.stderr


def test_finite_bases_are_checked_on_request(monkeypatch):
    x, basis = rand(4, 6).float(), orthonormal(6, 2)
    basis[1, 1] = torch.inf
    ck.collapse(x, basis)
    monkeypatch.setenv("CIR_KERNELS_CHECK_FINITE", "1")
    with pytest.raises(ValueError, match="basis: expected finite entries"):
        ck.collapse(x, basis)


def test_sums_of_a_tile_are_those_of_plain_loops():
    x, basis = rand(5, 7).float(), orthonormal(7, 3)
    want = oracle.collapse(x.cpu(), basis.cpu(), None)
    torch.testing.assert_close(ck.collapse(x, basis, backend="triton").cpu().double(), want, atol=1e-5, rtol=0)


def test_without_triton_everything_runs_in_pytorch():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, cir_kernels as c\n"
        "x = torch.ones(2, 3); c.collapse(x, torch.eye(3)[:, :1], out=x)\n"
        "assert x.tolist() == [[0, 1, 1]] * 2\n"
        "c.collapse(x, torch.ones(3, 1), backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "got 'triton', but triton is not installed" in done.stderr
