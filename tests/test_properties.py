"""Properties over random models: layouts, sizes at block and chunk edges, groupings, threads, non-finite gradients."""

import pytest
import torch
from configs import BACKENDS, BY_NAME, CONFIGS, assert_same_bits, backend_argument, each_backend, each_config, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

import fusedopt
from fusedopt.abi import chunk_size, chunk_table
from fusedopt.formats import get_format, list_formats
from fusedopt.memory import empty_like, flat, is_dense, overlaps, strides_match

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(max_examples=80, deadline=None)


@hs.composite
def strided(draw, dtype=torch.float32):
    """A view of a larger buffer: permuted, with steps and an offset; sometimes dense, sometimes with gaps."""
    shape = draw(hs.lists(hs.integers(0, 6), min_size=0, max_size=4))
    steps = [draw(hs.integers(1, 2)) for _ in shape]
    order = draw(hs.permutations(range(len(shape))))
    offset = draw(hs.integers(0, 5))
    strides, reach = [0] * len(shape), 1
    for d in order:
        strides[d] = reach * steps[d]
        reach = strides[d] * max(1, shape[d])
    buffer = torch.randn(reach + offset + 8, generator=torch.Generator().manual_seed(draw(hs.integers(0, 99)))).to(
        dtype
    )
    return buffer.as_strided(shape, strides, offset)


@given(t=strided())
@many
def test_layout_predicates_by_enumeration(t):
    """is_dense and overlaps against the set of addresses that indices reach."""
    places = (
        torch.arange(t.untyped_storage().nbytes() // 4)
        .as_strided(t.shape, t.stride(), t.storage_offset())
        .reshape(-1)
        .tolist()
    )
    assert overlaps(t) == (len(set(places)) < len(places))
    consecutive = not places or sorted(places) == list(range(min(places), min(places) + len(places)))
    assert is_dense(t) == consecutive
    like = empty_like(t, torch.uint8)
    assert is_dense(like) and like.shape == t.shape and (not is_dense(t) or strides_match(like, t))
    if is_dense(t):
        assert flat(t).tolist() == [t.as_strided((), (), i).item() for i in sorted(places)]


@given(base=hs.lists(hs.integers(1, 3), min_size=1, max_size=3), data=hs.data())
@many
def test_overlaps_finds_every_shared_place(base, data):
    """Any strides at all: never a missed overlap, and none reported for views made by slicing."""
    strides = [data.draw(hs.integers(0, 7)) for _ in base]
    t = torch.zeros(64).as_strided(base, strides)
    places = torch.arange(64).as_strided(base, strides).reshape(-1).tolist()
    if len(set(places)) < len(places):
        assert overlaps(t)


@pytest.mark.parametrize("backend", BACKENDS)
@each_config([BY_NAME[n] for n in ("sgd_nesterov", "adamw_amsgrad", "lion")])
@given(
    views=hs.lists(strided(), min_size=1, max_size=4),
    gradient=hs.integers(0, 3),
    form=hs.sampled_from(["fp32", "bf16"]),
)
@few
def test_random_layouts_equal_contiguous_copies(config, backend, views, gradient, form):
    params = [torch.nn.Parameter(v) for v in views]
    plain = [torch.nn.Parameter(v.clone(memory_format=torch.contiguous_format)) for v in views]
    guards = [p.untyped_storage() for p in params]
    before = [torch.tensor(g.tolist(), dtype=torch.uint8) for g in guards]
    one = config.make(params, backend=backend, state_format=form)
    two = config.make(plain, backend=backend, state_format=form)
    for step in range(2):
        gen = torch.Generator().manual_seed(step)
        for p, q in zip(params, plain, strict=True):
            values = torch.randn(p.shape, generator=gen)
            q.grad, turned = values.clone(), tuple(reversed(range(values.dim())))
            p.grad = {
                0: values,
                1: torch.empty_like(p).copy_(values),
                2: torch.stack([values, values], -1)[..., 1],
                3: values.permute(turned).contiguous().permute(turned),
            }[gradient]
        one.step()
        two.step()
    for p, q, guard, old in zip(params, plain, guards, before, strict=True):
        assert torch.equal(p, q)
        outside = torch.ones(guard.nbytes() // 4, dtype=torch.bool)
        outside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
        after = torch.tensor(guard.tolist(), dtype=torch.uint8)
        assert torch.equal(after.view(-1, 4)[outside], old.view(-1, 4)[outside])


EDGES = hs.sampled_from([0, 1, 7, 8, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097])


@pytest.mark.parametrize("backend", BACKENDS)
@each_config()
@given(
    numels=hs.lists(EDGES, min_size=1, max_size=5),
    form=hs.sampled_from(["fp32", "bf16", "int8"]),
    split=hs.integers(0, 5),
)
@few
def test_grouping_does_not_change_any_bit(config, backend, numels, form, split):
    """One group, two groups, or one optimizer per tensor: the same parameters and states."""

    def build():
        gen = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(n, generator=gen)) for n in numels]

    options = {"backend": backend, "state_format": form, "min_quantized_numel": 1, "clip_grad_norm": None}
    results = []
    for grouping in ("one", "two", "alone"):
        params = build()
        if grouping == "one":
            opts = [config.make(params, **options)]
        elif grouping == "two":
            opts = [config.make([{"params": params[:split]}, {"params": params[split:]}], **options)]
        else:
            opts = [config.make([p], **options) for p in params]
        for step in range(2):
            gen = torch.Generator().manual_seed(10 + step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen)
            for o in opts:
                o.step()
        merged = {k: v for o in opts for k, v in o.state.items()}
        results.append([p.detach() for p in params] + [v for p in params for _, v in sorted(merged[p].items())])
    assert_same_bits(results[1], results[0], "two groups:")
    assert_same_bits(results[2], results[0], "one optimizer each:")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not installed")
@each_config()
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_thread_count_does_not_change_any_bit(config, form):
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gen = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n, generator=gen).bfloat16()) for n in (70001, 300, 33333)]
            opt = config.make(params, state_format=form, param_precision="stochastic", clip_grad_norm=1.0)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=gen).bfloat16()
                opt.step()
            results.append(tensors(opt, params))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0], "2 threads:")
    assert_same_bits(results[2], results[0], "3 threads:")


@each_backend
@each_config(
    [c for c in CONFIGS if c.name not in ("lars", "lars_plain", "lamb", "adamw_cautious")]
)  # they sum over a tensor
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", list_formats())
def test_nonfinite_gradients_spoil_their_element_only(config, bad, form, backend):
    """As in fp32 arithmetic. Its block's scale may change with its state; nothing else in the model does, in any bit."""
    good, hit = (torch.nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(2))
    one, two = (config.make([p], backend=backend, state_format=form) for p in (good, hit))
    for step in range(2):
        gen = torch.Generator().manual_seed(step)
        good.grad = torch.randn(5000, generator=gen)
        hit.grad = good.grad.clone()
        if step == 0:
            hit.grad[300] = bad
        one.step()
        two.step()
    block = get_format(form).block or 1
    untouched = torch.ones(5000, dtype=torch.bool)
    untouched[300 // block * block : (300 // block + 1) * block] = False
    assert torch.equal(hit[untouched], good[untouched])
    assert torch.isfinite(hit[torch.arange(5000) != 300]).all()
    coded = [v for k, v in two.state[hit].items() if k.endswith("_scale")]
    assert all(torch.isfinite(v).all() for v in coded)
    if config.optimizer == "lion":  # moves by the sign: of infinity in fp32 arithmetic too
        assert (hit - good).abs().max() <= 4 * config.options["lr"]
    else:
        assert not torch.isfinite(hit[300])


@given(numels=hs.lists(hs.integers(0, 60000), max_size=8), units=hs.integers(1, 300))
@many
def test_chunks_cover_every_element_once(numels, units):
    size = chunk_size(sum(numels), units)
    assert size % 2048 == 0 and 2048 <= size <= 16384
    covered = [0] * len(numels)
    for entry in chunk_table(numels, size).tolist():
        row, index = entry >> 32, entry & 0xFFFFFFFF
        assert index * size == covered[row] < numels[row]
        covered[row] += min(size, numels[row] - index * size)
    assert covered == numels


@given(scale=hs.floats(1e-6, 1e6), clip=hs.floats(1e-4, 1e4))
@few
def test_clipped_steps_do_not_depend_on_the_size_of_large_gradients(scale, clip):
    """Beyond the threshold plain SGD moves by lr * clip whatever the gradient's size."""
    p = torch.nn.Parameter(torch.zeros(3000, dtype=torch.float64))
    opt = fusedopt.SGD([p], lr=0.5, clip_grad_norm=clip, backend=backend_argument(BACKENDS[-1]))
    p.grad = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    norm = float(p.grad.norm())
    opt.step()
    assert float(p.detach().norm()) == pytest.approx(0.5 * norm * min(1.0, clip / (norm + 1e-6)), rel=1e-9)
