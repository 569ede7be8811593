"""Memory layouts: dense ones are stepped in place, gradients are re-strided, neighbours and aliases are respected."""

import pytest
import torch
from configs import BY_NAME, CONFIGS, assert_same_bits, each_backend, each_config, parameters, tensors

import fusedopt
from fusedopt import memory, states

VALUES = torch.randn(6, 10, 4, 8, generator=torch.Generator().manual_seed(0))

# name -> a function that lays out a contiguous tensor's values in another way
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.stack([t, t + 5], -1)[..., 0],
    "sliced rows": lambda t: torch.cat([t - 3, t, t + 3], 1)[:, 10:20],
    "misaligned": lambda t: torch.cat([torch.zeros(1, dtype=t.dtype), t.reshape(-1)])[1:].view(t.shape),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def run(config, backend, layout="contiguous", grad_layout=None, dtype=torch.float32, steps=3, **options):
    """A parameter in a layout after some steps, with its optimizer and the storage around it."""
    p = torch.nn.Parameter(LAYOUTS[layout](VALUES.to(dtype)))
    opt = config.make([p], backend=backend, **options)
    around = torch.as_strided(p.detach(), (p.untyped_storage().nbytes() // p.element_size(),), (1,), 0)
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        g = torch.randn(VALUES.shape, generator=gen).to(dtype)
        p.grad = torch.empty_like(p).copy_(g) if grad_layout is None else LAYOUTS[grad_layout](g)
        opt.step()
    return p, opt, around


@each_backend
@each_config()
@each_layout
@pytest.mark.parametrize("grad_layout", [None, "contiguous", "channels_last", "sliced"])
def test_layout_does_not_change_values(config, layout, grad_layout, backend):
    """Norms (LARS, LAMB) are summed in memory order; every other rule agrees in every bit."""
    want, expected_opt, _ = run(config, backend)
    got, opt, _ = run(config, backend, layout, grad_layout)
    if config.optimizer in ("lars", "lamb"):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)
        return
    assert torch.equal(got, want)
    for key, value in expected_opt.state[want].items():
        assert torch.equal(opt.state[got][key], value), key


@each_backend
@each_config()
@each_layout
def test_storage_stays_and_aliases_see_the_step(config, layout, backend):
    p = torch.nn.Parameter(LAYOUTS[layout](VALUES))
    alias, pointer, strides = p.detach()[1:], p.data_ptr(), p.stride()
    opt = config.make([p], backend=backend)
    before = p.detach().clone()
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert p.data_ptr() == pointer and p.stride() == strides
    assert torch.equal(alias, p.detach()[1:]) and (p != before).all()


@each_backend
@each_config()
@pytest.mark.parametrize("layout", ["sliced", "sliced rows", "misaligned"])
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_neighbouring_memory_is_untouched(config, layout, form, backend):
    _, _, before = run(config, backend, layout, steps=0)
    before = before.clone()
    p, _, after = run(config, backend, layout, state_format=form, min_quantized_numel=1)
    inside = torch.zeros_like(after, dtype=torch.bool)
    torch.as_strided(inside, p.shape, p.stride(), p.storage_offset()).fill_(True)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(after[~inside], before[~inside])
    assert (after[inside] != before[inside]).all()


@each_backend
@each_config()
def test_expanded_gradients(config, backend):
    """sum().backward() gives gradients with stride 0."""
    a, b = (torch.nn.Parameter(VALUES[0, 0].clone()) for _ in range(2))
    one, two = config.make([a], backend=backend), config.make([b], backend=backend)
    for step in range(3):
        a.grad = torch.tensor(0.5 + step).expand(a.shape)
        b.grad = torch.full_like(b, 0.5 + step)
        one.step()
        two.step()
    assert a.grad.stride() == (0, 0) and torch.equal(a, b)


@each_backend
@each_config()
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_scalars_empty_and_size_one(config, form, backend):
    shapes = ((), (1,), (1, 5, 1), (0,), (3, 0, 2), (1, 1))
    params = parameters(*shapes)
    opt = config.make(params, backend=backend, state_format=form, min_quantized_numel=1)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for p, old in zip(params, before, strict=True):
        assert p.shape == old.shape and (p != old).all()
        assert opt.state[p]["step"] == 1
    only_empty = config.make([torch.nn.Parameter(torch.zeros(0))], backend=backend)
    only_empty.param_groups[0]["params"][0].grad = torch.zeros(0)
    only_empty.step()


@each_backend
@each_config()
def test_size_one_dimensions_with_odd_strides(config, backend):
    odd = torch.nn.Parameter(torch.randn(4, 5).as_strided((4, 1, 5), (5, 99, 1)))
    plain = torch.nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    one, two = config.make([odd], backend=backend), config.make([plain], backend=backend)
    for step in range(2):
        for p in (odd, plain):
            p.grad = torch.full(p.shape, 1.0 + step)
        one.step()
        two.step()
    assert torch.equal(odd, plain)


@each_backend
@each_config()
@pytest.mark.parametrize("precision", ["nearest", "stochastic"])
def test_mixed_model_equals_per_parameter_reference(config, precision, backend):
    """fp32 norms, bf16 matrices, an embedding kept fp32 by override, a transposed view: as if stepped one by one."""

    def build():
        gen = torch.Generator().manual_seed(0)
        norm = torch.nn.Parameter(torch.randn(80, generator=gen))
        matrix = torch.nn.Parameter(torch.randn(80, 70, generator=gen).bfloat16())
        embedding = torch.nn.Embedding(90, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(90, 64, generator=gen))
        turned = torch.nn.Parameter(torch.randn(70, 80, generator=gen).bfloat16().t())
        fusedopt.override(embedding, state_format="fp32", param_precision="nearest")
        return [norm, matrix, embedding.weight, turned]

    options = {"state_format": "int8", "param_precision": precision, "clip_grad_norm": None}
    together, alone, exact = build(), build(), build()
    opt = config.make(together, backend=backend, **options)
    # the tensor id keys the rounding: parameters without gradients keep each at its place
    singles = [config.make(alone, backend=backend, **options) for _ in alone]
    references = [config.make(exact, backend="reference", **options) for _ in exact]
    gen = torch.Generator().manual_seed(3)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=gen) for p in together]
        for p, g in zip(together, grads, strict=True):
            p.grad = torch.empty_like(p).copy_(g)
        opt.step()
        for params, opts in ((alone, singles), (exact, references)):
            for i, single in enumerate(opts):
                for j, p in enumerate(params):
                    p.grad = torch.empty_like(p).copy_(grads[j]) if i == j else None
                single.step()
    for i, p in enumerate(together):
        assert_same_bits(tensors(opt, [p]), tensors(singles[i], [alone[i]]), f"parameter {i}:")
        pairs = [(p.detach().float(), exact[i].detach().float())]
        for state in config.cls.rule_for(opt.param_groups[0]).states:
            stored = opt.state[p][state.name]
            assert stored.dtype == (torch.uint8 if i in (1, 3) and not state.wide else torch.float32)
            assert memory.strides_match(stored, p)
            pairs.append(tuple(states.decode(q, o.state[q], state) for o, q in ((opt, p), (references[i], exact[i]))))
        for a, b in pairs:  # other backends may round a tie of codes or 16-bit values the other way
            off = (a - b).abs() > 3e-6 * b.abs() + 3e-7
            assert off.sum() <= 0.01 * off.numel() * (p.dtype == torch.bfloat16), (
                f"parameter {i}: {int(off.sum())} differ"
            )
            assert (a - b).abs().max() <= 0.02 * b.abs().max()


@each_backend
def test_views_of_one_buffer(backend):
    """Parameters that are slices of one flat buffer (DeepSpeed, DDP buckets) equal separate ones."""
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    views = [torch.nn.Parameter(flat[a:b]) for a, b in ((0, 333), (333, 334), (334, 1000))]
    apart = [torch.nn.Parameter(v.detach().clone()) for v in views]
    one, two = (BY_NAME["adamw"].make(ps, backend=backend) for ps in (views, apart))
    for _ in range(3):
        for v, a in zip(views, apart, strict=True):
            a.grad = torch.randn_like(a)
            v.grad = a.grad.clone()
        one.step()
        two.step()
    assert_same_bits(tensors(one, views), tensors(two, apart))
    assert torch.equal(flat, torch.cat([a.detach() for a in apart]))


@each_backend
def test_parameter_and_gradient_of_different_dtype(backend):
    """bf16 parameters with fp32 gradients, as `grad_dtype` allows: no rounding of the gradient."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p = torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.full((300,), 1 + 2.0**-12)
    opt = BY_NAME["adamw"].make([p], backend=backend, betas=(0.5, 0.5))
    opt.step()
    assert (opt.state[p]["exp_avg"] == (1 + 2.0**-12) / 2).all()


def test_overlap_and_density():
    t = torch.zeros(4, 6)
    assert (
        memory.is_dense(t) and memory.is_dense(t.t()) and memory.is_dense(torch.zeros(2, 3, 4, 5).permute(2, 0, 3, 1))
    )
    assert not memory.is_dense(t[:, ::2]) and not memory.overlaps(t[:, ::2]) and not memory.overlaps(t[::2].t())
    assert memory.overlaps(torch.zeros(3).expand(2, 3)) and memory.overlaps(torch.zeros(9).as_strided((4, 3), (2, 1)))
    assert not memory.overlaps(torch.zeros(1).expand(1, 1)) and not memory.overlaps(torch.zeros(0).expand(3, 0))


@each_backend
@each_config(CONFIGS[:1])
def test_unaligned_rows_get_a_bucket_of_their_own(config, backend):
    params = [torch.nn.Parameter(torch.zeros(64)), torch.nn.Parameter(torch.zeros(65)[1:])]
    for p in params:
        p.grad = torch.ones(64)
    opt = config.make(params, backend=backend)
    assert sorted(b["aligned"] for b in opt.plan().buckets) == [False, True]
    opt.step()
    assert torch.equal(*params)
