from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_kernels import (
    accumulate_moments,
    accumulate_scatter,
    collapse,
    new_moments,
    outer_norm_sq,
    outer_update_,
    reference,
    symmetric,
)
from tests import oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Symmetric products of these few rows and columns are formed block by block too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference, "BLOCK", 3)
        yield


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few units of ``dtype`` of the largest intermediate value."""
    error = (got.double() - want.double()).abs().max() if want.numel() else torch.zeros(())
    assert float(error) <= 16 * UNIT[dtype] * float(scale.abs().max() if scale.numel() else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 7), width=st.integers(1, 9), data=st.data())
def test_collapse_is_its_formula(dtype, mixed, rows, width, data):
    rank = data.draw(st.integers(0, width))
    x, basis = rand(rows, width, dtype=dtype), torch.linalg.qr(rand(width, width, seed=1))[0][:, :rank]
    mixer = rand(rank, rank, seed=2) if mixed else None
    want = oracle.collapse(x, basis, mixer)
    close(collapse(x, basis.to(dtype), mixer), want, 1 + want, dtype)


def test_collapse_masks_rows_and_writes_in_place():
    x, basis = rand(5, 4), torch.linalg.qr(rand(4, 2, seed=1))[0]
    mask = torch.tensor([True, False, True, True, False])
    want = collapse(x, basis)
    want[~mask] = 0
    strided = torch.full((5, 8), torch.nan, dtype=torch.float64)[:, ::2]
    assert collapse(x, basis, mask=mask, out=strided) is strided
    torch.testing.assert_close(strided, want)
    assert collapse(x, basis, mask=mask, out=x) is x
    torch.testing.assert_close(x, want)


BUFFER = rand(3, 5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"x": rand(3)}, r"x: expected a matrix.*\(3,\)"),
        ({"basis": rand(5, 2)}, r"basis: expected \(4, k\).*got \(5, 2\)"),
        ({"basis": rand(4, 5)}, r"k <= 4, got \(4, 5\)"),
        ({"mixer": rand(3, 3)}, r"mixer: expected \(2, 2\), got \(3, 3\)"),
        ({"mask": torch.ones(3)}, "expected a bool vector of 3 rows"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "expected a bool vector of 3 rows"),
        ({"out": rand(3, 3)}, r"out: expected \(3, 4\)"),
        ({"out": rand(3, 1).expand(3, 4)}, r"an entry of memory for each element, got strides \(1, 0\)"),
        ({"x": BUFFER[:, :4], "out": BUFFER[:, 1:]}, "memory that overlaps x in part"),
        ({"basis": torch.empty(4, 2, device="meta")}, "one device"),
    ],
)
def test_collapse_refuses(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        collapse(**{"x": rand(3, 4), "basis": rand(4, 2), **arguments})


@pytest.mark.parametrize("x", [torch.ones(3, 4, dtype=torch.long), [[1.0]]])
def test_what_is_no_floating_tensor_is_refused(x):
    with pytest.raises(TypeError, match=r"x: expected a (floating dtype, got torch.int64|tensor, got list)"):
        collapse(x, rand(4, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.integers(0, 6), min_size=1, max_size=4), width=st.integers(1, 8), data=st.data())
def test_moments_do_not_depend_on_how_the_stream_is_cut(dtype, pieces, width, data):
    columns = data.draw(st.integers(1, width))
    omega = data.draw(st.sampled_from([None, rand(width, columns, seed=3).bfloat16()]))
    x = rand(sum(pieces), width, dtype=dtype)
    mask = rand(len(x), seed=4) > 0
    state = new_moments(width, omega)
    for piece, kept in zip(x.split(pieces), mask.split(pieces), strict=True):
        accumulate_moments(state, piece, kept)
    rows = x[mask].double()
    scatter = oracle.outer_sum(rows, rows)
    assert state.count == len(rows)
    # The formula in float64; with a test matrix ordinary rows are multiplied and summed in float32.
    computed = torch.float64 if omega is None or dtype == torch.float64 else torch.float32
    close(state.total, rows.sum(0), rows.abs().sum() + 1, computed)
    got = symmetric(state.action, width) if omega is None else state.action
    close(got, scatter if omega is None else scatter @ omega.double(), rows.square().sum() + 1, computed)


@pytest.mark.parametrize("packed", [False, True])
def test_scatter_is_the_lower_triangle(packed):
    x, width = rand(5, 8), 8
    c = torch.full((width * (width + 1) // 2,), 2.0) if packed else torch.full((width, width), 2.0)
    got = symmetric(accumulate_scatter(c.double(), x), width)
    torch.testing.assert_close(got, 2 + x.T @ x)


def test_moments_keep_small_directions_beside_a_huge_row():
    # METHOD: one token's gradient is 1e4 to 1e5 times the median's. In float32 its square hides the rest.
    x = rand(200, 16, dtype=torch.float32)
    x[:, 8:] *= 1e-2
    x[17] *= 1e5
    truth = x.double().T @ x.double()
    values, vectors = torch.linalg.eigh(truth)
    others = vectors[:, :-1]
    for omega in (None, torch.eye(16)):
        state = accumulate_moments(new_moments(16, omega), x)
        action = symmetric(state.action, 16) if omega is None else state.action
        kept = torch.diag(others.T @ action @ others)
        torch.testing.assert_close(kept, values[:-1], rtol=1e-4, atol=0)
    lost = torch.diag(others.T @ (x.T @ x).double() @ others)
    assert float((lost / values[:-1] - 1).abs().max()) > 0.1


def test_moments_refuse():
    with pytest.raises(ValueError, match=r"omega: expected \(3, k\) with k <= 3, got \(3, 4\)"):
        new_moments(3, rand(3, 4))
    with pytest.raises(ValueError, match=r"omega: expected \(3, k\) with k <= 3, got \(2, 2\)"):
        new_moments(3, rand(2, 2))
    with pytest.raises(ValueError, match="x: expected width 3, got 4"):
        accumulate_moments(new_moments(3, None), rand(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), d_out=st.integers(1, 6), d_in=st.integers(1, 6))
def test_outer_norm_and_update_are_those_of_the_weight_gradient(dtype, rows, d_out, d_in):
    g, a, w = (rand(*s, seed=i, dtype=dtype) for i, s in enumerate([(rows, d_out), (rows, d_in), (d_out, d_in)]))
    gradient = oracle.outer_sum(g, a)
    half = dtype in (torch.bfloat16, torch.float16)  # summed in float32: only the operands are half
    for norm in (
        outer_norm_sq([([g], a)]),
        reference.outer_norm_sq_gram([g], a),
        reference.outer_norm_sq_direct([g], a),
    ):
        bound = g.double().square().sum() * a.double().square().sum()
        close(norm, gradient.square().sum(), bound, torch.float32 if half else dtype)
    want = w.double() - 0.3 * gradient
    pointer = w.data_ptr()
    assert outer_update_(w, g, a, -0.3) is w
    assert w.data_ptr() == pointer
    close(w, want, 1 + want.abs() + gradient.abs(), dtype)


def test_outer_update_rounds_half_precision_once():
    w, g, a = torch.ones(3, 2000, dtype=torch.bfloat16), rand(5, 3), rand(5, 2000, seed=1)
    g, a = g.bfloat16(), a.bfloat16()
    want = (w.float() + 1e-2 * g.float().T @ a.float()).bfloat16()
    outer_update_(w, g, a, 1e-2)
    assert (w != want).float().mean() < 1e-3  # the order of the float32 sum may turn a tie


def test_outer_refuses():
    g, a, w = rand(3, 4), rand(3, 5), rand(4, 5)
    with pytest.raises(ValueError, match="one row count and dtype"):
        outer_norm_sq([([g], a[:2])])
    with pytest.raises(ValueError, match="one row count and dtype"):
        outer_norm_sq([([g, a.float()], a)])
    with pytest.raises(ValueError, match=r"w: expected \(4, 5\), got \(5, 4\)"):
        outer_update_(w.T, g, a, 1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        outer_update_(w, g, a, float("nan"))
    with pytest.raises(ValueError, match="rounding: expected one of nearest, stochastic, compensated, got 'up'"):
        outer_update_(w, g, a, 1.0, rounding="up")
    with pytest.raises(ValueError, match="remainder: expected a tensor with, and only with, 'compensated'"):
        outer_update_(w, g, a, 1.0, rounding="compensated")
    remainder = torch.zeros(4, 5, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"expected bfloat16 weights with 'compensated', got torch\.float64"):
        outer_update_(w, g, a, 1.0, rounding="compensated", remainder=remainder)
