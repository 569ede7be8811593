"""Adafactor, algorithms 4-5 of "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235)."""

import torch


def rms(x):
    return (x**2).mean().sqrt()


class Adafactor:
    """One tensor of any shape. lr=None takes the relative step. momentum: beta1 of an average of lr-scaled updates, or None.

    decay_by: "step" multiplies decay by the scaled step alpha, "lr" by lr. beta2_cap: None, or the largest averaging weight.
    """

    def __init__(self, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, momentum=None, weight_decay=0.0,
                 scale_parameter=True, relative_step=True, warmup_init=False, decay_by="step", beta2_cap=None):  # fmt: skip
        self.t = 0
        self.row = self.col = self.v = self.m = 0.0
        self.__dict__.update(lr=lr, eps=eps, d=clip_threshold, decay_rate=decay_rate, beta1=momentum, decay=weight_decay,
                             scale_parameter=scale_parameter, relative=relative_step, warmup=warmup_init,
                             decay_by=decay_by, cap=beta2_cap)  # fmt: skip

    def rho(self):
        if not self.relative:
            return self.lr
        return min(1e-6 * self.t if self.warmup else 1e-2, self.t**-0.5)

    def direction(self, g):
        """g divided by the root of the factored second moment, before clipping."""
        beta2 = 1 - self.t**self.decay_rate
        if self.cap is not None:
            beta2 = min(beta2, self.cap)
        q = g**2 + self.eps[0]
        if g.dim() < 2:
            self.v = beta2 * self.v + (1 - beta2) * q
            return g / self.v.sqrt()
        self.row = beta2 * self.row + (1 - beta2) * q.mean(-1)
        self.col = beta2 * self.col + (1 - beta2) * q.mean(-2)
        total = self.row.mean(-1)[..., None, None]
        return g * (total / (self.row[..., :, None] * self.col[..., None, :])).sqrt()

    def step(self, p, g):
        self.t += 1
        alpha = self.rho() * (max(self.eps[1], float(rms(p))) if self.scale_parameter else 1.0)
        u = self.direction(g)
        u = alpha * u / max(1.0, float(rms(u)) / self.d)
        if self.beta1 is not None:
            u = self.m = self.beta1 * self.m + (1 - self.beta1) * u
        p -= (alpha if self.decay_by == "step" else self.lr) * self.decay * p
        p -= u


class TorchAdafactor:
    """The variant torch.optim ships: rho = min(lr, 1/sqrt(t)); the floor eps[0] is under the mean and its square under V."""

    def __init__(self, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
        self.t = 0
        self.row = self.col = self.v = 0.0
        self.__dict__.update(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, decay=weight_decay)

    def step(self, p, g):
        self.t += 1
        floor = torch.finfo(p.dtype).eps if self.eps[0] is None else self.eps[0]
        keep = 1 - self.t**self.beta2_decay
        alpha = max(self.eps[1], float(rms(p))) * min(self.lr, self.t**-0.5)
        q = g**2
        if g.dim() > 1:
            self.row = keep * self.row + (1 - keep) * q.mean(-1, keepdim=True)
            self.col = keep * self.col + (1 - keep) * q.mean(-2, keepdim=True)
            v = (self.row @ self.col) / self.row.mean(-2, keepdim=True).clamp(min=floor)
        else:
            v = self.v = keep * self.v + (1 - keep) * q
        u = g / v.clamp(min=floor**2).sqrt()
        p *= 1 - self.lr * self.decay
        p -= alpha * u / max(1.0, float(rms(u)) / self.d)
