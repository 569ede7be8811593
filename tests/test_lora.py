"""Finding LoRA pairs, LoRA+ groups, LoRA-One's start, and what they refuse."""

import copy
import subprocess
import sys

import pytest
import torch
from configs import assert_same_bits
from lora_models import Adapted, backward, factors, full_gradients, model
from torch import nn
from trainer_data import one_thread  # noqa: F401

import fusedopt

# Pairs


class Plain(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_plain_modules():
    a, b = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(5, 3))
    down, up = nn.Linear(7, 2, bias=False), nn.Linear(2, 5, bias=False)
    net = nn.ModuleDict({
        "one": Plain(lora_A=a, lora_B=b, scaling=2.5),
        "two": Plain(lora_down=down, lora_up=up, alpha=torch.tensor(8.0)),
        "three": Plain(lora_A=nn.Linear(7, 4), lora_B=nn.Linear(4, 5), lora_alpha=2),
        "four": Plain(lora_A=nn.Linear(7, 4), lora_B=nn.Linear(4, 5)),
        "none": Plain(lora_A=None, lora_B=None),
    })  # fmt: skip
    pairs = fusedopt.lora_pairs(net)
    assert [(p.name, p.scale, p.rank, p.shape) for p in pairs] == [
        ("one", 2.5, 3, (5, 7)),
        ("two", 4.0, 2, (5, 7)),
        ("three", 0.5, 4, (5, 7)),
        ("four", 1.0, 4, (5, 7)),
    ]
    assert pairs[0].A is a and pairs[0].B is b and pairs[1].A is down.weight and pairs[1].B is up.weight
    assert [p.name for p in fusedopt.lora_pairs(net, filter=lambda name: "t" in name)] == ["two", "three"]


def test_refused_pairs():
    linear = {"lora_A": nn.Linear(7, 3), "lora_B": nn.Linear(3, 5)}
    with pytest.raises(ValueError, match="no pairs of LoRA factors"):
        fusedopt.lora_pairs(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        fusedopt.lora_pairs([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match=r"'conv'.*convolution.*filter="):
        fusedopt.lora_pairs(nn.ModuleDict({"conv": Plain(lora_A=nn.Conv2d(4, 2, 3), lora_B=nn.Conv2d(2, 8, 1))}))
    with pytest.raises(ValueError, match=r"look transposed: A is \[r, n\]"):
        fusedopt.lora_pairs(Plain(lora_A=nn.Parameter(torch.ones(7, 3)), lora_B=nn.Parameter(torch.ones(3, 5))))
    with pytest.raises(ValueError, match=r"'one' and 'two' share a factor"):
        fusedopt.lora_pairs(nn.ModuleDict({"one": Plain(**linear), "two": Plain(**linear)}))
    with pytest.raises(ValueError, match="AdaLoRA is no product"):
        fusedopt.lora_pairs(Plain(**linear, lora_E=nn.Parameter(torch.ones(3, 1))))
    with pytest.raises(ValueError, match="several experts is no product"):
        fusedopt.lora_pairs(Plain(**linear, num_experts=2))
    with pytest.raises(ValueError, match="invalid scale 0.0"):
        fusedopt.lora_pairs(Plain(**linear, scaling=0.0))
    with pytest.raises(ValueError, match="lora_B is a float"):
        fusedopt.lora_pairs(Plain(lora_A=nn.Linear(7, 3), lora_B=1.0))


def test_importing_needs_no_peft():
    code = "import sys; sys.modules['peft'] = None; import fusedopt; fusedopt.lora_pairs; print(sys.modules['peft'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "None"


# LoRA+


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_lora_plus_rates(name):
    """The steps are those of one optimizer for each rate; embeddings and others have theirs."""
    net = nn.ModuleDict({"adapted": model(torch.float32, zero=False)})
    table = Plain(lora_embedding_A=nn.Parameter(torch.randn(2, 11)), lora_embedding_B=nn.Parameter(torch.randn(6, 2)))
    net["table"] = table
    groups = fusedopt.lora_plus_groups(net, 1e-3, 4.0, other_lr=5e-3, embedding_lr=1e-6)
    rate = {n: g["lr"] for g in groups for n, _ in g["params"]}
    assert rate == {
        n: 1e-6 if "embedding" in n else 1e-3 if "lora_A" in n else 4e-3 if "lora_B" in n else 5e-3
        for n, p in net.named_parameters() if p.requires_grad
    }  # fmt: skip
    other = copy.deepcopy(net)
    opt = fusedopt.create(name, groups)
    singles = [fusedopt.create(name, [p], lr=rate[n]) for n, p in other.named_parameters() if p.requires_grad]
    for step in range(3):
        for m in (net, other):
            backward(m["adapted"], step)
            for p in m["table"].parameters():
                p.grad = p.detach().sin()
        opt.step()
        for single in singles:
            single.step()
    assert_same_bits([p.detach() for p in net.parameters()], [p.detach() for p in other.parameters()])


def test_lora_plus_groups_of_pairs_and_decay():
    net = model()
    pairs = fusedopt.lora_pairs(net)
    a, b = fusedopt.lora_plus_groups(pairs, 1e-3)
    assert (a["lr"], b["lr"]) == (1e-3, 16e-3) and "weight_decay" not in a
    assert all(x is p.A for x, p in zip(a["params"], pairs, strict=True))
    assert all(x is p.B for x, p in zip(b["params"], pairs, strict=True))
    groups = fusedopt.lora_plus_groups(net, 1e-3, weight_decay=0.1)
    assert {n: g["weight_decay"] for g in groups for n, _ in g["params"] if n.startswith("5.")} == {
        "5.weight": 0.1,
        "5.bias": 0.0,
    }
    for bad in ({"ratio": 0.0}, {"other_lr": -1.0}, {"embedding_lr": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            fusedopt.lora_plus_groups(net, 1e-3, **bad)
    with pytest.raises(TypeError, match="expected a module or LoraPairs"):
        fusedopt.lora_plus_groups([{"params": []}], 1e-3)
    with pytest.raises(ValueError, match="there are no LoRA pairs"):
        fusedopt.lora_plus_groups([], 1e-3)
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        fusedopt.lora_plus_groups(net, 1e-3)


# LoRA-One's start


def test_lora_one_start():
    """Two exact decompositions and a randomised one of a gradient that decays fast; an embedding's is transposed."""
    torch.manual_seed(0)
    net = nn.ModuleList([Adapted(9, 8, 3, 3.0, True, torch.float64), Adapted(70, 60, 2, 3.0, True, torch.float64)])
    net.append(
        Plain(lora_embedding_A=nn.Parameter(torch.zeros(2, 7)), lora_embedding_B=nn.Parameter(torch.zeros(5, 2)))
    )
    pairs = fusedopt.lora_pairs(net)
    decaying = (
        torch.randn(60, 70).double() @ torch.diag(0.3 ** torch.arange(70)).double() @ torch.randn(70, 70).double()
    )
    grads = [torch.randn(8, 9, dtype=torch.float64), decaying, torch.randn(7, 5)]
    state = torch.get_rng_state()
    fusedopt.lora_one_init_(pairs, grads, gamma=16.0)
    assert torch.equal(state, torch.get_rng_state())
    for pair, g in zip(pairs, grads, strict=True):
        g = g.double().t() if pair.transposed else g.double()
        u, s, vh = torch.linalg.svd(-g)
        best = u[:, : pair.rank] @ torch.diag(s[: pair.rank]) @ vh[: pair.rank]
        torch.testing.assert_close((pair.B @ pair.A).double() * 16 * s[0], best, rtol=1e-4, atol=1e-4 * float(s[0]))
        torch.testing.assert_close(pair.B.t() @ pair.B, pair.A @ pair.A.t(), rtol=1e-4, atol=1e-6)


def test_lora_one_start_refuses():
    net = model()
    pairs = fusedopt.lora_pairs(net)
    before, good = factors(net), full_gradients(net, 0)
    wrong = {
        "2 gradients": good[:2],
        r"gradient of '2' is \(8, 7\), not \(7, 8\)": [good[0], good[1].t(), good[2]],
        "'4' is zero or not finite": [*good[:2], torch.zeros_like(good[2])],
        "'0' is zero or not finite": [good[0] * float("nan"), *good[1:]],
    }
    for match, grads in wrong.items():
        with pytest.raises(ValueError, match=match):
            fusedopt.lora_one_init_(pairs, grads)
    with pytest.raises(ValueError, match="Invalid gamma"):
        fusedopt.lora_one_init_(pairs, good, gamma=0.0)
    assert all(
        torch.equal(x, y) for p, q in zip(before, factors(net), strict=True) for x, y in zip(p[:2], q[:2], strict=True)
    )
