"""LoRA-Pro and LoFT in fp64 with everything of full size: least squares over all entries at once, and loops over columns."""

import torch


def product_operator(a, b, s):
    """The matrix of (t_A, t_B) -> s (B t_A + t_B A), from row-major factors to a row-major product."""
    r, n = a.shape
    m = b.shape[0]
    columns = []
    for i in range(r * n + m * r):
        unit = torch.zeros(r * n + m * r, dtype=torch.float64)
        unit[i] = 1
        ta, tb = unit[: r * n].view(r, n), unit[r * n :].view(m, r)
        columns.append((s * (b @ ta + tb @ a)).flatten())
    return torch.stack(columns, 1)


def lora_pro(a, b, s, full):
    """Of all factor gradients whose product is nearest to `full`, those nearest to LoRA's own."""
    operator = product_operator(a, b, s)
    own = torch.cat([(s * b.t() @ full).flatten(), (s * full @ a.t()).flatten()])
    t = own + torch.linalg.pinv(operator, rtol=1e-12) @ (full.flatten() - operator @ own)
    return t[: a.numel()].view(a.shape), t[a.numel() :].view(b.shape)


class LoraProAdam:
    """Of one pair, from the full gradient of each step."""

    def __init__(self, s, lr, betas, eps, decay):
        self.s, self.lr, self.betas, self.eps, self.decay = s, lr, betas, eps, decay
        self.m = self.v = self.t = 0

    def step(self, a, b, full):
        self.t += 1
        ta, tb = lora_pro(a, b, self.s, full)
        seen = self.s * (b @ ta + tb @ a)
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * seen
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * seen**2
        debiased = (self.v / (1 - self.betas[1] ** self.t)).sqrt()
        ta, tb = lora_pro(a, b, self.s, self.m / (1 - self.betas[0] ** self.t) / (debiased + self.eps))
        shrink = 1 - self.lr * self.decay
        return shrink * a - self.lr * ta, shrink * b - self.lr * tb


class LoftFactor:
    """One factor x [columns][r] beside the other one, o [rows, r]; all of it column by column."""

    def __init__(self, betas, eps, damping, transposed):
        self.betas, self.eps, self.damping, self.transposed = betas, eps, damping, transposed
        self.old, self.t = None, 0

    def follow(self, o, grads):
        """Takes the gradients of all columns, already divided by s."""
        self.t += 1
        r = o.shape[1]
        if self.old is None:
            self.m = [torch.zeros(r, dtype=torch.float64) for _ in grads]
            self.p = [torch.zeros(r, r, dtype=torch.float64) for _ in grads]
            self.old = o
        self.c = torch.linalg.inv(o.t() @ o + self.damping * torch.eye(r, dtype=torch.float64))
        turn = self.c @ (o.t() @ self.old)
        for j, g in enumerate(grads):
            g = self.c @ g
            around = turn.t() @ self.p[j] @ turn if self.transposed else turn @ self.p[j] @ turn.t()
            self.m[j] = self.betas[0] * (turn @ self.m[j]) + (1 - self.betas[0]) * g
            self.p[j] = self.betas[1] * around + (1 - self.betas[1]) * torch.outer(g, g)
        self.old = o.clone()

    def step(self, o):
        """Of each column, what lr is multiplied by."""
        out = []
        for m, p in zip(self.m, self.p, strict=True):
            v = torch.stack([row @ p @ row for row in o]).clamp(min=0) / (1 - self.betas[1] ** self.t)
            u = (o @ m) / (v.sqrt() + self.eps) / (1 - self.betas[0] ** self.t)
            out.append(self.c @ (o.t() @ u))
        return out


class Loft:
    """Of one pair."""

    def __init__(self, s, lr, betas, eps, decay, alternate=True, transposed=False, damping=(1e-6, 1e-8)):
        self.s, self.lr, self.decay, self.alternate = s, lr, decay, alternate
        self.a, self.b = (LoftFactor(betas, eps, d, transposed) for d in damping)
        self.calls = 0

    def step(self, a, b, grad_a, grad_b):
        self.calls += 1
        self.a.follow(b, [g / self.s for g in grad_a.t()])
        self.b.follow(a.t(), [g / self.s for g in grad_b])
        new_a, new_b = a, b
        if not self.alternate or self.calls % 2 == 0:
            new_a = (1 - self.decay) * a - self.lr / self.s * torch.stack(self.a.step(b), 1)
        if not self.alternate or self.calls % 2 == 1:
            new_b = (1 - self.decay) * b - self.lr / self.s * torch.stack(self.b.step(a.t()))
        return new_a, new_b
