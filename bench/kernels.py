"""Every operation against PyTorch eager and torch.compile, on a GPU.

    python -m bench.kernels [--seconds 300] [--compile] [--out bench/results]

The forms take turns, each on a cold L2 cache; medians and quantiles of device time. Bytes and FLOPs are those that
no form can do without, and the floor is the larger of their times at the ceilings measured in the same run. A
case is timed only where the kernel's result agrees with float64. Rows are written as they are measured.

Without a GPU it writes what is predicted for an H200 instead, from what the kernels move and multiply.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cir_kernels as ck
from bench.records import ROOT, write_rows
from cir_kernels import reference

TOKENS, WIDTHS, RANKS = (256, 4096, 64, 1280), (4096, 14336), (24, 64, 512)
"""The first matter most: of a step of one fact's peers, and of a batch."""
DATASHEET = {"copy": 4.8e12, "matmul": 9.89e14}
"""NVIDIA's figures for the H200: bytes/s of memory, dense bfloat16 FLOP/s. Predictions alone use them."""
CACHE, LAUNCH = 5.5e12, 2.5e-6
"""Bytes/s of the L2 cache, and seconds that a kernel takes at least; assumptions of the predictions."""
L2 = 50e6
Forms = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        bytes, flops: that no form can do without.
        launches: for each of our kernels the bytes of memory and of the L2 cache it moves and its FLOPs, padding and
            split operands included; from their design, for the prediction.
    """

    op: str
    rows: int
    width: int
    rank: int | None
    bytes: float
    flops: float
    launches: tuple[tuple[float, float, float], ...]

    def predicted(self) -> float:
        """Seconds on an H200, at 90 % of the datasheet's bandwidth and 60 % of its arithmetic."""
        memory, arithmetic = 0.9 * DATASHEET["copy"], 0.6 * DATASHEET["matmul"]
        return sum(
            max(moved / memory, through / CACHE, flops / arithmetic) + LAUNCH
            for moved, through, flops in self.launches
        )


def cases() -> Iterator[Case]:
    for rows, width in itertools.product(TOKENS, WIDTHS):
        x = 2.0 * rows * width  # bytes of bfloat16
        for rank in RANKS:
            yield from _cases_of_rank(rows, width, rank)
        triangle = 4.0 * width * width / 2
        once, flops = x + 2 * triangle, 1.0 * rows * width * width
        yield Case("accumulate_scatter", rows, width, None, once, flops, ((once, once, flops),))
        d_out = 4096 if width == 14336 else 14336
        pair, product = x + 2.0 * rows * d_out, 2.0 * rows * width * d_out
        once = pair + 4.0 * width * d_out
        yield Case("outer_update_", rows, width, None, once, product, ((once, once, product),))


def _cases_of_rank(rows: int, width: int, rank: int) -> Iterator[Case]:
    x, columns = 2.0 * rows * width, rank + min(rank, 64) + 32
    again = x if x > L2 else 0  # a second trip over X is served by the L2 cache where X fits

    def padded(n: int, widest: int) -> int:
        return -(-n // widest) * widest if n > widest else max(16, 2 ** (n - 1).bit_length())

    def splits(block: int, passes: int) -> int:
        return max(1, min(16, 256 // (-(-rows // block) * passes), width // 256))

    unit = 2.0 * rows * width  # FLOPs of a product, for each column
    k, s = padded(rank, 64), padded(columns, 128)
    basis, sums = 4.0 * width * rank, (2 + 16) * width * columns
    block = 32 if rows <= 256 else 64
    passes, bases = -(-rank // 64), basis * rows / block
    parts = 4.0 * rows * rank * splits(block, passes)
    reads = min(512 * block / rows, width / 128) if passes == 1 else width / 64
    launches = (
        (x + basis, passes * x + bases + parts, 2 * k * unit),
        (x + again, 2 * x + bases + parts * reads, 3 * k * unit),
    )
    yield Case("collapse", rows, width, rank, 2 * x + basis, 2 * unit * rank, launches)
    block, passes = 64 if rows <= 2048 else 128, -(-columns // 128)
    parts, omega = 4.0 * rows * columns * splits(block, passes), 2.0 * width * columns
    summed, read_again = 2.0 * rows * columns * width / 64, x * passes
    launches = (
        (x + omega, read_again + omega * rows / block + parts, s * unit),
        (0.0, 2 * parts, 0.0),
        (again + 16 * width * columns, read_again + summed, s * unit),
    )
    yield Case("accumulate_moments", rows, width, rank, x + sums, 2 * unit * columns, launches)


def forms(case: Case) -> tuple[Forms, Callable[[], float]]:
    """The forms to time, each from the same tensors, and the relative error of ours against float64."""
    generator = torch.Generator("cuda").manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    x = rand(case.rows, case.width)
    if case.op in ("collapse", "accumulate_moments"):
        basis = torch.linalg.qr(rand(case.width, case.rank, dtype=torch.float32))[0]
        columns = case.rank + min(case.rank, 64) + 32
        omega = rand(case.width, columns)
        out, state = torch.empty_like(x), ck.new_moments(case.width, omega, "cuda")
        if case.op == "collapse":

            def plain() -> Tensor:
                return x - (x @ basis.to(x.dtype)) @ basis.to(x.dtype).T

            want = reference.collapse(x.double(), basis.double())
            return (
                {"triton": lambda: ck.collapse(x, basis, out=out), "eager": plain, "compile": _compiled(plain)},
                lambda: error(ck.collapse(x, basis, out=out), want) / 2**-8,
            )

        def moments() -> Tensor:
            state.total.add_(x.sum(0))
            return state.action.add_(x.T @ (x @ omega))

        def fresh() -> float:
            own = ck.accumulate_moments(ck.new_moments(case.width, omega, "cuda"), x)
            rows = x.double()
            return error(own.action, rows.T @ (rows @ omega.double())) / 2**-9

        ours: Callable[[], Tensor] = lambda: ck.accumulate_moments(state, x).action  # noqa: E731
        return {"triton": ours, "eager": moments, "compile": _compiled(moments)}, fresh
    if case.op == "accumulate_scatter":
        c = torch.zeros(case.width, case.width, device="cuda")

        def product() -> Tensor:
            return x.T @ x

        def check() -> float:
            got = ck.symmetric(ck.accumulate_scatter(torch.zeros_like(c), x), case.width)
            return error(got, x.double().T @ x.double()) / 2**-18

        ours = lambda: ck.accumulate_scatter(c, x)  # noqa: E731
        return {"triton": ours, "eager": product, "compile": _compiled(product)}, check
    d_out = 4096 if case.width == 14336 else 14336
    g = rand(case.rows, d_out)
    w, scale = rand(d_out, case.width), torch.tensor(1e-4, device="cuda")

    def update() -> Tensor:
        return w.addmm_(g.T, x, alpha=1e-4)

    def fresh_update() -> float:
        want = w.double() + 1e-4 * (g.double().T @ x.double())
        return error(ck.outer_update_(w.clone(), g, x, scale), want) / 2**-8

    ours = lambda: ck.outer_update_(w, g, x, scale)  # noqa: E731
    return {"triton": ours, "eager": update, "compile": _compiled(update)}, fresh_update


def _compiled(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.compile(function, dynamic=False)


def ceilings() -> dict[str, float]:
    """Bytes/s of a device copy, read and written, and FLOP/s of a bfloat16 matrix product, on random data."""
    source = torch.randint(0, 2**31, (2**28,), device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copy = timed({"": lambda: target.copy_(source)}, repeats=10)[""]
    matmul = timed({"": lambda: a @ b}, repeats=10)[""]
    return {
        "copy": 2 * source.nbytes / statistics.median(copy),
        "matmul": 2 * 8192**3 / statistics.median(matmul),
    }


def timed(run: Forms, repeats: int) -> dict[str, list[float]]:
    """Seconds on the device, cold cache, the forms in turn."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    flushes = 16  # about 1.5 ms, in which the host launches what follows
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in run}
    for _ in range(repeats):
        for name, function in run.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flush.zero_()
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def measure(case: Case, at: dict[str, float], compiles: bool) -> list[dict[str, Any]]:
    run, error_in_units = forms(case)
    if not compiles:
        del run["compile"]
    common = {**described(case), "ceiling_copy": at["copy"], "ceiling_matmul": at["matmul"]}
    error = error_in_units()
    if not error < 4:
        return [{**common, "form": "triton", "failed": f"error {error:.2f} times the bound's unit"}]
    for function in run.values():
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    seconds = timed(run, repeats=21)
    floor = max(case.bytes / at["copy"], case.flops / at["matmul"])
    rows = []
    for name, own in seconds.items():
        low, *_, high = statistics.quantiles(own, n=5)
        median = statistics.median(own)
        rows.append(
            {
                **common,
                "form": name,
                "median_us": 1e6 * median,
                "q20_us": 1e6 * low,
                "q80_us": 1e6 * high,
                "floor_us": 1e6 * floor,
                "of_floor": floor / median,
                "of_copy": case.bytes / median / at["copy"],
                "of_matmul": case.flops / median / at["matmul"],
                "speedup": statistics.median(
                    other / mine for other, mine in zip(own, seconds["triton"], strict=True)
                ),
                "error_units": error if name == "triton" else None,
            }
        )
    return rows


def described(case: Case) -> dict[str, Any]:
    return {
        "bench": "kernels",
        "op": case.op,
        "T": case.rows,
        "D": case.width,
        "k": case.rank,
        "dtype": "bfloat16",
        "bytes": case.bytes,
        "flops": case.flops,
    }


def predict(case: Case) -> dict[str, Any]:
    floor = max(case.bytes / DATASHEET["copy"], case.flops / DATASHEET["matmul"])
    own = case.predicted()
    return {
        **described(case),
        "form": "predicted",
        "median_us": 1e6 * own,
        "floor_us": 1e6 * floor,
        "of_floor": floor / own,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the floor that each operation reaches, by T, at D = 4096 and the smallest rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    shown = [r for r in rows if r["form"] in ("triton", "predicted") and r["D"] == 4096 and r["k"] in (24, None)]
    for op in dict.fromkeys(r["op"] for r in shown):
        own = [r for r in shown if r["op"] == op and "of_floor" in r]
        own.sort(key=lambda r: r["T"])
        axes.plot([r["T"] for r in own], [100 * r["of_floor"] for r in own], marker="o", label=op)
    axes.set(xscale="log", xlabel="tokens T", ylabel="% of the floor", title=f"D = 4096, {shown[0]['form']}")
    axes.set_xticks(sorted(TOKENS), [str(t) for t in sorted(TOKENS)])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(
            f"{row['op']:<24}{row['T']:>6}{row['D']:>7}{row['k'] or '-':>5}  NOT TIMED: {row['failed']}", flush=True
        )
        return
    print(
        f"{row['op']:<24}{row['T']:>6}{row['D']:>7}{row['k'] or '-':>5} {row['form']:<10}{row['median_us']:>10.1f} us"
        f"{row['floor_us']:>9.1f} floor{row['of_floor']:>7.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="stop before a case that starts later")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, seconds a case")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    on_gpu, start = torch.cuda.is_available(), time.perf_counter()
    at = ceilings() if on_gpu else {}
    print(", ".join(f"{name} {value:.3g}/s" for name, value in at.items()) or "no GPU: predictions for an H200")
    rows = []
    for case in cases():
        if time.perf_counter() - start > arguments.seconds:
            print("out of time: the cases that are left were not measured")
            break
        own = measure(case, at, arguments.compile) if on_gpu else [predict(case)]
        if on_gpu:
            write_rows(arguments.out / "kernels.jsonl", own)
            torch.compiler.reset()
        for row in own:
            show(row)
        rows += own
    if not on_gpu:
        write_rows(arguments.out / "kernels_predicted.jsonl", rows)
    plot(rows, arguments.out / ("kernels.png" if on_gpu else "kernels_predicted.png"))


if __name__ == "__main__":
    main()
