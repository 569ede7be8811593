"""Installed packages as oracles, under the names of our options."""

import lion_pytorch
import pytorch_optimizer
import torch

from oracles.adafactor import Adafactor as TensorAdafactor
from oracles.stand_in import stand_in_hessian


def lion(params, **options):
    return lion_pytorch.Lion(params, **options)


def either(plain, cautious):
    """The oracle of a class whose updates may be masked."""

    def make(params, **options):
        return (cautious if options.get("cautious") else plain)(params, **options)

    return make


class adafactor:
    """The transcription of one tensor, over several."""

    def __init__(self, params, beta1=None, maximize=False, **options):
        self.params, self.sign = params, -1 if maximize else 1
        self.each = [TensorAdafactor(momentum=beta1, **options) for _ in params]

    @torch.no_grad()
    def step(self):
        for p, one in zip(self.params, self.each, strict=True):
            one.step(p, self.sign * p.grad)


def package(name: str, **fixed):
    """A class of pytorch_optimizer with options under our names."""

    def make(params, maximize=False, decoupled_weight_decay=True, amsgrad=False, **options):
        names = {"beta3": None, "amsgrad": "ams_bound"}
        if "beta3" in options:
            options["betas"] = (*options["betas"], options.pop("beta3"))
        if amsgrad:
            options[names["amsgrad"]] = True
        extra = {"weight_decouple": decoupled_weight_decay, "maximize": maximize, "foreach": False, **fixed}
        return getattr(pytorch_optimizer, name)(params, **options, **extra)

    return make


class NAdam(torch.optim.NAdam):
    """torch keeps the product of mu in the default dtype."""

    def step(self):
        torch.set_default_dtype(torch.float64)
        try:
            super().step()
        finally:
            torch.set_default_dtype(torch.float32)


class AdaHessian(pytorch_optimizer.AdaHessian):
    """With the diagonal of the tests, averaged as the paper's section 3.2 has it."""

    def __init__(self, params, spatial_averaging=True, **options):
        super().__init__(params, foreach=False, **options)
        self.averages = spatial_averaging

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        given = [stand_in_hessian(p).abs() for p in params]
        if self.averages:
            given = [d.mean((2, 3), keepdim=True).expand_as(d) if d.dim() == 4 else d for d in given]
        super().step(hessian=given)


class gravity(pytorch_optimizer.Gravity):
    """The package divides by the largest gradient, with 0 / 0 where all are 0, and has no weight decay."""

    def __init__(self, params, weight_decay=0.0, **options):
        super().__init__(params, foreach=False, **options)
        self.weight_decay = weight_decay

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad + (-1 if self.maximize else 1) * self.weight_decay * p.detach()
                if not p.grad.any():
                    p.grad[(0,) * p.dim()] = 1e-300
        super().step()
