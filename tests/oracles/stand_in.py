"""The loss of tests that step every class alike, for rules that read one: a number that follows from the parameters."""

import torch


def stand_in_loss(params) -> float:
    means = [float(p.detach().double().square().mean()) for p in params if p.numel()]
    return 0.3 + 0.2 * float(torch.tensor(means, dtype=torch.float64).mean())
