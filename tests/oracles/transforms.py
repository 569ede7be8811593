"""Gradient transforms from their papers' equations, tensor by tensor in plain torch: one object each, called before a step.

Each is called with the parameters, and changes their .grad in place, whatever its dtype.
"""

import collections
import math

import torch
from pytorch_optimizer.optimizer.agc import agc
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient


class Grokfast:
    """arXiv 2405.20233, algorithm 2; the average begins with the first gradient, as in the authors' code."""

    def __init__(self, alpha=0.98, amplify=2.0):
        self.alpha, self.amplify, self.means = alpha, amplify, {}

    def __call__(self, params):
        for i, p in enumerate(params):
            old = self.means.get(i, p.grad)
            self.means[i] = self.alpha * old + (1 - self.alpha) * p.grad
            p.grad = p.grad + self.amplify * self.means[i]


class GrokfastMA:
    """arXiv 2405.20233, algorithm 1."""

    def __init__(self, window=100, amplify=5.0, reduce="mean", warmup=True):
        self.window, self.amplify, self.reduce, self.warmup = window, amplify, reduce, warmup
        self.queues = collections.defaultdict(list)

    def __call__(self, params):
        for i, p in enumerate(params):
            queue = self.queues[i]
            queue.append(p.grad.clone())
            del queue[: -self.window]
            if len(queue) == self.window or not self.warmup:
                total = torch.zeros_like(p.grad)
                for g in queue:
                    total += g
                p.grad = p.grad + self.amplify * (total / len(queue) if self.reduce == "mean" else total)


class OrthoGrad:
    """arXiv 2501.04697: the component along the weights goes, the norm comes back."""

    def __init__(self, rescale=True):
        self.rescale = rescale

    def __call__(self, params):
        for p in params:
            w, g = p.detach().double().flatten(), p.grad.double().flatten()
            left = g - torch.dot(w, g) / (torch.dot(w, w) + 1e-30) * w
            if self.rescale:
                left = left * (torch.linalg.norm(g) / (torch.linalg.norm(left) + 1e-30))
            p.grad = left.view(p.shape).to(p.grad.dtype)


class ClipValue:
    def __init__(self, threshold=1.0):
        self.threshold = threshold

    def __call__(self, params):
        torch.nn.utils.clip_grad_value_(params, self.threshold)


class ClipFraction:
    """The largest floor(fraction n) elements are set to the size of the next one."""

    def __init__(self, fraction=0.1):
        self.fraction = fraction

    def __call__(self, params):
        for p in params:
            values = p.grad.flatten().tolist()
            order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
            cut = math.floor(self.fraction * len(values))
            limit = abs(values[order[cut]])
            for i in order[:cut]:
                values[i] = math.copysign(limit, values[i])
            p.grad = torch.tensor(values, dtype=p.grad.dtype).view(p.shape)


class ClipComponents:
    """clip_grad_norm_ of each component by itself. groups: lists of indices."""

    def __init__(self, max_norm=0.15, groups=None):
        self.max_norm, self.groups = max_norm, groups

    def __call__(self, params):
        for ids in self.groups or [[i] for i in range(len(params))]:
            torch.nn.utils.clip_grad_norm_([params[i] for i in ids], self.max_norm)


class AdaptiveClip:
    def __init__(self, clip=0.01, eps=1e-3):
        self.clip, self.eps = clip, eps

    def __call__(self, params):
        for p in params:
            p.grad = agc(p.detach(), p.grad, agc_eps=self.eps, agc_clip_val=self.clip)


class Centralize:
    def __init__(self, conv_only=False):
        self.conv_only = conv_only

    def __call__(self, params):
        for p in params:
            centralize_gradient(p.grad, gc_conv_only=self.conv_only)


class Normalize:
    def __init__(self, eps=1e-8):
        self.eps = eps

    def __call__(self, params):
        for p in params:
            if p.numel() > 2:
                p.grad = p.grad / (p.grad.std() + self.eps)


class UnitNorm:
    """Of a whole tensor, or of each index of the first dimension (2-D and 4-D tensors), summed by hand."""

    def __init__(self, per="tensor", eps=1e-8):
        self.per, self.eps = per, eps

    def __call__(self, params):
        for p in params:
            g = p.grad
            if self.per == "tensor" or g.dim() < 2:
                p.grad = g / (g.square().sum().sqrt() + self.eps)
                continue
            p.grad = torch.stack([row / (row.square().sum().sqrt() + self.eps) for row in g.unbind(0)])
