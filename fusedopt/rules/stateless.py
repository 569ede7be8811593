"""FRUGAL's stateless rule for tensors whose turn it is not (arXiv 2411.07837, algorithm 1): signSGD or SGD."""

from __future__ import annotations

import torch

from fusedopt.kernels.language import jit, tl
from fusedopt.rule import Rule, register


def scalars(h, step):
    options = h["projection"]
    scale = options.residual_scale
    return scale if options.residual == "sign" else 0.0, scale if options.residual == "sgd" else 0.0


def reference(g, p, *, sign_weight, value_weight):
    return (sign_weight * torch.sign(g) + value_weight * g,)


@jit
def direction(g, p, c):
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    return tl.load(c) * sign + tl.load(c + 1) * g


STATELESS = register(
    Rule("stateless", (), ("sign_weight", "value_weight"), scalars, reference, direction, internal=True)
)
