"""int8 weights that train: the codes against the quantiser's equations, the module against a float one, memory, checkpoints."""

import copy
import gc
import io
import pickle

import pytest
import torch
from oracles.qgalore import affine_dequantize, affine_quantize
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt.precision import philox16
from fusedopt.weights import (
    Int8Weight,
    dequantize_groups,
    dequantize_rows,
    quantize_groups,
    quantize_weights_,
    row_blocks,
    store_rows,
)

SHAPES = [(64, 256), (7, 5), (100, 300), (3, 512), (64, 12), (1, 1), (256, 7), (513, 257)]


def values(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(rows=48, columns=300, dtype=torch.float32, bias=True, seed=0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(columns, rows, bias=bias, dtype=dtype)


def quantized(*args, **kwargs) -> torch.nn.Linear:
    return quantize_weights_(linear(*args, **kwargs))


# The quantiser


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_match_the_equations_exactly(n, stochastic):
    """Values on a grid that fp32 divides exactly (scale 2^-3 in whole groups), so that fp32 and fp64 see the same ties."""
    gen = torch.Generator().manual_seed(n)
    x = torch.randint(-100 * 64, 155 * 64, (n,), generator=gen).float() / 64
    for first in range(0, n, 256):
        x[first] = -100.0
        x[min(first + 1, n - 1)] = 155.0
    x /= 8
    random16 = philox16(1, 2, 3, n) if stochastic else None
    uniform = random16.double() / 65536 if stochastic else None
    codes, scale, zero = quantize_groups(x, 256, random16)
    expected, expected_scale, expected_zero = affine_quantize(x, 8, 256, uniform, with_zero=True)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0)
    assert torch.equal(zero.long(), expected_zero)
    whole = n // 256 * 256  # the last group's scale is no power of two
    assert torch.equal(codes[:whole].long(), expected[:whole])
    assert (codes.long() - expected).abs().max() <= 1
    back = dequantize_groups(codes, scale, zero)
    torch.testing.assert_close(
        back.double(), affine_dequantize(codes.long(), expected_scale, zero.long()), rtol=1e-6, atol=0
    )


def test_groups_with_both_signs_are_the_published_quantiser():
    x = values(4096)
    codes, scale, zero = quantize_groups(x, 256)
    expected, expected_scale, expected_zero = affine_quantize(x, 8, 256)
    assert torch.equal(zero.long(), expected_zero)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0)
    assert (codes.long() != expected).float().mean() < 1e-3


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_groups_of_one_sign_keep_their_values(shift):
    x = values(512).clamp(-1, 1) + shift
    back = dequantize_groups(*quantize_groups(x))
    assert (back - x).abs().max() <= 6.0 / 255


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_group_only(bad):
    x = values(768)
    x[300] = bad
    back = dequantize_groups(*quantize_groups(x, 256, philox16(0, 0, 0, 768)))
    assert back[256:512].isnan().all() and not back[:256].isnan().any() and not back[512:].isnan().any()


def test_zeros_and_equal_values():
    assert dequantize_groups(*quantize_groups(torch.zeros(300))).abs().max() == 0
    x = torch.full((256,), 0.3)
    torch.testing.assert_close(dequantize_groups(*quantize_groups(x)), x, rtol=1e-6, atol=0)


def test_what_is_decoded_is_encoded_to_the_same_values():
    weight = Int8Weight.from_float(values((64, 300)))
    once = weight.dequantize()
    store_rows(weight, 0, 64, once)
    torch.testing.assert_close(weight.dequantize(), once, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_unbiased():
    """The mean of many requantisations of values between the group's extremes is within 5 standard errors of them; to nearest
    it is not."""
    n, draws = 256, 4096
    x = values(n) * 0.7
    x[0], x[1] = -2.55, 2.55 * 4
    drawn = dequantize_groups(*quantize_groups(x.repeat(draws), 256, philox16(5, 0, 9, n * draws)))
    mean = drawn.double().view(draws, n).mean(0)
    scale = float(quantize_groups(x)[1])
    inner = slice(2, None)
    error = (mean - x)[inner]
    fraction = (x.double() / scale)[inner] % 1
    standard = scale * (fraction * (1 - fraction) / draws).sqrt() + scale * 2.0**-16
    assert (error.abs() <= 5 * standard).all()
    nearest = dequantize_groups(*quantize_groups(x)) - x
    assert (nearest[inner].abs() > 5 * standard).float().mean() > 0.5


def test_stochastic_rounding_at_its_threshold():
    """Up where fraction * 65536 exceeds the random bits: at equality down, so that whole numbers stay."""
    x = torch.arange(-100, 156).float()
    x[10:200] += torch.arange(190).float() / 190 * 0.99
    fraction = ((x - x.floor()) * 65536).long()
    whole = (x - x.floor()) * 65536 == fraction
    down, up = (
        quantize_groups(x, 256, fraction + (~whole).long())[0],
        quantize_groups(x, 256, (fraction - 1).clamp(min=0))[0],
    )
    assert torch.equal(down.float(), x.floor() + 100)
    assert torch.equal(up.float(), x.floor() + 100 + (x != x.floor()))


# Rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [256, 64, 8])
@pytest.mark.parametrize("elements", [1, 1000, None])
def test_row_blocks_cover_every_group_once(shape, group, elements):
    weight = Int8Weight.from_float(values(shape), group)
    blocks = list(row_blocks(weight, elements))
    assert blocks[0][0] == 0 and blocks[-1][1] == shape[0]
    assert all(a[1] == b[0] for a, b in zip(blocks, blocks[1:], strict=False))
    assert all(first * shape[1] % group == 0 for first, _ in blocks)
    whole = weight.dequantize()
    for first, last in blocks:
        assert torch.equal(dequantize_rows(weight, first, last), whole[first:last])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_of_blocks_changes_nothing(shape):
    """Random bits belong to elements: blocks of any size store the same codes."""
    start, columns, stored = values(shape), shape[1], []
    for elements in (1, 2000, None):
        weight = Int8Weight.from_float(start)
        for first, last in row_blocks(weight, elements):
            block = dequantize_rows(weight, first, last)
            block -= 0.01 * values(shape, 1)[first:last]
            random16 = philox16(7, 3, 2, block.numel(), first=first * columns)
            store_rows(weight, first, last, block, random16)
        stored.append(weight)
    for other in stored[1:]:
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(stored[0], name), getattr(other, name)), name
    expected = (Int8Weight.from_float(start).dequantize() - 0.01 * values(shape, 1)).view(-1)
    codes = quantize_groups(expected, 256, philox16(7, 3, 2, expected.numel()))[0]
    assert torch.equal(codes.view(shape), stored[0].codes)


def test_random_bits_from_the_middle():
    whole = philox16(3, 4, 5, 96)
    assert torch.equal(philox16(3, 4, 5, 40, first=48), whole[48:88])
    assert torch.equal(philox16(3, 4, 5, 40, stream=2, first=16), philox16(3, 4, 5, 96, stream=2)[16:56])


def test_rows_between_groups_are_refused():
    weight = Int8Weight.from_float(values((64, 300)))
    for first, last in ((1, 64), (0, 1), (0, 65), (64, 0)):
        with pytest.raises(ValueError, match="row_blocks"):
            dequantize_rows(weight, first, last)
        with pytest.raises(ValueError, match="row_blocks"):
            store_rows(weight, first, last, torch.zeros(1))
    with pytest.raises(ValueError, match="take 19200 values"):
        store_rows(weight, 0, 64, torch.zeros(3))


def test_skipped_rows_stay():
    weight = Int8Weight.from_float(values((8, 256)))
    before = weight.clone()
    store_rows(weight, 0, 8, values((8, 256), 1), skip=torch.ones(1))
    assert torch.equal(weight.codes, before.codes) and torch.equal(weight.scale, before.scale)
    store_rows(weight, 0, 8, values((8, 256), 1), skip=torch.zeros(1))
    assert torch.equal(weight.codes, Int8Weight.from_float(values((8, 256), 1)).codes)


# The module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()], ids=str)
def test_forward_and_backward_are_those_of_the_decoded_weight(dtype, bias, batch):
    mine = quantized(dtype=dtype, bias=bias)
    other = linear(dtype=dtype, bias=bias)
    other.weight.data.copy_(mine.weight.dequantize())
    x = values((*batch, 300), 1).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    a, b = mine(x), other(y)
    assert torch.equal(a, b) and a.dtype == dtype
    direction = values(a.shape, 2).to(dtype)
    a.backward(direction)
    b.backward(direction)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(x.grad, y.grad, **bound)
    torch.testing.assert_close(mine.weight.grad, other.weight.grad, **bound)
    assert type(mine.weight.grad) is torch.Tensor and mine.weight.grad.dtype == dtype
    if bias:
        torch.testing.assert_close(mine.bias.grad, other.bias.grad, **bound)


def test_decoded_values_are_rounded_once():
    weight = Int8Weight.from_float(values((100, 300)))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


def test_autocast():
    mine, x = quantized(), values((5, 300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mine(x)
    assert y.dtype == torch.bfloat16
    expected = functional.linear(x.bfloat16(), mine.weight.dequantize(torch.bfloat16), mine.bias.bfloat16())
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert mine.weight.grad.dtype == torch.float32


def test_gradients_accumulate_and_frozen_weights_have_none():
    mine, x = quantized(), values((5, 300))
    mine(x).sum().backward()
    once = mine.weight.grad.clone()
    mine(x).sum().backward()
    torch.testing.assert_close(mine.weight.grad, 2 * once)
    frozen = linear()
    frozen.weight.requires_grad_(False)
    quantize_weights_(frozen)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert not frozen.weight.requires_grad and frozen.weight.grad is None and x.grad is not None


def test_a_step_between_forward_and_backward_is_noticed():
    mine = quantized(8, 256)
    loss = mine(values((5, 256)).requires_grad_()).sum()
    store_rows(mine.weight, 0, 8, values((8, 256)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_attention_and_reading():
    attention = quantize_weights_(torch.nn.MultiheadAttention(32, 4))
    x = values((3, 2, 32))
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.weight.grad.abs().max() > 0
    weight = quantized().weight
    assert torch.equal(weight.norm(), weight.dequantize().norm())
    assert torch.equal(weight + 1, weight.dequantize() + 1)
    assert type(torch.zeros_like(weight)) is torch.Tensor and torch.zeros_like(weight).dtype == weight.dtype


def test_filter_and_what_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 10))
    quantize_weights_(model, filter=lambda name, module: name != "2")
    assert isinstance(model[0].weight, Int8Weight) and isinstance(model[0].weight, torch.nn.Parameter)
    assert not any(isinstance(p, Int8Weight) for p in (model[0].bias, model[1].weight, model[2].weight))
    kept = model[0].weight
    quantize_weights_(model)
    assert model[0].weight is kept and isinstance(model[2].weight, Int8Weight)
    with pytest.raises(TypeError, match="writes to an int8 weight"):
        torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]["params"][0].data.add_(1)
    with pytest.raises(TypeError, match="writes to an int8 weight"):
        torch.add(torch.zeros(20, 300), 1, out=model[0].weight.data)
    with pytest.raises(ValueError, match="multiple of 8"):
        quantize_weights_(linear(), group=100)
    with pytest.raises(TypeError, match="meta"):
        quantize_weights_(torch.nn.Linear(3, 3, device="meta"))


def test_tied_weights():
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(20, 30), "head": torch.nn.Linear(30, 20, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match=r"'head' is also embed\.weight"):
        quantize_weights_(tied)
    assert tied["head"].weight is tied["embed"].weight and not isinstance(tied["head"].weight, Int8Weight)
    twins = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    twins[1].weight = twins[0].weight
    quantize_weights_(twins)
    assert twins[0].weight is twins[1].weight and isinstance(twins[0].weight, Int8Weight)


# Memory


class Largest(TorchDispatchMode):
    """The most elements of any floating-point tensor an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else [out]:
            if type(t) is torch.Tensor and (t.dtype.is_floating_point or t.dtype == torch.int64):
                self.elements = max(self.elements, t.numel())
        return out


def test_a_step_holds_no_float_copy():
    weight = Int8Weight.from_float(values((512, 512)))
    with Largest() as seen:
        for first, last in row_blocks(weight, 4096):
            block = dequantize_rows(weight, first, last)
            store_rows(weight, first, last, block, philox16(0, 1, 2, block.numel(), first=first * 512))
    assert 0 < seen.elements <= 4096
    with Largest() as seen:
        weight.dequantize()
    assert seen.elements >= 512 * 512, "the watch sees what is made"


def test_no_float_copy_is_alive_between_steps():
    """Neither in the graph between forward and backward, nor anywhere Python can reach after it."""
    rows, columns = 211, 257
    mine = quantized(rows, columns)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = mine(values((4, columns))).sum()
    assert any(isinstance(t, Int8Weight) for t in saved)
    assert not any(type(t) is torch.Tensor and t.numel() >= rows * columns for t in saved)
    loss.backward()
    mine.weight.grad = None
    gc.collect()
    alive = [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.dtype.is_floating_point
        and t.untyped_storage().nbytes() >= 2 * rows * columns
        and tuple(t.shape) in ((rows, columns), (columns, rows), (rows * columns,))
    ]
    assert not alive
    stored = sum(t.nbytes for t in (mine.weight.codes, mine.weight.scale, mine.weight.zero))
    assert stored < 1.03 * rows * columns


# Checkpoints and copies


def same(a: Int8Weight, b: Int8Weight) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("codes", "scale", "zero")]
    return isinstance(a, Int8Weight) and isinstance(b, Int8Weight) and a.dtype == b.dtype and a.group == b.group and all(
        torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in pairs
    )  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    mine, other = quantized(dtype=torch.bfloat16), quantized(dtype=torch.bfloat16, seed=1)
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    assert file.tell() < 1.5 * 48 * 300, "codes are saved, not values"
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert not other.load_state_dict(loaded, assign=assign).missing_keys
    assert same(other.weight, mine.weight) and other.weight.requires_grad
    assert isinstance(other.weight, torch.nn.Parameter)
    x = values((3, 300)).bfloat16()
    assert torch.equal(mine(x), other(x))


def test_state_dicts_of_float_models():
    mine, other = quantized(), linear(seed=1)
    expected = Int8Weight.from_float(other.weight)
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine.weight.codes, expected.codes) and torch.equal(mine.weight.scale, expected.scale)
    fresh = linear(seed=2)
    fresh.load_state_dict(mine.state_dict())
    assert torch.equal(fresh.weight, mine.weight.dequantize()) and type(fresh.weight) is torch.nn.Parameter
    coarse = quantize_weights_(linear(seed=3), group=64)
    coarse.load_state_dict(mine.state_dict())
    assert coarse.weight.group == 64
    torch.testing.assert_close(coarse.weight.dequantize(), mine.weight.dequantize(), rtol=0, atol=2e-3)


def test_copies():
    mine = quantized()
    mine(values((3, 300))).sum().backward()
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert same(other.weight, mine.weight) and other.weight.requires_grad and other.weight.is_leaf
        assert isinstance(other.weight, torch.nn.Parameter) and len(list(other.parameters())) == 2
    other = copy.deepcopy(mine)
    assert torch.equal(other.weight.grad, mine.weight.grad) and other.weight.grad is not mine.weight.grad
    twice = copy.deepcopy([mine.weight, mine.weight])
    assert twice[0] is twice[1]


def test_changing_the_dtype_keeps_the_codes():
    mine = quantized()
    codes, parameter = mine.weight.codes.clone(), mine.weight
    mine.to(torch.bfloat16)
    assert mine.weight.dtype == torch.bfloat16 and torch.equal(mine.weight.codes, codes)
    assert mine.weight is parameter and mine.weight.requires_grad
    assert mine(values((2, 300)).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(mine.weight.to(torch.int32), mine.weight.dequantize().to(torch.int32))


# Training


def test_training_through_the_primitives_lowers_the_loss():
    """SGD on a model whose matrices exist as codes only, updates far below one code: stochastic rounding carries them, and it
    ends where float training ends; rounding to nearest stays where it began."""

    def train(stochastic, quantize, lr=6e-3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64, bias=False), torch.nn.Tanh(), torch.nn.Linear(64, 8, bias=False)
        )
        if quantize:
            quantize_weights_(model)
        x, teacher = values((256, 64), 5), values((8, 64), 6) / 8
        target = (x @ teacher.t()).tanh()
        losses = []
        for step in range(120):
            loss = functional.mse_loss(model(x), target) * 8
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
            for i, p in enumerate(model.parameters()):
                if not quantize:
                    p.data -= lr * p.grad
                    continue
                for first, last in row_blocks(p):
                    block = dequantize_rows(p, first, last)
                    block -= lr * p.grad[first:last]
                    bits = philox16(0, step, i, block.numel(), first=first * p.shape[1]) if stochastic else None
                    store_rows(p, first, last, block, bits)
        return losses

    exact, stochastic, nearest = train(False, False), train(True, True), train(False, True)
    gain = exact[0] - exact[-1]
    assert gain > 0.3 * exact[0]
    assert abs(stochastic[-1] - exact[-1]) < 0.15 * gain
    assert nearest[-1] > exact[-1] + 0.4 * gain
