"""Optimizers that are a rule between other steps, transcribed from their papers in plain torch: AdamP, SGDP, Ranger21."""

import math

import torch

from oracles.elementwise import Transcription, ema
from oracles.reductions import Joint, zeros


class Projected(Transcription):
    """arXiv 2006.08217, section 3.2, with the test of its authors' code: by channel, else by layer. Decay is the class's own."""

    delta, wd_ratio, eps, nesterov = 0.1, 0.1, 1e-8, False

    def decays(self):
        return False

    def projected(self, theta, g, u):
        """The step across the weights, and what is left of the decay."""
        if theta.dim() < 2:
            return u, 1.0
        for rows in (theta.shape[0], 1):
            w, raw, step = theta.reshape(rows, -1), g.reshape(rows, -1), u.reshape(rows, -1)
            cosines = []
            for x, y in zip(w, raw, strict=True):
                sizes = max(float(x.norm()), self.eps) * max(float(y.norm()), self.eps)
                cosines.append(abs(float(torch.dot(x, y))) / sizes)
            if max(cosines) < self.delta / math.sqrt(w.shape[1]):
                out = []
                for x, s in zip(w, step, strict=True):
                    unit = x / (x.norm() + self.eps)
                    out.append(s - torch.dot(unit, s) * unit)
                return torch.stack(out).view_as(u), self.wd_ratio
        return u, 1.0


class AdamP(Projected):
    """Algorithm 2."""

    betas = (0.9, 0.999)

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        ahead = b1 * m + (1 - b1) * g if self.nesterov else m
        u, ratio = self.projected(theta, g, ahead / ((v / (1 - b2**t)).sqrt() + self.eps))
        return (1 - self.lr * self.wd * ratio) * theta - self.lr / (1 - b1**t) * u


class SGDP(Projected):
    """Algorithm 1; the buffer itself is not projected."""

    momentum, dampening = 0.0, 0.0

    def update(self, theta, g, t, state):
        mu = self.momentum
        b = state["b"] = mu * state.get("b", torch.zeros_like(g)) + (1 - self.dampening) * g
        u, ratio = self.projected(theta, g, g + mu * b if self.nesterov else b)
        return (1 - self.lr * self.wd * ratio / (1 - mu)) * theta - self.lr * u


def unit_norm(x):
    """Of the paper's code: vectors as a whole, rows, filters."""
    if x.dim() < 2:
        return x.norm()
    return (x * x).sum((1,) if x.dim() < 4 else (1, 2, 3), keepdim=True).sqrt()


class Ranger21(Joint):
    """arXiv 2106.13731 without its learning rate schedule; positive-negative momentum: arXiv 2103.17182."""

    betas, eps, pnm, amsgrad, softplus, clip = (0.9, 0.999), 1e-8, 0.9, True, 50.0, 1e-2
    centralize, normalize, stable_decay, norm_loss, lookahead, lookahead_alpha = True, True, True, 1e-4, 5, 0.5

    def __init__(self, params, weight_decay=1e-4, **options):
        super().__init__(params, weight_decay=weight_decay, **options)

    def begin(self, thetas):
        self.a, self.b, self.v, self.v_max = (zeros(thetas) for _ in range(4))
        self.slow = [theta.clone() for theta in thetas]

    def prepared(self, theta, g):
        if self.clip is not None:
            limit = self.clip * torch.clamp(unit_norm(theta), min=1e-3)
            size = unit_norm(g)
            g = torch.where(size > limit, g * limit / torch.clamp(size, min=1e-6), g)
        if self.centralize and g.dim() > 1:
            g = g - g.mean(tuple(range(1, g.dim())), keepdim=True)
        if self.normalize and g.numel() > 2:
            g = g / (g.std() + 1e-8)
        return g

    def update_all(self, thetas, grads, t):
        b1, b2 = self.betas
        grads = [self.prepared(theta, g) for theta, g in zip(thetas, grads, strict=True)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads, strict=True)]
        count = sum(v.numel() for v in self.v)
        sigma = math.sqrt(sum(float(v.sum()) for v in self.v) / (1 - b2**t) / count)
        out = []
        for i, (theta, g) in enumerate(zip(thetas, grads, strict=True)):
            if self.stable_decay:
                theta = theta * (1 - self.lr * self.wd / sigma)
            if self.norm_loss is not None:
                theta = theta * (1 - 2 * self.lr * self.norm_loss * (1 - 1 / (unit_norm(theta) + 1e-8)))
            if not self.stable_decay:  # AdamW's, with the step
                theta = theta * (1 - self.lr * self.wd)
            self.v_max[i] = torch.max(self.v_max[i], self.v[i]) if self.amsgrad else self.v[i]
            root = (self.v_max[i] / (1 - b2**t)).sqrt() + self.eps
            if self.softplus is not None:
                root = torch.logaddexp(torch.zeros_like(root), self.softplus * root) / self.softplus
            theta = theta - self.lr / (1 - b1**t) * self.momentum(i, g, t) / root
            if self.lookahead is not None and t % self.lookahead == 0:
                theta = self.slow[i] = self.slow[i] + self.lookahead_alpha * (theta - self.slow[i])
            out.append(theta)
        return out

    def momentum(self, i, g, t):
        b1 = self.betas[0]
        if self.pnm is None:
            self.a[i] = b1 * self.a[i] + (1 - b1) * g
            return self.a[i]
        now, other = (self.a, self.b) if t % 2 else (self.b, self.a)
        now[i] = b1**2 * now[i] + (1 - b1**2) * g
        return ((1 + self.pnm) * now[i] - self.pnm * other[i]) / math.sqrt((1 + self.pnm) ** 2 + self.pnm**2)
