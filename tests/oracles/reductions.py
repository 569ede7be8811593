"""Rules with numbers of whole tensors, transcribed from their papers in plain torch: see `elementwise` for the form.

What is summed over several tensors is prepared by `before(params, grads, t)`, which a step calls first.
"""

import math

import torch

from oracles.elementwise import Transcription, ema


class NovoGrad(Transcription):
    """arXiv 1905.11286, algorithm 1; decay inside the moment, not scaled by the norm."""

    decay = "inside"
    betas, eps, grad_averaging = (0.95, 0.98), 1e-8, False

    def decays(self):
        return False

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        norm = float((g * g).sum())
        state["v"] = norm if t == 1 else b2 * state["v"] + (1 - b2) * norm
        entering = g / (math.sqrt(state["v"]) + self.eps) + self.wd * theta
        if self.grad_averaging:
            entering = (1 - b1) * entering
        state["m"] = b1 * state.get("m", torch.zeros_like(g)) + entering
        return theta - self.lr * state["m"]


class SGDSaI(Transcription):
    """arXiv 2412.11768, algorithm 1: gains from the first gradients. One element has no deviation, and gain 1."""

    momentum, eps = 0.9, 1e-8

    def update(self, theta, g, t, state):
        if t == 1:
            state["gain"] = float(g.norm() / (g.std() + self.eps)) if g.numel() > 1 else 1.0
            state["b"] = g
        else:
            state["b"] = self.momentum * state["b"] + (1 - self.momentum) * g
        return theta - self.lr * state["gain"] * state["b"]


class TVLARS(Transcription):
    """arXiv 2309.14053, as its published code: norms of the decayed gradient, both at most 10."""

    decay = "l2"
    momentum, trust_coefficient, decay_rate, alpha, delay, gamma_min = 0.9, 1e-3, 1e-3, 0.1, 0, 0.0

    def update(self, theta, g, t, state):
        k = t - 1
        phi = 1 / (self.alpha + math.exp(self.decay_rate * (k + 1 - self.delay))) + self.gamma_min
        a, b = min(float(theta.norm()), 10.0), min(float(g.norm()), 10.0)
        q = self.trust_coefficient * phi * a / b if a > 0 and b > 0 else 1.0
        state["b"] = self.momentum * state.get("b", torch.zeros_like(g)) + q * g
        return theta - self.lr * state["b"]


class MARSAdamW(Transcription):
    """arXiv 2411.10438, algorithms 1 and 2, approximate form; decay with the update."""

    betas, gamma, eps = (0.95, 0.99), 0.025, 1e-8

    def decays(self):
        return False

    def corrected(self, g, state):
        b1 = self.betas[0]
        c = g + self.gamma * b1 / (1 - b1) * (g - state.get("g", torch.zeros_like(g)))
        state["g"] = g.clone()
        return c / c.norm() if c.norm() > 1 else c

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        c = self.corrected(g, state)
        m, v = ema(state, "m", c, b1), ema(state, "v", c * c, b2)
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return theta - self.lr * (u + self.wd * theta)


class MARSLion(MARSAdamW):
    """The same, algorithm 3."""

    def update(self, theta, g, t, state):
        m = ema(state, "m", self.corrected(g, state), self.betas[0])
        return theta - self.lr * (torch.sign(m) + self.wd * theta)


class FAdam(Transcription):
    """arXiv 2405.12807, algorithm 1, with the eps of the published code."""

    betas, eps, clip = (0.9, 0.999), 1e-8, 1.0

    def decays(self):
        return False

    def clipped(self, x):
        return x * self.clip / max(1.0, self.rms(x))

    @staticmethod
    def rms(x):
        return float((x * x).mean().sqrt())

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        b = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        state["F"] = b * state.get("F", torch.ones_like(g)) + (1 - b) * g * g
        scale = state["F"] ** 0.5 + self.eps * max(1.0, self.rms(g))
        m = ema(state, "m", self.clipped(g / scale), b1)
        return theta - self.lr * (m + self.wd * self.clipped(theta / scale))
