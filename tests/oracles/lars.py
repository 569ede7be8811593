"""LARS of "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), learning rate outside the velocity."""

import torch


class LARS:
    """One parameter group, any floating dtype, no bells: written for reading, one formula a line."""

    def __init__(self, params, lr, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False,
                 trust_coefficient=1e-3, eps=1e-8, trust_clip=False, always_adapt=False, maximize=False):  # fmt: skip
        self.params = list(params)
        self.velocity = {}
        self.__dict__.update(
            lr=lr, mu=momentum, delta=dampening, decay=weight_decay, nesterov=nesterov, tau=trust_coefficient,
            eps=eps, trust_clip=trust_clip, always_adapt=always_adapt, sign=-1 if maximize else 1,
        )  # fmt: skip

    @torch.no_grad()
    def step(self):
        for p in self.params:
            g = self.sign * p.grad
            if self.decay != 0 or self.always_adapt:
                p_norm, g_norm = p.norm(), g.norm()
                q = self.tau * p_norm / (g_norm + self.decay * p_norm + self.eps)
                if p_norm == 0 or g_norm == 0:
                    q = torch.ones_like(q)
                if self.trust_clip:
                    q = torch.clamp(q / self.lr, max=1.0)
                g = (g + self.decay * p) * q
            if self.mu == 0:
                p -= self.lr * g
                continue
            if p not in self.velocity:
                b = self.velocity[p] = g.clone()
            else:
                b = self.velocity[p]
                b.mul_(self.mu).add_((1 - self.delta) * g)
            p -= self.lr * (g + self.mu * b if self.nesterov else b)
