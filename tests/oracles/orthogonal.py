"""Rules that step along orthogonal factors, transcribed from their papers: Newton-Schulz acts on singular values alone."""

import torch

from oracles.elementwise import Muon, Transcription, ema
from oracles.reductions import Joint

QUINTIC = (3.4445, -4.7750, 2.0315)


def factor(u, coefficients, steps, eps):
    """U p(S) V^T of a tensor as a matrix of its first dimension against the others, S divided by the norm at first."""
    matrix = u.reshape(u.shape[0], -1)
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    s = s / max(float(matrix.norm()), eps)
    for _ in range(steps):
        s = sum(c * s**k for c, k in zip(coefficients, (1, 3, 5), strict=True))
    return (left * s @ right).view(u.shape)


def scale(shape, adjust):
    rows = shape[0]
    cols = shape.numel() / rows
    return {
        None: max(1.0, rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
        "rms_to_rms": (rows / cols) ** 0.5,
        "none": 1.0,
    }[adjust]


class OrAdam(Transcription):
    """Matrices by `matrix`, others by AdamW."""

    ns_coefficients, ns_steps, adjust_lr_fn = QUINTIC, 5, None
    adam_lr, adam_betas, adam_eps, adam_weight_decay = None, (0.9, 0.95), 1e-8, None

    def decays(self):
        return False

    def update(self, theta, g, t, state):
        if theta.dim() > 1:
            return (1 - self.lr * self.wd) * theta - self.lr * self.matrix(g, t, state)
        lr, (b1, b2) = self.adam_lr or self.lr, self.adam_betas
        decay = self.wd if self.adam_weight_decay is None else self.adam_weight_decay
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        return (1 - lr * decay) * theta - lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.adam_eps)

    def orthogonal(self, u, eps):
        return factor(u, self.ns_coefficients, self.ns_steps, eps)


class AdaMuon(OrAdam):
    """arXiv 2507.11005, algorithm 1; sign_stabilised=False with beta2 and debias is its first version."""

    momentum, nesterov, eps, beta2, sign_stabilised, debias, ns_eps = 0.95, True, 1e-8, None, True, False, 1e-7

    def matrix(self, g, t, state):
        mu, beta2 = self.momentum, self.momentum if self.beta2 is None else self.beta2
        b = ema(state, "b", g, mu)
        u = (1 - mu) * g + mu * b if self.nesterov else b
        o = self.orthogonal(torch.sign(u) if self.sign_stabilised else u, self.ns_eps)
        v = ema(state, "v", o * o, beta2)
        w = o / ((v / (1 - beta2**t) if self.debias else v).sqrt() + self.eps)
        return 0.2 * w.numel() ** 0.5 * w / (w.norm() + self.eps)


class MARSShampoo(OrAdam):
    """arXiv 2411.10438, algorithm 4, approximate."""

    betas, gamma, eps, adam_weight_decay = (0.95, 0.99), 0.025, 1e-8, 0.1

    def matrix(self, g, t, state):
        b1 = self.betas[0]
        c = g + self.gamma * b1 / (1 - b1) * (g - state.get("g", torch.zeros_like(g)))
        state["g"] = g
        if c.norm() > 1:
            c = c / c.norm()
        m = ema(state, "m", c, b1)
        return scale(g.shape, self.adjust_lr_fn) * self.orthogonal(m / (1 - b1), self.eps)


class TrustRegion(Joint):
    """arXiv 2503.12645, algorithm 1, for the balls of four norms."""

    momentum, fixed_decay, ball, scope, other_lr, eps = 0.95, False, None, "tensor", 1e-3, 1e-7
    ns_coefficients, ns_steps, adjust_lr_fn, noise_rates = QUINTIC, 5, "none", None

    def begin(self, thetas):
        self.m, self.last, self.noise = ([torch.zeros_like(x) for x in thetas] for _ in range(3))

    def ball_of(self, theta):
        return self.ball or ("spectral" if theta.dim() > 1 else "rms")

    def direction(self, m, everything):
        ball = self.ball_of(m)
        if ball == "spectral":
            return scale(m.shape, self.adjust_lr_fn) * factor(m, self.ns_coefficients, self.ns_steps, self.eps)
        if ball == "linf":
            return torch.sign(m)
        norm = everything if self.scope == "optimizer" else m.norm()
        return m * (m.numel() ** 0.5 if ball == "rms" else 1.0) / max(float(norm), self.eps)

    def dual_norm(self, x):
        """Of the ball that `direction` goes to the edge of; of a matrix as the iteration has it, <X, U p(S) V^T>."""
        ball = self.ball_of(x)
        if ball == "spectral":
            return float((x * factor(x, self.ns_coefficients, self.ns_steps, self.eps)).sum()) * scale(
                x.shape, self.adjust_lr_fn
            )
        if ball == "linf":
            return float(x.abs().sum())
        return float(x.norm()) * (x.numel() ** 0.5 if ball == "rms" else 1.0)

    def rates(self, grads, t):
        if self.noise_rates is None:
            return [1.0] * len(grads)
        alpha, beta2 = self.noise_rates
        for i, (g, last) in enumerate(zip(grads, self.last, strict=True)):
            if t > 1:
                self.noise[i] = beta2 * self.noise[i] + (1 - beta2) * self.dual_norm(g - last) ** 2
        self.last = grads
        a = [alpha / (alpha**2 + float(h.max() if h.dim() else h)) ** 0.5 for h in map(torch.as_tensor, self.noise)]
        balls = [self.ball_of(g) for g in grads]
        return [(x / max(y for y, other in zip(a, balls, strict=True) if other == ball)) ** 0.5
                for x, ball in zip(a, balls, strict=True)]  # fmt: skip

    def update_all(self, thetas, grads, t):
        mu = self.momentum
        self.m = [mu * m + (1 - mu) * g for m, g in zip(self.m, grads, strict=True)]
        everything = sum(float(m.square().sum()) for m in self.m) ** 0.5
        out = []
        for theta, m, rate in zip(thetas, self.m, self.rates(grads, t), strict=True):
            own = self.ball or self.other_lr is None or self.ball_of(theta) == "spectral"
            lr = self.lr if own else self.other_lr
            shrink = self.wd if self.fixed_decay else lr * self.wd
            out.append((1 - shrink) * theta - lr * rate * self.direction(m, everything))
        return out


class LANTON(TrustRegion):
    """Noise-adaptive layerwise rates, option I."""

    def __init__(self, params, lr, alpha=0.02, beta2=0.9, adjust_lr_fn="rms_to_rms", **options):
        super().__init__(params, lr, noise_rates=(alpha, beta2), adjust_lr_fn=adjust_lr_fn, **options)


# By name of the class: its oracle and the options under which they are compared.
CASES = {
    "muon": (
        Muon,
        [
            {"lr": 0.02, "weight_decay": decay, "adam_lr": 0.01, **more}
            for decay in (0.0, 0.1)
            for more in (
                {},
                {"nesterov": False, "maximize": True},
                {"momentum": 0.8, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
                {"ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "none", "adam_eps": 1e-3, "eps": 10.0},
            )
        ],
    ),
    "adamuon": (
        AdaMuon,
        [
            {"lr": 0.02, "adam_lr": 0.01, **more}
            for more in (
                {"weight_decay": 0.1},
                {"weight_decay": 0.0, "nesterov": False, "maximize": True},
                {"sign_stabilised": False, "beta2": 0.9, "debias": True, "weight_decay": 0.1, "momentum": 0.8},
                {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-2, "weight_decay": 0.1, "ns_eps": 10.0},
            )
        ],
    ),
    "mars_shampoo": (
        MARSShampoo,
        [
            {"lr": 0.02, "adam_lr": 0.01, **more}
            for more in (
                {"weight_decay": 0.1},
                {"gamma": 0.2, "betas": (0.8, 0.9), "maximize": True, "adam_weight_decay": 0.0},
                {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 10.0, "adjust_lr_fn": "none"},
            )
        ],
    ),
    "trust_region": (
        TrustRegion,
        [
            {"lr": 0.02, **more}
            for more in (
                {"ball": "linf", "weight_decay": 0.1},
                {"ball": "l2", "weight_decay": 0.1},
                {"ball": "l2", "scope": "optimizer", "weight_decay": 0.1, "eps": 10.0},
                {"ball": "rms", "weight_decay": 0.1, "maximize": True, "fixed_decay": True},
                {"ball": "l2", "noise_rates": (0.3, 0.8), "weight_decay": 0.1},
                {"ball": "linf", "noise_rates": (3.0, 0.5), "weight_decay": 0.1, "maximize": True},
                {"weight_decay": 0.1},
                {"weight_decay": 0.01, "fixed_decay": True, "maximize": True, "other_lr": 0.005},
                {"adjust_lr_fn": None, "momentum": 0.8, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3},
            )
        ],
    ),
    "lanton": (
        LANTON,
        [
            {"lr": 0.02, **more}
            for more in (
                {"weight_decay": 0.1},
                {"alpha": 5.0, "beta2": 0.5, "maximize": True, "adjust_lr_fn": "none"},
                {"ball": "linf", "alpha": 1.0, "weight_decay": 0.1},
            )
        ],
    ),
}
