"""Rules with numbers of whole tensors, transcribed from their papers in plain torch: see `elementwise` for the form.

What is summed over several tensors is prepared by `before(params, grads, t)`, which a step calls first.
"""

import math

import torch

from oracles.elementwise import Transcription, ema
from oracles.stand_in import stand_in_loss


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


class Joint(Transcription):
    """All tensors step at once: `update_all(thetas, grads, t)` gives the new ones; grads with L2 decay where it is coupled."""

    def decoupled(self):
        return self.decay == "decoupled"

    @torch.no_grad()
    def step(self):
        self.t += 1
        thetas = [p.detach().clone() for p in self.params]
        grads = [self.sign * p.grad for p in self.params]
        if not self.decoupled():
            grads = [g + self.wd * theta for g, theta in zip(grads, thetas, strict=True)]
        if self.t == 1:
            self.first = [theta.clone() for theta in thetas]
            self.begin(thetas)
        for p, new in zip(self.params, self.update_all(thetas, grads, self.t), strict=True):
            p.copy_(new)

    def begin(self, thetas):
        pass


class AdamCM(Joint):
    """arXiv 2307.09638, algorithm 1, with its code's weights: the first step only fills the buffer."""

    betas, eps, capacity, kept = (0.9, 0.999), 1e-8, 5, 0.7

    def __init__(self, params, lr, decay=0.7, **options):
        super().__init__(params, lr, **options)
        self.kept = decay

    def begin(self, thetas):
        self.m, self.v, self.buffer = zeros(thetas), zeros(thetas), []

    def update_all(self, thetas, grads, t):
        b1, b2 = self.betas
        weight = sum(float(g.norm()) for g in grads)
        if t == 1:
            moved, entry = zeros(thetas), grads
        else:
            self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, grads, strict=True)]
            means = [torch.stack(held).mean(0) for held in zip(*(entry for _, entry in self.buffer), strict=True)]
            moved, entry = [m + c for m, c in zip(self.m, means, strict=True)], self.m
        if len(self.buffer) < self.capacity:
            self.buffer.append((weight, entry))
        else:
            least = min(range(self.capacity), key=lambda i: self.buffer[i][0])
            if weight > self.buffer[least][0]:
                self.buffer[least] = weight, entry
        self.buffer = [(self.kept * w, held) for w, held in self.buffer]
        self.v = [b2 * v + (1 - b2) * u * u for v, u in zip(self.v, moved, strict=True)]
        return [
            (1 - self.lr * self.wd) * theta - self.lr * (u / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
            for theta, u, v in zip(thetas, moved, self.v, strict=True)
        ]


def dot(xs, ys):
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def zeros(xs):
    return [torch.zeros_like(x) for x in xs]


class Prodigy(Joint):
    """arXiv 2306.06101, algorithm 4, with a growth cap; eps times the new d, the step with the old one."""

    betas, beta3, eps, bias_correction, safeguard_warmup = (0.9, 0.999), None, 1e-8, False, False
    d0, d_coef, growth_rate = 1e-6, 1.0, math.inf

    def begin(self, thetas):
        self.d = self.d_max = self.d0
        self.r = 0.0
        self.m, self.v, self.s = zeros(thetas), zeros(thetas), zeros(thetas)

    def update_all(self, thetas, grads, t):
        b1, b2 = self.betas
        b3 = math.sqrt(b2) if self.beta3 is None else self.beta3
        debias = math.sqrt(1 - b2**t) / (1 - b1**t) if self.bias_correction else 1.0
        d = self.d
        step = d * self.lr * debias
        self.r = b3 * self.r + d / self.d0 * step * dot(grads, [x - y for x, y in zip(self.first, thetas, strict=True)])
        into = d if self.safeguard_warmup else step
        self.s = [b3 * s + d / self.d0 * into * g for s, g in zip(self.s, grads, strict=True)]
        self.m = [b1 * m + (1 - b1) * d * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [b2 * v + (1 - b2) * d * d * g * g for v, g in zip(self.v, grads, strict=True)]
        estimate = self.d_coef * self.r / sum(float(s.abs().sum()) for s in self.s)
        if d == self.d0:
            self.d = max(d, estimate)
        self.d_max = max(self.d_max, estimate)
        self.d = min(self.d_max, self.d * self.growth_rate)
        kept = 1 - step * self.wd if self.decoupled() else 1.0
        return [
            kept * theta - step * m / (v.sqrt() + self.d * self.eps)
            for theta, m, v in zip(thetas, self.m, self.v, strict=True)
        ]


class DAdaptAdam(Joint):
    """arXiv 2301.07733, algorithm 5, as its authors' code weighs it."""

    decay = "l2"
    betas, eps, bias_correction, d0, growth_rate = (0.9, 0.999), 1e-8, False, 1e-6, math.inf

    def begin(self, thetas):
        self.d, self.r = self.d0, 0.0
        self.m, self.v, self.s = zeros(thetas), zeros(thetas), zeros(thetas)

    def update_all(self, thetas, grads, t):
        b1, b2 = self.betas
        root = math.sqrt(b2)
        step = self.d * self.lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if self.bias_correction else 1.0)
        ratio = [s / (v.sqrt() + self.eps) for s, v in zip(self.s, self.v, strict=True)]
        self.r = root * self.r + (1 - root) * step * dot(grads, ratio)
        self.m = [b1 * m + step * (1 - b1) * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads, strict=True)]
        self.s = [root * s + step * (1 - root) * g for s, g in zip(self.s, grads, strict=True)]
        estimate = self.r / ((1 - root) * sum(float(s.abs().sum()) for s in self.s))
        self.d = max(self.d, min(estimate, self.d * self.growth_rate))
        kept = 1 - step * self.wd if self.decoupled() else 1.0
        return [kept * theta - m / (v.sqrt() + self.eps) for theta, m, v in zip(thetas, self.m, self.v, strict=True)]


class DoG(Joint):
    """arXiv 2302.12022: norms over all tensors; `apart` (L-DoG) over each."""

    decay, apart = "l2", False
    reps_rel, eps = 1e-6, 1e-8

    def begin(self, thetas):
        self.r, self.total = {}, {}

    def update_all(self, thetas, grads, t):
        sets = [[i] for i in range(len(thetas))] if self.apart else [list(range(len(thetas)))]
        out = {}
        for mine in sets:
            key, square = mine[0], sum(float((grads[i] ** 2).sum()) for i in mine)
            if t == 1:
                size = math.sqrt(sum(float((thetas[i] ** 2).sum()) for i in mine))
                self.r[key], self.total[key] = self.reps_rel * (1 + size), square + self.eps
            else:
                away = math.sqrt(sum(float(((thetas[i] - self.first[i]) ** 2).sum()) for i in mine))
                self.r[key], self.total[key] = max(self.r[key], away), self.total[key] + square
            step = self.lr * self.r[key] / math.sqrt(self.total[key])
            out.update({i: thetas[i] - step * grads[i] for i in mine})
        return [out[i] for i in range(len(thetas))]


class LDoG(DoG):
    apart = True


class AdaptiveBraking(Transcription):
    """arXiv 2007.01397, section 3, per tensor."""

    decay = "l2"
    momentum, rho, eps = 0.9, 2.0, 1e-8

    def update(self, theta, g, t, state):
        b = state.get("b", torch.zeros_like(g))
        cosine = float((g * b).sum()) / max(float(g.norm() * b.norm()), self.eps)
        state["b"] = self.momentum * b + (1 - self.rho * cosine) * g
        return theta - self.lr * state["b"]


class InducedMetric(Joint):
    """arXiv 2509.03594: the metric's factor from the smoothed squared gradient of all tensors; `rms`: preconditioned."""

    momentum, xi, beta, rms, log, alpha, eps = 0.9, 0.1, 0.8, False, False, 0.99, 1e-8

    def begin(self, thetas):
        self.m, self.v, self.energy = zeros(thetas), zeros(thetas), 0.0

    def update_all(self, thetas, grads, t):
        mu, a = self.momentum, self.alpha
        self.m = [mu * m + (1 - mu) * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [a * v + (1 - a) * g * g for v, g in zip(self.v, grads, strict=True)]
        metric = [(v / (1 - a**t)).sqrt() + self.eps if self.rms else torch.ones_like(v) for v in self.v]
        slope = dot(grads, [g / d for g, d in zip(grads, metric, strict=True)])
        self.energy = self.beta * self.energy + (1 - self.beta) * self.xi * slope
        height = self.sign * stand_in_loss(thetas) if self.log else 1
        factor = height / (height**2 + abs(self.energy / (1 - self.beta**t)))
        return [
            (1 - self.lr * self.wd) * theta - self.lr * factor * m / (1 - mu**t) / d
            for theta, m, d in zip(thetas, self.m, metric, strict=True)
        ]


class SWATS(Joint):
    """arXiv 1712.07628, algorithm 1, over all tensors or (`per_tensor`) over each."""

    decay = "l2"
    betas, eps, switch_tolerance, per_tensor = (0.9, 0.999), 1e-8, 1e-9, False

    def begin(self, thetas):
        self.m, self.v = zeros(thetas), zeros(thetas)
        self.phases = {}

    def update_all(self, thetas, grads, t):
        if self.decoupled():
            thetas = [(1 - self.lr * self.wd) * theta for theta in thetas]
        every = list(range(len(thetas)))
        out = list(thetas)
        for mine in [[i] for i in every] if self.per_tensor else [every]:
            phase = self.phases.setdefault(mine[0], {"average": 0.0, "rate": None})
            if phase["rate"] is None:
                self.adam(mine, phase, thetas, grads, t, out)
                continue
            for i in mine:
                phase["b"][i] = self.betas[0] * phase["b"][i] + grads[i]
                out[i] = thetas[i] - (1 - self.betas[0]) * phase["rate"] * phase["b"][i]
        return out

    def adam(self, mine, phase, thetas, grads, t, out):
        b1, b2 = self.betas
        along = length = 0.0
        for i in mine:
            g = grads[i]
            self.m[i], self.v[i] = b1 * self.m[i] + (1 - b1) * g, b2 * self.v[i] + (1 - b2) * g * g
            step = -self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) * self.m[i] / (self.v[i].sqrt() + self.eps)
            out[i] = thetas[i] + step
            along, length = along + float((step * g).sum()), length + float((step * step).sum())
        if along != 0:
            gamma = length / -along
            phase["average"] = b2 * phase["average"] + (1 - b2) * gamma
            rate = phase["average"] / (1 - b2**t)
            if t > 1 and abs(rate - gamma) < self.switch_tolerance and rate > 0:
                phase["rate"], phase["b"] = rate, {i: torch.zeros_like(grads[i]) for i in mine}


class DAdaptSGD(Joint):
    """arXiv 2301.07733, algorithm 4, as its authors' code has it: the unit is the norm of the undecayed first gradient."""

    decay = "l2"
    momentum, d0, growth_rate = 0.9, 1e-6, math.inf

    def begin(self, thetas):
        self.d, self.numerator, self.unit = self.d0, 0.0, None
        self.s = zeros(thetas)

    def update_all(self, thetas, grads, t):
        if self.unit is None:
            raw = [g - self.wd * theta for g, theta in zip(grads, thetas, strict=True)]
            norm = math.sqrt(dot(raw, raw))
            if norm == 0:
                return thetas
            self.unit = norm
        step = self.d * self.lr / self.unit
        self.numerator += step * dot(grads, self.s)
        self.s = [s + step * g for s, g in zip(self.s, grads, strict=True)]
        estimate = 2 * self.numerator / math.sqrt(dot(self.s, self.s))
        self.d = max(self.d, min(estimate, self.d * self.growth_rate))
        mu = self.momentum
        return [mu * theta + (1 - mu) * (first - s) for theta, first, s in zip(thetas, self.first, self.s, strict=True)]


class DAdaptAdaGrad(Joint):
    """arXiv 2301.07733, algorithm 3, as its authors' code has it."""

    decay = "l2"
    momentum, eps, initial_accumulator_value, d0, growth_rate = 0.0, 0.0, 1e-6, 1e-6, math.inf

    def begin(self, thetas):
        self.d, self.spent = self.d0, 0.0
        self.s = zeros(thetas)
        self.a = [torch.full_like(theta, self.initial_accumulator_value) for theta in thetas]

    def update_all(self, thetas, grads, t):
        step = self.d * self.lr
        self.a = [a + g * g for a, g in zip(self.a, grads, strict=True)]
        roots = [a.sqrt() + self.eps for a in self.a]
        self.spent += step**2 * sum(float((g * g / root).sum()) for g, root in zip(grads, roots, strict=True))
        self.s = [s + step * g for s, g in zip(self.s, grads, strict=True)]
        weighted = sum(float((s * s / root).sum()) for s, root in zip(self.s, roots, strict=True))
        size = sum(float(s.abs().sum()) for s in self.s)
        if size > 0:
            self.d = max(self.d, min((weighted - self.spent) / size, self.d * self.growth_rate))
        mu = self.momentum
        ends = [first - s / root for first, s, root in zip(self.first, self.s, roots, strict=True)]
        return [mu * theta + (1 - mu) * end for theta, end in zip(thetas, ends, strict=True)]


class ADoG(Joint):
    """arXiv 2404.00666, the accelerated DoG of its experiments: distances are measured after w has moved."""

    decay = "l2"
    reps_rel, eps, coefficient = 1e-6, 1e-8, 1.0

    def begin(self, thetas):
        self.r = self.reps_rel * (1 + math.sqrt(dot(thetas, thetas)))
        self.sum_r, self.alpha, self.sum_alpha_r, self.total = self.r, 1.0, self.r, self.eps
        self.w = [theta.clone() for theta in thetas]

    def update_all(self, thetas, grads, t):
        self.total += self.alpha**2 * dot(grads, grads)
        eta = self.lr * self.r / math.sqrt(self.total)
        ys = [theta - eta * g for theta, g in zip(thetas, grads, strict=True)]
        self.w = [w - self.alpha * eta * g for w, g in zip(self.w, grads, strict=True)]
        away = [w - first for w, first in zip(self.w, self.first, strict=True)]
        self.r = max(self.r, math.sqrt(dot(away, away)))
        self.sum_r += self.r
        self.alpha = max(1.0, self.coefficient * self.sum_r / self.r)
        self.sum_alpha_r += self.alpha * self.r
        tau = self.alpha * self.r / self.sum_alpha_r
        return [(1 - tau) * y + tau * w for y, w in zip(ys, self.w, strict=True)]
