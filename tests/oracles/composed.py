"""Optimizers that are a rule between other steps, transcribed from their papers in plain torch: AdamP, SGDP."""

import math

import torch

from oracles.elementwise import Transcription, ema


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
