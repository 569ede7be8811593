"""Rules that read the loss or a diagonal of the Hessian, and UPGD, transcribed: see `elementwise` for the form."""

import math

import torch

from oracles.elementwise import Transcription, ema
from oracles.reductions import Joint, dot, zeros
from oracles.stand_in import stand_in_hessian, stand_in_loss


class UPGDBase:
    """arXiv 2404.00781 without noise: the utility of each weight against the largest of all, and 1 - sigmoid of it."""

    beta_utility = 0.999

    def free(self, thetas, grads, t):
        b = self.beta_utility
        self.u = [b * u - (1 - b) * g * theta for u, g, theta in zip(self.u, grads, thetas, strict=True)]
        largest = max(float(u.max()) for u in self.u)
        return [1 - torch.sigmoid(u / (1 - b**t) / largest) for u in self.u]


class AEGD(Transcription):
    """arXiv 2010.05109, algorithm 1, decay on the scaled gradient; and with a heavy ball."""

    shift, momentum = 1.0, 0.0

    @torch.no_grad()
    def step(self):
        self.root = math.sqrt(self.sign * stand_in_loss(self.params) + self.shift)
        super().step()

    def update(self, theta, g, t, state):
        if self.decay == "l2":  # the caller has added it to the gradient
            g, inside = g - self.wd * theta, self.wd * theta
        else:
            inside = 0.0
        q = g / (2 * self.root) + inside
        state["r"] = state.get("r", torch.full_like(q, self.root)) / (1 + 2 * self.lr * q * q)
        state["m"] = self.momentum * state.get("m", torch.zeros_like(q)) + q
        return theta - 2 * self.lr * state["r"] * state["m"]


class SPS(Joint):
    """arXiv 2002.10542, SPS_max."""

    scale, max_rate, lower_bound = 0.5, 1.0, 0.0

    def update_all(self, thetas, grads, t):
        above = max(self.sign * stand_in_loss(thetas) - self.lower_bound, 0.0)
        rate = self.lr * min(above / (self.scale * dot(grads, grads)), self.max_rate)
        return [(1 - rate * self.wd) * theta - rate * g for theta, g in zip(thetas, grads, strict=True)]


class SANIA(Joint):
    """arXiv 2312.17369, algorithm 1 with the diagonals of its section 4."""

    preconditioner, beta2, eps, sqrt, lower_bound = "adam", 0.999, 0.1, False, 0.0

    def begin(self, thetas):
        self.v = zeros(thetas)

    def metric(self, v, t):
        v = v if self.preconditioner == "adagrad" else v / (1 - self.beta2**t)
        v = v.clamp(min=self.eps)
        return v.sqrt() if self.sqrt else v

    def update_all(self, thetas, grads, t):
        b = self.beta2
        if self.preconditioner == "adagrad":
            self.v = [v + g * g for v, g in zip(self.v, grads, strict=True)]
        else:
            self.v = [b * v + (1 - b) * g * g for v, g in zip(self.v, grads, strict=True)]
        return self.moved(thetas, grads, [g / self.metric(v, t) for g, v in zip(grads, self.v, strict=True)])

    def moved(self, thetas, grads, steps):
        above, product = max(self.sign * stand_in_loss(thetas) - self.lower_bound, 0.0), dot(steps, grads)
        rate = self.lr * (1 - math.sqrt(1 - 2 * above / product) if 2 * above <= product else 1.0)
        return [(1 - rate * self.wd) * theta - rate * d for theta, d in zip(thetas, steps, strict=True)]


class OASIS(Transcription):
    """arXiv 2109.05198 with a fixed rate and momentum; the diagonal is given."""

    betas, truncation = (0.9, 0.999), 0.01

    def update(self, theta, g, t, state):
        m = ema(state, "m", g, self.betas[0])
        return theta - self.lr * m / stand_in_hessian(theta).abs().clamp(min=self.truncation)


class SANIAHessian(SANIA):
    def update_all(self, thetas, grads, t):
        steps = [g / stand_in_hessian(g).abs().clamp(min=self.eps) for g in grads]
        return self.moved(thetas, grads, steps)


class UPGD(UPGDBase, Joint):
    sigma, protecting = 0.0, True

    def begin(self, thetas):
        self.u = zeros(thetas)

    def update_all(self, thetas, grads, t):
        return [
            (1 - self.lr * self.wd) * theta - self.lr * g * (k if self.protecting else 1.0)
            for theta, g, k in zip(thetas, grads, self.free(thetas, grads, t), strict=True)
        ]


class AdaptiveUPGD(UPGDBase, Joint):
    """As in its published code for reinforcement learning."""

    betas, eps, sigma = (0.9, 0.999), 1e-5, 0.0

    def begin(self, thetas):
        self.u, self.m, self.v = zeros(thetas), zeros(thetas), zeros(thetas)

    def update_all(self, thetas, grads, t):
        b1, b2 = self.betas
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads, strict=True)]
        out = []
        for theta, m, v, k in zip(thetas, self.m, self.v, self.free(thetas, grads, t), strict=True):
            u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
            out.append((1 - self.lr * self.wd) * theta - 2 * self.lr * k * u)
        return out


class DASA(Joint):
    """arXiv 2109.05198, algorithm 1, with its adaptive rate; the diagonal is given."""

    decay = "l2"
    initial_rate, beta2, truncation = 1e-3, 0.999, 0.01

    def update_all(self, thetas, grads, t):
        metric = [stand_in_hessian(theta).abs().clamp(min=self.truncation) for theta in thetas]
        if t == 1:
            self.rate, self.growth = self.initial_rate, math.inf
        else:
            s = [theta - old for theta, old in zip(thetas, self.thetas, strict=True)]
            y = [g - old for g, old in zip(grads, self.grads, strict=True)]
            length = math.sqrt(dot(s, [d * x for d, x in zip(metric, s, strict=True)]))
            dual = math.sqrt(dot(y, [x / d for d, x in zip(metric, y, strict=True)]))
            rate = min(math.sqrt(1 + self.growth) * self.rate, length / (2 * dual))
            self.rate, self.growth = rate, rate / self.rate
        self.thetas, self.grads = thetas, grads
        return [theta - self.lr * self.rate * g / d for theta, g, d in zip(thetas, grads, metric, strict=True)]
