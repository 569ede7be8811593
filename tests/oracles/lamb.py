"""LAMB, algorithm 2 of "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962)."""

import torch


class LAMB:
    """One parameter group, any dtype. max_norm: of the global gradient; clip_eps: added to the measured norm."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_norm=1.0, bias_correction=True,
                 grad_averaging=True, trust_clip=False, always_adapt=False, maximize=False, clip_eps=0.0):  # fmt: skip
        self.params = list(params)
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t = 0
        self.__dict__.update(
            lr=lr, betas=betas, eps=eps, decay=weight_decay, max_norm=max_norm, bias_correction=bias_correction,
            grad_averaging=grad_averaging, trust_clip=trust_clip, always_adapt=always_adapt,
            sign=-1 if maximize else 1, clip_eps=clip_eps,
        )  # fmt: skip

    @torch.no_grad()
    def step(self):
        self.t += 1
        beta1, beta2 = self.betas
        total = sum((p.grad**2).sum() for p in self.params).sqrt() + self.clip_eps
        shrink = 1.0 if self.max_norm is None else max(1.0, float(total) / self.max_norm)
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            g = self.sign * p.grad / shrink
            m.copy_(beta1 * m + ((1 - beta1) if self.grad_averaging else 1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g**2)
            correct1 = 1 - beta1**self.t if self.bias_correction else 1
            correct2 = 1 - beta2**self.t if self.bias_correction else 1
            u = (m / correct1) / ((v / correct2).sqrt() + self.eps) + self.decay * p
            ratio = 1.0
            if self.decay != 0 or self.always_adapt:
                p_norm, u_norm = p.norm(), u.norm()
                ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
                if self.trust_clip:
                    ratio = min(ratio, 1.0)
            p -= self.lr * ratio * u
