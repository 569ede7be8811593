"""Rules with numbers of whole tensors, transcribed from their papers in plain torch: see `elementwise` for the form.

What is summed over several tensors is prepared by `before(params, grads, t)`, which a step calls first.
"""

import math

import torch

from oracles.elementwise import Transcription


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
