"""What goes around a step, from its papers' equations: objects that are called before a step, with `after(params, lr)`.

`lr` is given at construction to those that act before the step.
"""

import torch


class Lookahead:
    """arXiv 1907.08610, algorithm 1."""

    def __init__(self, every=5, alpha=0.5):
        self.every, self.alpha, self.slow, self.steps = every, alpha, None, 0

    def __call__(self, params):
        if self.slow is None:
            self.slow = [p.detach().clone() for p in params]

    def after(self, params, lr):
        self.steps += 1
        if self.steps % self.every:
            return
        for p, slow in zip(params, self.slow, strict=True):
            slow += self.alpha * (p.detach() - slow)
            p.data.copy_(slow)


class LAWN:
    def __init__(self, free_steps=0):
        self.free, self.steps, self.norms = free_steps, 0, None

    def __call__(self, params):
        self.bound = self.steps >= self.free
        self.steps += 1
        if not self.bound:
            return
        if self.norms is None:
            self.norms = [torch.linalg.norm(p.detach()) for p in params]
        for p in params:
            w = p.detach().flatten() / torch.linalg.norm(p.detach())
            p.grad = p.grad - (torch.dot(w, p.grad.flatten()) * w).view(p.shape)

    def after(self, params, lr):
        if self.bound:
            for p, norm in zip(params, self.norms, strict=True):
                p.data.mul_(norm / torch.linalg.norm(p.detach()))


class Layca:
    """arXiv 1806.01603: the base step gives the direction only."""

    first = None

    def __call__(self, params):
        self.old = [p.detach().clone() for p in params]
        if self.first is None:
            self.first = [torch.linalg.norm(w) for w in self.old]

    def after(self, params, lr):
        for p, w, norm in zip(params, self.old, self.first, strict=True):
            s = (p.detach() - w).flatten()
            unit = w.flatten() / torch.linalg.norm(w)
            s = s - torch.dot(s, unit) * unit
            s = s / torch.linalg.norm(s) * torch.linalg.norm(w)
            new = w + lr * s.view(w.shape)
            p.data.copy_(new * norm / torch.linalg.norm(new))


class TangentProjection:
    """arXiv 2006.08217, with the order of its authors' code: by channel, else by layer."""

    def __init__(self, weight_decay=0.0, delta=0.1, wd_ratio=0.1, eps=1e-8):
        self.wd, self.delta, self.ratio, self.eps = weight_decay, delta, wd_ratio, eps
        self.seen = {"rows": 0, "whole": 0, "neither": 0}

    def __call__(self, params):
        self.old = [p.detach().clone() for p in params]
        self.kinds = [self.kind(p.detach(), p.grad) for p in params]
        for kind in self.kinds:
            self.seen[kind] += 1

    def kind(self, w, g):
        for kind, rows in (("rows", w.shape[0]), ("whole", 1)) if w.dim() > 1 else ():
            cosine = torch.nn.functional.cosine_similarity(
                w.reshape(rows, -1), g.reshape(rows, -1), dim=1, eps=self.eps
            )
            if float(cosine.abs().max()) < self.delta / (w.numel() / rows) ** 0.5:
                return kind
        return "neither"

    def after(self, params, lr):
        for p, w, kind in zip(params, self.old, self.kinds, strict=True):
            if kind == "neither":
                continue
            rows = w.shape[0] if kind == "rows" else 1
            u = (w * (1 - lr * self.wd) - p.detach()).reshape(rows, -1)
            unit = torch.stack([row / (row.norm() + self.eps) for row in w.reshape(rows, -1)])
            u = u - unit * (unit * u).sum(1, keepdim=True)
            p.data.copy_(w * (1 - lr * self.wd * self.ratio) - u.view(w.shape))


class QuantizationPull:
    def __init__(self, kappa=1.0, silent=0, ramp=1, bits=4):
        self.kappa, self.silent, self.ramp, self.bits, self.steps = kappa, silent, ramp, bits, 0

    def __call__(self, params):
        pass

    def after(self, params, lr):
        self.steps += 1
        kappa = self.kappa * min(1.0, max(0.0, (self.steps - self.silent) / self.ramp))
        levels = 2 ** (self.bits - 1) - 1
        for p in params:
            rows = p.data.flatten(1) if p.dim() > 1 else p.data[None]
            for row in rows:  # views
                step = float(row.abs().max()) / levels
                rounded = torch.tensor([round(float(x) / step) * step for x in row], dtype=p.dtype)
                row -= lr * kappa * (row - rounded)


class NormLoss:
    """arXiv 2103.06583, with the unit norms of Ranger21."""

    def __init__(self, lr, factor=1e-4, eps=1e-8):
        self.lr, self.factor, self.eps = lr, factor, eps

    def __call__(self, params):
        for p in params:
            w = p.data
            norm = w.square().sum().sqrt() if w.dim() < 2 else w.square().sum(tuple(range(1, w.dim())), True).sqrt()
            w.mul_(1 - 2 * self.lr * self.factor * (1 - 1 / (norm + self.eps)))


class StableDecay:
    """arXiv 2011.11152, with an Adam's second moment of its own."""

    def __init__(self, lr, decay=1e-4, beta2=0.999):
        self.lr, self.decay, self.beta2, self.steps, self.v = lr, decay, beta2, 0, None

    def __call__(self, params):
        self.steps += 1
        self.v = self.v or [torch.zeros_like(p).detach() for p in params]
        for v, p in zip(self.v, params, strict=True):
            v.mul_(self.beta2).addcmul_(p.grad, p.grad, value=1 - self.beta2)
        total = sum(float(v.sum()) for v in self.v) / (1 - self.beta2**self.steps)
        sigma = (total / sum(v.numel() for v in self.v)) ** 0.5
        for p in params:
            p.data.mul_(1 - self.lr * self.decay / sigma)


class Cautious:
    """arXiv 2411.16085, algorithm 1, around a base step; count: C-Lion's normaliser, else C-AdamW's. `decay`: lr weight_decay."""

    def __init__(self, decay, count=False):
        self.decay, self.count = decay, count

    def __call__(self, params):
        self.old = [p.detach().clone() for p in params]
        self.grads = [p.grad.clone() for p in params]

    def after(self, params, lr):
        for p, w, g in zip(params, self.old, self.grads, strict=True):
            shrunk = (1 - self.decay) * w
            u = shrunk - p.detach()
            mask = (u * g > 0).to(u.dtype)
            mask = mask * (mask.numel() / (mask.sum() + 1)) if self.count else mask / mask.mean().clamp(min=1e-3)
            p.data.copy_(shrunk - u * mask)


class GradientGrouping:
    """arXiv 2506.01049 after its code; Lloyd's algorithm, every element to the nearest centre. momenta(i): of parameter i."""

    def __init__(self, decay, momenta, clusters=3, every=500, beta_c=0.999, beta_s=0.999, low=0.1, high=10.0, eps=1e-8):
        self.__dict__.update(vars(), t=0, means={}, scales={}, cluster={})

    def __call__(self, params):
        self.old = [p.detach().clone() for p in params]
        self.t += 1

    def regroup(self, i, m):
        values = sorted(m.abs().flatten().tolist())
        n, k = len(values), self.clusters
        centres = [values[(2 * j + 1) * (n - 1) // (2 * k)] for j in range(k)]
        for _ in range(10):
            nearest = [min(range(k), key=lambda j: (abs(x - centres[j]), j)) for x in values]
            for j in range(k):
                mine = [x for x, c in zip(values, nearest, strict=True) if c == j]
                if mine:
                    centres[j] = sum(mine) / len(mine)
        distances = (m.abs().unsqueeze(-1) - torch.tensor(centres, dtype=m.dtype)).abs()
        self.cluster[i] = distances.argmin(-1)
        a = m.abs().mean()
        for j in range(k):
            held = m.abs()[self.cluster[i] == j]
            mean = held.mean() if held.numel() else a
            self.means[i][j] = self.beta_c * self.means[i][j] + (1 - self.beta_c) * mean
            raw = a / max(self.means[i][j], self.eps)
            self.scales[i][j] = min(max(self.beta_s * self.scales[i][j] + (1 - self.beta_s) * raw, self.low), self.high)

    def after(self, params, lr):
        for i, (p, w) in enumerate(zip(params, self.old, strict=True)):
            if i not in self.scales:
                self.means[i], self.scales[i] = [1.0] * self.clusters, [1.0] * self.clusters
                self.cluster[i] = torch.zeros(p.shape, dtype=torch.long)
            if self.t % self.every == 0:
                self.regroup(i, self.momenta(i))
            shrunk = (1 - self.decay) * w
            scales = torch.tensor([float(s) for s in self.scales[i]], dtype=p.dtype)
            p.data.copy_(shrunk + (p.detach() - shrunk) * scales[self.cluster[i]])
