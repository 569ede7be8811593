"""The passes over M-FAC's window of gradients: torch's, the CPU's kernels for every instruction set, and Triton's, interpreted and
compiled for every target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import guarded, guards_untouched
from trainer_data import one_thread  # noqa: F401

from fusedopt import quantize
from fusedopt.backends.cpu import CpuBackend, native
from fusedopt.formats import get_format
from fusedopt.transforms import history

try:
    import triton

    from fusedopt.backends.triton import interpreted
except ImportError:
    triton = None

    def interpreted() -> bool:
        return False


FORMS = ("fp32", "bf16", "int8", "int8c", "fp8", "int4")


def window_of(form: str, window: int, numel: int) -> history.Rows:
    """Gradients of different sizes, each stored between guards."""
    form, gen = get_format(form), torch.Generator().manual_seed(numel)
    width = numel + -numel % history.PIECE if form.block else numel
    stored = guarded(torch.zeros(window * form.stored_count(width), dtype=form.storage)).view(window, -1)
    scale = torch.zeros(window, form.scale_count(width)) if form.block else None
    rows = history.Rows(stored, scale, form, numel)
    for i in range(window):
        g = torch.randn(numel, generator=gen) * 10.0 ** (i % 3 - 1) * 0.1 ** torch.arange(numel).remainder(4)
        rows.put(torch.tensor([i]), g, None)
    return rows


def exact(rows: history.Rows) -> torch.Tensor:
    return torch.cat([chunk for _, chunk in rows.chunks()], 1)


@pytest.mark.skipif(not CpuBackend().has_history(), reason="the native module is not built, or an earlier one")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window, numel", [(1, 1), (3, 2047), (5, 2304), (33, 9000)])
def test_native_kernels(form, window, numel, monkeypatch):
    """Exact values, sums in fp64; the same bits for every instruction set and number of threads."""
    rows = window_of(form, window, numel)
    y = torch.randn(window, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, place = exact(rows), window // 2
    found = []
    for isa in dict(native.isa()):
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            backend = CpuBackend(isa)
            monkeypatch.setattr(quantize, "_backend", lambda x, backend=backend: backend)
            out = torch.full((numel,), float("nan"))
            rows.combine(y, out)
            found.append((rows.products(torch.tensor([place])), out))
    for products, mixed in found[1:]:
        assert torch.equal(products, found[0][0]) and torch.equal(mixed, found[0][1])
    products, mixed = found[0]
    assert ((products - values @ values[place]).abs() <= 1e-13 * (values.abs() @ values[place].abs())).all()
    want = values.T @ y
    assert ((mixed - want).abs() <= 6e-8 * want.abs() + 1e-13 * (values.abs().T @ y.abs())).all()
    assert guards_untouched(rows.stored.view(-1))


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")
@pytest.mark.parametrize(
    "form, window, numel",
    [(form, *size) for form in FORMS for size in ((3, 2047), (4, 2304))]
    + [("fp32", 1, 1), ("int4", 2, 1), ("int8", 67, 2100), ("bf16", 33, 300)],
)
def test_interpreted_kernels(form, window, numel):
    """Decoders differ by some ulps of fp32; sums are fp64."""
    rows = window_of(form, window, numel)
    y = torch.randn(window, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = exact(rows)
    for place in {0, window - 1}:
        got = rows.launched_products(torch.tensor([place]))
        bound = values.abs() @ values[place].abs()
        assert ((got - values @ values[place]).abs() <= (1e-13 if form in ("fp32", "bf16") else 2e-6) * bound).all()
    mixed = rows.launched_combination(y)
    assert mixed.shape == (numel,) and mixed.dtype == torch.float64
    bound = values.abs().T @ y.abs()
    assert ((mixed - values.T @ y).abs() <= (1e-13 if form in ("fp32", "bf16") else 2e-6) * bound).all()
    assert guards_untouched(rows.stored.view(-1))


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported")
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_steps_with_the_kernels_are_those_of_torch(form, monkeypatch):
    from configs import parameters, set_grads

    import fusedopt

    runs = []
    for launched in (False, True):
        monkeypatch.setattr(history.Rows, "launches", lambda self, launched=launched: launched)
        params = parameters((70, 65), (33,))
        opt = fusedopt.MFAC(params, lr=0.1, window=4, damping=1e-3, history_format=form)
        for step in range(5):
            set_grads(params, step)
            opt.step()
        runs.append([p.detach() for p in params])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.gates_triton import TARGETS, cuda_resources, hip_resources
from fusedopt.formats import get_format
from fusedopt.kernels.history import combine_kernel, products_kernel
for target in TARGETS:
    hip = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    for kernel in (products_kernel, combine_kernel):
        for name in ("bf16", "int8") if target == "sm_90" else ("int8",):
            form = get_format(name)
            pointer = {"fp32": "*fp32", "bf16": "*bf16"}.get(name, "*u8")
            signature = {n: "i32" for n in kernel.arg_names} | {
                "rows": pointer, "scales": "*fp32" if form.block else pointer, "place": "*i64", "y": "*fp64", "part": "*fp64",
                "FORMAT": "constexpr", "ALIGNED": "constexpr", "DEPTH": "constexpr"}
            signature = {n: signature[n] for n in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
                       if n in ("rows", "scales", "place", "y", "part", "row_size")}
            source = ASTSource(kernel, signature, {"FORMAT": form.code(True), "ALIGNED": True, "DEPTH": 64}, aligned)
            made = triton.compile(source, target=machine, options={"num_warps": 4 if hip else 8})
            use = hip_resources(made) if hip else cuda_resources(made)
            print(json.dumps({"target": target, "kernel": kernel.fn.__name__, "form": name, **use}))
"""


@pytest.mark.skipif(
    triton is None or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="sources are described in another way there",
)
def test_kernels_compile_without_spills_and_with_wide_loads():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({(r["target"], r["kernel"], r["form"]) for r in rows}) == len(rows) == 2 * (2 + 3)
    for row in rows:
        assert row["spills"] == 0, row
        wide = {"fp32": 128, "bf16": 128}.get(
            row["form"], 32 if row["form"] == "int4" else 64
        )  # 8 elements of a thread
        assert sum(n for bits, n in row["loads"].items() if int(bits) >= wide) > 0, row
        assert row["registers"] <= 128, row
