"""Checks of tensors of other kinds and layouts: sparse, complex, transposed, with gaps."""

from __future__ import annotations

import re

import torch

from bench.conformance.base import NotMeant, check, distance, need, need_same, parameters, set_lr, values
from bench.conformance.subjects import Subject


@check("a sparse gradient: right, or a clear error")
def sparse(s: Subject) -> None:
    p, q = parameters(((6, 4), (6, 4)))
    q.data.copy_(p.data)
    before = values([p])
    p.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 4), (6, 4), check_invariants=True)
    q.grad = p.grad.to_dense()
    mine, dense = s.make([p]), s.make([q])
    for _ in range(2):
        dense.step()
    try:
        for _ in range(2):
            mine.step()
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        need(re.search(r"sparse grad", text, re.IGNORECASE), f"unclear: {text}")
        need_same([p], before, "after the error")
        return
    need(distance([p], [q]) < 1e-6, f"no error, and off by {distance([p], [q]):.1e}")


@check("complex parameters: right, or an error")
def complex_parameters(s: Subject) -> None:
    gen = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, dtype=torch.complex64, generator=gen))
    q = torch.nn.Parameter(torch.view_as_real(p.detach()).clone())
    try:
        opt = s.make([p])
        for step in range(3):
            p.grad = torch.randn(6, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
            opt.step()
    except Exception:
        return
    if not s.elementwise:
        raise NotMeant("no error; its result depends on a tensor's shape or norm")
    other = s.make([q])
    for step in range(3):
        g = torch.randn(6, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        q.grad = torch.view_as_real(g).clone()
        other.step()
    off = distance([torch.view_as_real(p.detach())], [q])
    need(off < 1e-5, f"no error, and off by {off:.1e}")


def layout_step(s: Subject, parameter, gradient) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """One step from the same values in a plain layout and in another; both parameters."""
    gen = torch.Generator().manual_seed(0)
    p, g = torch.randn(64, 80, generator=gen), torch.randn(64, 80, generator=gen)
    plain, other = torch.nn.Parameter(p.clone()), torch.nn.Parameter(parameter(p))
    plain.grad, other.grad = g.clone(), gradient(g)
    for q in (plain, other):
        s.make([q]).step()
    return plain, other


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


@check("a transposed parameter steps as a contiguous one, in place")
def transposed_parameter(s: Subject) -> None:
    for gradient in (transposed, torch.clone):
        holder = []

        def lay(t, holder=holder):
            holder.append(transposed(t))
            return holder[0]

        plain, other = layout_step(s, lay, gradient)
        off = distance([plain], [other])
        need(off < 1e-3 * s.lr, f"off by {off:.1e} after a step of lr {s.lr}")
        need(torch.equal(holder[0], other.detach()), "its storage was replaced: views of it are stale")


@check("a gradient with other strides than its parameter")
def strided_gradient(s: Subject) -> None:
    plain, other = layout_step(s, torch.clone, transposed)
    need(distance([plain], [other]) < 1e-3 * s.lr, f"off by {distance([plain], [other]):.1e} after a step of lr {s.lr}")


@check("a view with gaps leaves the memory between alone")
def gaps(s: Subject) -> None:
    gen = torch.Generator().manual_seed(0)
    buffer = torch.randn(40, 30, 2, generator=gen)
    plain = torch.nn.Parameter(buffer[..., 0].clone())
    between = buffer[..., 1].clone()
    p = torch.nn.Parameter(buffer[..., 0])
    for q in (plain, p):
        q.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
        s.make([q]).step()
    need(torch.equal(buffer[..., 1], between), "the memory between was written")
    need(distance([plain], [p]) < 1e-3 * s.lr, f"off by {distance([plain], [p]):.1e} after a step of lr {s.lr}")


@check("zero gradients and lr=0 move nothing")
def zero_lr(s: Subject) -> None:
    params = parameters(dtype=torch.bfloat16)
    opt = s.make(params)
    set_lr(opt, 0.0)
    before = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    need_same(params, before, "lr=0")
