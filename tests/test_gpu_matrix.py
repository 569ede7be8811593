"""The kernels of projected steps on a GPU, bit for bit: updates, int4 projections, sums of squares, int8 weights.

Problems and their answers are made on the CPU; a device gets copies of whole buffers, guards included, and gives them back.
The same tests run on the CPU with the interpreter of Triton, and with the native backend.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from configs import native_cpu
from harness import guarded, guards_untouched
from matrix_harness import assert_close_step, assert_exact_step, dense, make_matrix_problem, pack_int4

from fusedopt.abi import SCALAR_STRIDE, pack_scalar_row
from fusedopt.backends.base import Int4Matrix, RowNumbers
from fusedopt.backends.select import get_backend
from fusedopt.backends.triton import interpreted
from fusedopt.precision import list_precisions
from fusedopt.weights import Int8Weight, row_blocks, update_rows

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INTERPRETED = pytest.mark.skipif(not interpreted(), reason="Triton does not interpret here")
CUDA = pytest.param("cuda", "cuda", marks=pytest.mark.gpu, id="cuda")
TRITON = pytest.param("cuda", "triton", marks=pytest.mark.gpu, id="triton")
SMALL = pytest.param("cpu", "triton", marks=INTERPRETED, id="interpreted")
NATIVE = pytest.param("cpu", "cpu", marks=pytest.mark.skipif(not native_cpu(), reason="not built"), id="cpu")
on_each = pytest.mark.parametrize("device, backend", (CUDA, TRITON, SMALL, NATIVE))
by_triton = pytest.mark.parametrize("device, backend", (TRITON, SMALL))
by_sums = pytest.mark.parametrize("device, backend", (CUDA, TRITON, SMALL))


class OnDevice:
    """A backend whose kernels run on a device, over copies of CPU tensors that are copied back afterwards."""

    def __init__(self, device: str, backend: str):
        self.device, self.backend = device, get_backend(backend)
        self.there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, x):
        """The same view of a copy of the whole buffer behind it: offsets, alignment and sharing are kept."""
        if isinstance(x, Int4Matrix):
            return x._replace(codes=self.send(x.codes), scale=self.send(x.scale), zero=self.send(x.zero))
        if not isinstance(x, torch.Tensor):
            return x
        key = x.untyped_storage().data_ptr()
        if key not in self.there:
            here = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self.there[key] = here, here.to(self.device, copy=True)
        buffer = self.there[key][1]
        return torch.empty(0, dtype=x.dtype, device=self.device).set_(
            buffer.untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )

    def fetch(self) -> None:
        for here, there in self.there.values():
            here.copy_(there)
        self.there.clear()

    def apply_matrix(self, work) -> bool:
        sent = replace(work, **{f.name: self.send(getattr(work, f.name)) for f in fields(work)})
        took = self.backend.apply_matrix(sent)
        self.fetch()
        return took

    def call(self, name: str, *args, **options) -> bool:
        sent = [self.send(x) for x in args]
        took = getattr(self.backend, name)(*sent, **{k: self.send(x) for k, x in options.items()})
        self.fetch()
        return took


@on_each
@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("source", ("product", "sign", "gradient", "scaled"))
def test_every_precision(source, precision, device, backend):
    problem = make_matrix_problem((45, 136), 24, source=source, precision=precision)
    assert_exact_step(problem, OnDevice(device, backend))


@by_triton
@pytest.mark.parametrize("packed", ("left", "right"))
@pytest.mark.parametrize("source", ("product", "sign"))
def test_int4_operands(packed, source, device, backend):
    problem = make_matrix_problem((70, 136), 72, source=source, packed=packed, shared=packed, precision="stochastic")
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
@pytest.mark.parametrize("param, operands", ((F32, F32), (F32, BF16), (F16, F16), (BF16, F32)))
@pytest.mark.parametrize("source", ("product", "scaled"))
def test_types(source, param, operands, device, backend):
    problem = make_matrix_problem((70, 90), 40, source=source, param_dtype=param, operand_dtype=operands,
                                  precision="stochastic" if param == F16 else "nearest")  # fmt: skip
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
@pytest.mark.parametrize("shape, rank", (((1, 7), 65), ((129, 3), 1), ((3, 257), 128), ((130, 136), 65)))
def test_tails(shape, rank, device, backend):
    problem = make_matrix_problem(shape, rank, source="sign", precision="stochastic", seed=2)
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
@pytest.mark.parametrize("source", ("gradient", "scaled"))
def test_misaligned(source, device, backend):
    problem = make_matrix_problem((21, 48), 16, source=source, precision="kahan", offset=3)
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
@pytest.mark.parametrize("source", ("product", "sign", "scaled"))
@pytest.mark.parametrize("found_inf", (1.0, 0.0))
def test_found_inf(source, found_inf, device, backend):
    problem = make_matrix_problem((33, 40), 16, source=source, precision="kahan", found_inf=found_inf)
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
def test_loss_scale_clip_and_sign(device, backend):
    problem = make_matrix_problem((20, 24), 8, source="gradient", maximize=True, grad_scale=8.0, clip=0.25)
    assert_exact_step(problem, OnDevice(device, backend))


@on_each
@pytest.mark.parametrize("operands, rtol", ((F32, 2e-6), (BF16, 2e-6)))
@pytest.mark.parametrize("shape", ((70, 88), pytest.param((1000, 1304), marks=pytest.mark.gpu)), ids=str)
def test_real_numbers(shape, operands, rtol, device, backend):
    """The larger one on a GPU only: several bands of tiles."""
    problem = make_matrix_problem(shape, 136, exact=False, operand_dtype=operands, param_dtype=F32, seed=3)
    assert_close_step(problem, OnDevice(device, backend), rtol)


@by_triton
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_project_packed(side, dtype, device, backend):
    gen, (rows, cols), rank = torch.Generator().manual_seed(0), (131, 72), 19
    grad = guarded(torch.randint(-3, 4, (rows * cols,), generator=gen).to(dtype)).view(rows, cols)
    packed = pack_int4(*((rows, rank) if side == "left" else (rank, cols)), gen)
    size = (rank, cols) if side == "left" else (rows, rank)
    out = guarded(torch.full((size[0] * size[1],), float("nan")))
    on = OnDevice(device, backend)
    assert on.call("project_packed", grad, packed, side, out.view(size))
    exact = dense(packed).T @ grad.double() if side == "left" else grad.double() @ dense(packed).T
    assert torch.equal(out.view(size).double(), exact) and guards_untouched(out)


@by_sums
@pytest.mark.parametrize("shape", ((7, 5), (129, 257), (3, 1000), (700, 33)), ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_sums(shape, dtype, device, backend):
    gen = torch.Generator().manual_seed(0)
    grad, mul = torch.randn(shape, generator=gen).to(dtype), torch.tensor([0.25])
    rows, cols = guarded(torch.full(shape[:1], -1.0)), guarded(torch.full(shape[1:], -1.0))
    on = OnDevice(device, backend)
    assert on.call("row_col_sums", grad, rows, cols, mul)
    squares = (grad.double() * 0.25).square()
    torch.testing.assert_close(rows.double(), squares.sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(cols.double(), squares.sum(0), rtol=2e-6, atol=0)
    assert guards_untouched(rows) and guards_untouched(cols)
    a, b, out = torch.rand(shape[0], generator=gen), torch.rand(shape[1], generator=gen), torch.zeros(1)
    assert on.call("weighted_square_sum", grad, a, b, out)
    want = (a.double()[:, None] * grad.double().square() * b.double()).sum()
    torch.testing.assert_close(out.double()[0], want, rtol=2e-6, atol=0)


@by_triton
@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("shape", ((7, 5), (16, 256), (9, 257)), ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_int8_weights(shape, stochastic, dtype, device, backend):
    """Against the torch operations: codes may tip where a fused multiply-add rounds another way."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers = RowNumbers(0.05, 0.01, 0.0, 1.0, 0x1234567890ABCDEF, 7, ())
    image = bytearray(4 * SCALAR_STRIDE)
    pack_scalar_row(image, 0, (0.05, 0.01, 0.0, 1.0), numbers.seed, 7, ())
    scalars = torch.frombuffer(image, dtype=F32)
    ours, theirs = Int8Weight.from_float(values.to(device)), Int8Weight.from_float(values)
    start = theirs.codes.clone()
    for step in range(3):
        u = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        for weight, where, triton in ((ours, device, True), (theirs, "cpu", False)):
            for first, last in row_blocks(weight):
                update_rows(weight, first, last, u[first:last].to(where), numbers, scalars.to(where), 5, scale=0.5,
                            stochastic=stochastic, triton=triton)  # fmt: skip
        torch.testing.assert_close(ours.scale.cpu(), theirs.scale, rtol=1e-5, atol=0)
        difference = (ours.codes.cpu().int() - theirs.codes.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.03
    assert not torch.equal(start, theirs.codes)
