"""GaLore(method="svd") against galore-torch's GaLoreAdamW: whole trainings in fp32, refreshes and unprojected tensors included."""

import math

import pytest
import torch
from oracles.packages import galore_torch

import fusedopt
from fusedopt.cli.gpt import GPT

STEPS, EVERY, SCALE = 24, 7, 0.25  # refreshes at steps 1, 8, 15, 22
BETAS = (0.9, 0.95)


class MLP(torch.nn.Module):
    """Matrices that are projected on the right, on the left and, for rank 4, not at all; biases."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
        )

    def projected(self):
        return [self.layers[0].weight, self.layers[2].weight]

    def loss(self, step: int) -> torch.Tensor:
        gen = torch.Generator().manual_seed(step)
        x = torch.randn(64, 20, generator=gen)
        return (self.layers(x) - x[:, :4] * x[:, 4:8]).square().mean()


class Tiny(GPT):
    """The demo's model, on a text that repeats itself."""

    def __init__(self):
        super().__init__(width=32, layers=2, heads=2, context=16)

    def projected(self):
        return [p for p in self.blocks.parameters() if p.dim() == 2]

    def loss(self, step: int) -> torch.Tensor:
        starts = torch.randint(40, (16, 1), generator=torch.Generator().manual_seed(step))
        text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 3), dtype=torch.uint8)
        return super().loss(text[starts + torch.arange(17)].long())


def pair(cls, rank: int, lr: float, eps: float, decay: float = 0.0, **options):
    """((model, optimizer) of galore-torch, those of fusedopt) from the same weights."""
    made = []
    for theirs in (True, False):
        torch.manual_seed(0)
        model = cls()
        chosen = {id(p) for p in model.projected()}
        matrices = [p for p in model.parameters() if id(p) in chosen]
        rest = [p for p in model.parameters() if id(p) not in chosen]
        shared = {"lr": lr, "betas": BETAS, "eps": eps, "weight_decay": decay}
        if theirs:
            settings = {"rank": rank, "update_proj_gap": EVERY, "scale": SCALE, "proj_type": "std"}
            groups = [{"params": matrices, **settings}, {"params": rest}]
            opt = galore_torch().GaLoreAdamW(groups, no_deprecation_warning=True, **shared)
        else:
            projection = fusedopt.GaLore(rank, EVERY, SCALE, method="svd", stagger=False)
            groups = [{"params": matrices}, {"params": rest, "projection": None}]
            opt = fusedopt.AdamW(groups, projection=projection, **shared, **options)
        made.append((model, opt))
    return made


def set_eps(opt, eps: float, step: int) -> None:
    """galore-torch's denominator is sqrt(v) + eps without bias correction: AdamW's with this eps in this step."""
    for group in opt.param_groups:
        group["eps"] = eps / math.sqrt(1 - BETAS[1] ** step)


def advance(model, opt, step: int) -> float:
    loss = model.loss(step)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def largest(a: list, b: list) -> float:
    """The largest difference of two lists of tensors."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@pytest.mark.parametrize(("cls", "rank"), [(MLP, 4), (Tiny, 8)], ids=["mlp", "gpt"])
def test_training_follows_galore_torch(cls, rank, eps, backend):
    """Each trains a model of its own. Measured: 1e-6 of the way that the weights have gone, 8e-6 in the first steps."""
    (theirs, their_opt), (mine, my_opt) = pair(cls, rank, 0.01, eps, backend=backend)
    start, losses, bases = weights(mine), [], []
    for step in range(1, STEPS + 1):
        set_eps(my_opt, eps, step)
        losses.append((advance(theirs, their_opt, step), advance(mine, my_opt, step)))
        assert losses[-1][1] == pytest.approx(losses[-1][0], rel=2e-6)
        assert largest(weights(theirs), weights(mine)) < 2e-5 * largest(weights(mine), start)
        bases.append(my_opt.state[mine.projected()[0]]["projector"].clone())
    assert losses[-1][1] < 0.9 * losses[0][1]
    changes = [step for step in range(2, STEPS + 1) if not torch.equal(bases[step - 1], bases[step - 2])]
    assert changes == [8, 15, 22]
    for p, q in zip(theirs.projected(), mine.projected(), strict=True):
        torch.testing.assert_close(
            my_opt.state[q]["projector"], their_opt.state[p]["projector"].ortho_matrix, rtol=0, atol=1e-4
        )
        for name in ("exp_avg", "exp_avg_sq"):
            assert largest([my_opt.state[q][name]], [their_opt.state[p][name]]) < 1e-4 * their_opt.state[p][name].max()


def test_decay_comes_before_the_update_here_and_after_it_there():
    """One step from the same weights and gradients: p (1 - d) - u against (p - u) (1 - d), with d = lr weight_decay."""
    lr, decay = 0.05, 0.4
    (theirs, their_opt), (mine, my_opt) = pair(MLP, 4, lr, 1e-12, decay)
    for step in range(1, 2 * EVERY):
        with torch.no_grad():
            for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
                q.copy_(p)
        before = weights(mine)
        advance(theirs, their_opt, step)
        advance(mine, my_opt, step)
        for p, q, old in zip(theirs.parameters(), mine.parameters(), before, strict=True):
            update = old * (1 - lr * decay) - q.detach()
            assert largest([p], [q]) > 1e-3 * lr * decay * float(update.abs().max())
            torch.testing.assert_close(p.detach(), q.detach() + lr * decay * update, rtol=0, atol=1e-6)


def test_training_with_decay_stays_near_galore_torch():
    """Whole trainings come apart by at most lr^2 weight_decay a step, under 0.1 % of the way. Of a model and eps with which small
    differences stay small: the demo's, whose refreshes meet singular values close to each other, is 3 % apart after one."""
    lr, decay, eps = 0.01, 0.1, 1e-2
    (theirs, their_opt), (mine, my_opt) = pair(MLP, 4, lr, eps, decay)
    start = weights(mine)
    for step in range(1, STEPS + 1):
        set_eps(my_opt, eps, step)
        losses = advance(theirs, their_opt, step), advance(mine, my_opt, step)
        apart = largest(weights(theirs), weights(mine))
        assert 1e-3 * lr * lr * decay < apart < step * lr * lr * decay
    assert apart < 1e-3 * largest(weights(mine), start)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
