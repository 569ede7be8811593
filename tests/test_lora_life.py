"""What all that steps LoRA pairs shares: resuming, copies, overflow, maximize, graphs of torch.compile, refusals."""

import copy
import io
import pickle

import pytest
import torch
from configs import assert_same_bits
from lora_models import backward, model
from torch import nn
from trainer_data import one_thread  # noqa: F401

import fusedopt

MAKERS = {
    "lora_pro": lambda net, **o: fusedopt.AdamW(net.parameters(), gradient_transforms=[fusedopt.LoRAPro(net)], **o),
    "lora_one": lambda net, **o: fusedopt.AdamW(net.parameters(), gradient_transforms=[fusedopt.LoRAOne(net)], **o),
    "lora_pro_adamw": lambda net, **o: fusedopt.LoRAProAdamW(net, **o),
    "loft": lambda net, **o: fusedopt.LoFTAdamW(net, **o),
    "loft_both": lambda net, **o: fusedopt.LoFTAdamW(net, alternate=False, **o),
}
each = pytest.mark.parametrize("maker", MAKERS)
OPTIONS = {"lr": 3e-3, "state_format": "int8", "min_quantized_numel": 1, "param_precision": "stochastic"}


def weights(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def everything(net, opt) -> list[torch.Tensor]:
    entries = [opt.state[p] for p in net.parameters() if p.requires_grad]
    return weights(net) + [e[name] for e in entries for name in sorted(e)]


@each
def test_resumes_bit_for_bit(maker):
    """bf16 factors, 8-bit states, from a file."""
    straight, net = model(torch.bfloat16, zero=False), model(torch.bfloat16, zero=False)
    whole, opt = MAKERS[maker](straight, **OPTIONS), MAKERS[maker](net, **OPTIONS)
    for step in range(7):
        if step == 3:
            file = io.BytesIO()
            torch.save({"opt": opt.state_dict(), "net": net.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net = model(torch.bfloat16, zero=False, seed=5)
            net.load_state_dict(saved["net"])
            opt = MAKERS[maker](net, **OPTIONS)
            opt.load_state_dict(saved["opt"])
        for m, o in ((straight, whole), (net, opt)):
            backward(m, step)
            o.step()
    assert_same_bits(everything(net, opt), everything(straight, whole))


@each
def test_copies_go_on_alike(maker):
    net = model(torch.float32, zero=False)
    opt = MAKERS[maker](net, lr=1e-2)
    backward(net, 0)
    opt.step()
    others = [copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))]
    for step in (1, 2):
        for m, o in ((net, opt), *others):
            backward(m, step)
            o.step()
    for m, o in others:
        assert_same_bits(everything(m, o), everything(net, opt))


@pytest.mark.parametrize("capturable", [False, True])
@each
def test_a_skipped_step_changes_nothing(maker, capturable):
    """The loss scale is taken out inside; also the first step overflows. With capturable the device alone knows."""
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    skipping = MAKERS[maker](one, lr=1e-2, amp_fused=True, capturable=capturable)
    plain = MAKERS[maker](two, lr=1e-2, capturable=capturable)
    for step in range(7):
        overflow = step in (0, 3)
        backward(one, step, scale=1024.0)
        if overflow:
            one[0].lora_A.weight.grad[0] = float("inf")
            one[2].lora_B.weight.grad.fill_(float("nan"))
        skipping.grad_scale, skipping.found_inf = torch.tensor(1024.0), torch.tensor(float(overflow))
        before = [t.clone() for t in everything(one, skipping)] if step else weights(one)
        skipping.step()
        if overflow:
            after = everything(one, skipping) if step else weights(one)
            assert_same_bits(after, before)
        else:
            backward(two, step)
            plain.step()
    assert_same_bits(everything(one, skipping), everything(two, plain))


@each
def test_counts_on_the_device_give_the_same(maker):
    one, two = model(torch.float64, zero=False), model(torch.float64, zero=False)
    opts = [
        MAKERS[maker](one, lr=1e-2),
        MAKERS[maker](two, lr=torch.tensor(1e-2, dtype=torch.float64), capturable=True),
    ]
    for step in range(5):
        for net, opt in zip((one, two), opts, strict=True):
            backward(net, step)
            opt.step()
    for p, q in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@each
def test_maximize_and_clipping(maker):
    """Minus the gradients with maximize are the same step; the clipped norm is that of the raw gradients of all factors."""
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    down = MAKERS[maker](one, lr=1e-2, clip_grad_norm=0.1)
    up = MAKERS[maker](two, lr=1e-2, clip_grad_norm=0.1, maximize=True)
    for step in range(4):
        backward(one, step)
        backward(two, step, scale=-1.0)
        down.step()
        up.step()
    assert_same_bits(weights(one), weights(two))
    if "adamw" in maker or "loft" in maker:
        norm = torch.stack([p.grad.norm() for p in one.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(down.grad_norm.view(()), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("maker", [m for m in MAKERS if m != "lora_pro" and m != "lora_one"])
def test_transposed_factors_step_as_contiguous_ones(maker):
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    for layer in (two[0], two[4]):
        for linear in (layer.lora_A, layer.lora_B):
            linear.weight.data = linear.weight.data.t().contiguous().t()
    opts = [MAKERS[maker](net, lr=1e-2) for net in (one, two)]
    for step in range(4):
        for net, opt in zip((one, two), opts, strict=True):
            backward(net, step)
            opt.step()
    assert not two[0].lora_A.weight.is_contiguous()
    for p, q in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@each
def test_one_factor_without_a_gradient_is_refused(maker):
    """Nothing has been changed then; pairs without any gradient are left alone."""
    net = model(torch.float32, zero=False)
    opt = MAKERS[maker](net, lr=1e-2)
    backward(net, 0)
    opt.step()
    backward(net, 1)
    net[2].lora_A.weight.grad = None
    before = [t.clone() for t in everything(net, opt)]
    with pytest.raises((ValueError, RuntimeError), match=r"'2'.*(only B has a gradient|other factor has no gradient)"):
        opt.step()
    assert_same_bits(everything(net, opt), before)
    net[2].lora_B.weight.grad = None
    opt.step()
    assert torch.equal(net[2].lora_A.weight.detach(), before[2]) and not torch.equal(
        net[0].lora_A.weight.detach(), before[0]
    )


@each
def test_steps_one_by_one_are_refused(maker):
    net = model(torch.float32)
    opt = MAKERS[maker](net, lr=1e-2)
    assert not opt.supports_fused_back_pass()
    with pytest.raises(ValueError, match="needs all gradients"):
        fusedopt.release_gradients(net, opt)
    backward(net, 0)
    with pytest.raises(RuntimeError, match="needs all gradients"):
        opt.step_parameter(net[0].lora_A.weight)


def test_what_the_optimizers_refuse():
    net = model(torch.float32)
    for cls in (fusedopt.LoRAProAdamW, fusedopt.LoFTAdamW):
        with pytest.raises(ValueError, match="give it the model, or pairs="):
            cls(net.parameters())
        with pytest.raises(ValueError, match="no pairs of LoRA factors"):
            cls(nn.Linear(3, 3))
        with pytest.raises(ValueError, match="takes no projection"):
            cls(net, projection=fusedopt.GaLore(rank=2))
        with pytest.raises(ValueError, match="differentiable=True is not supported"):
            cls(net, differentiable=True)
        with pytest.raises(ValueError, match="Invalid"):
            cls(net, eps=-1.0)
        opt = cls(net)
        with pytest.raises(ValueError, match="no group takes a projection"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))], "projection": fusedopt.GaLore(rank=2)})
        backward(net, 0)
        opt.step()
        with pytest.raises(ValueError, match="cannot be offloaded|low-rank or factored"):
            fusedopt.offload(opt)
        with pytest.raises(ValueError, match="no torch.optim form"):
            opt.state_dict(format="torch")
        with pytest.raises(ValueError, match="keeps one of shape|loaded"):
            state = opt.state_dict()
            key = "loft_products" if cls is fusedopt.LoFTAdamW else "exp_avg"
            state["state"][1][key] = torch.zeros(2, 2)
            opt.load_state_dict(state)
    for cls in (fusedopt.LoRAPro, fusedopt.LoRAOne):
        with pytest.raises(ValueError, match="Invalid damping"):
            cls(net, damping=-1.0)
        opt = fusedopt.SGD(model(torch.float32, seed=1).parameters(), gradient_transforms=[cls(net)])
        opt.param_groups[0]["params"][1].grad = torch.ones_like(opt.param_groups[0]["params"][1])
        with pytest.raises(ValueError, match="none of its pairs is stepped by this optimizer"):
            opt.step()


def test_pairs_that_were_replaced_are_missed():
    net = model(torch.float32)
    for cls in (fusedopt.LoRAProAdamW, fusedopt.LoFTAdamW):
        opt = cls(net)
        group = opt.param_groups[0]
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="none of its pairs is among its parameters"):
            opt.step()


def test_frozen_and_grouped_pairs():
    """Groups with rates of their own; a frozen pair; what is trained elsewhere."""
    net = model(torch.float32, zero=False)
    net[4].lora_A.weight.requires_grad_(False)
    net[4].lora_B.weight.requires_grad_(False)
    for cls in (fusedopt.LoRAProAdamW, fusedopt.LoFTAdamW):
        groups = fusedopt.lora_plus_groups(net, 1e-3, 4.0)
        opt = cls(groups, pairs=fusedopt.lora_pairs(net))
        assert {g["lr"] for g in opt.param_groups} == {1e-3, 4e-3}
        before = weights(net)
        for step in range(2):
            backward(net, step)
            opt.step()
        assert all(not torch.equal(p, q) for p, q in zip(weights(net), before, strict=True))
        text = opt.plan().explain()
        assert "stepped one by one, in pieces" in text
        opt.record_metrics(every=1)
        backward(net, 2)
        opt.step()
        assert opt.metrics()["update_ratio"] > 0


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_factors_are_refused(one_process):
    """Other parameters of a transform's optimizer may be sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for maker in MAKERS:
        net = model(torch.float32, zero=False)
        which = [net[-1]] if maker in ("lora_pro", "lora_one") else []
        for layer in [*which, net[0].lora_A]:
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
            opt = MAKERS[maker](net, lr=1e-2)
            for p in net.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            if layer is net[-1]:
                opt.step()
                continue
            with pytest.raises(RuntimeError, match=r"parameter [01] \(shape \(3, 9\).*DTensor"):
                opt.step()


class Wide(nn.Module):
    """One adapter of a weight [150, columns]: several pieces of a native step, of whole rows or not."""

    def __init__(self, columns: int):
        super().__init__()
        torch.manual_seed(3)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, columns)), nn.Parameter(torch.randn(150, 4))


@pytest.mark.parametrize("columns", [256, 251])
def test_pieces_and_chunks_change_nothing(monkeypatch, columns):
    """Whole tensors in the reference, rows and columns a few at a time elsewhere; 8-bit moments in whole blocks of them."""
    from fusedopt.projections import loft

    for maker, options in (("lora_pro_adamw", {"state_format": "int8"}), ("loft_both", {"weight_decay": 0.0})):
        runs = []
        for backend in ("reference", None):
            if backend is None:
                monkeypatch.setattr(loft, "CPU_CHUNK", 150 * 33)
            net = Wide(columns)
            opt = MAKERS[maker](net, lr=1e-2, backend=backend, **options)
            for step in range(4):
                gen = torch.Generator().manual_seed(step)
                full = torch.randn(150, columns, generator=gen)
                net.lora_A.grad, net.lora_B.grad = net.lora_B.detach().t() @ full, full @ net.lora_A.detach().t()
                opt.step()
            runs.append(weights(net))
        sites = [slot.site for slot in opt._plan.slots]
        assert maker != "lora_pro_adamw" or len(sites[1].pieces.pieces) > 1
        start = weights(Wide(columns))
        for p, q, p0 in zip(*runs, start, strict=True):
            assert (p - q).norm() <= 1e-3 * (p - p0).norm()


@pytest.mark.parametrize("maker", ["lora_pro_adamw", "loft"])
def test_states_are_exported_and_imported(maker, tmp_path):
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    opts = [MAKERS[maker](net, lr=1e-2) for net in (one, two)]
    backward(one, 0)
    opts[0].step()
    two.load_state_dict(one.state_dict())
    fusedopt.export_states(opts[0], tmp_path / "s.safetensors", one)
    fusedopt.import_states(opts[1], tmp_path / "s.safetensors", two)
    for net, opt in zip((one, two), opts, strict=True):
        backward(net, 1)
        opt.step()
    assert_same_bits(everything(two, opts[1]), everything(one, opts[0]))


@each
def test_compiled_steps_give_the_same_bits(maker):
    one, two = model(torch.float32, zero=False), model(torch.float32, zero=False)
    opts = [MAKERS[maker](net, lr=1e-2) for net in (one, two)]
    step_op = torch.compile(opts[0].step, backend="eager", fullgraph=True)
    for step in range(3):
        for net, do in ((one, step_op), (two, opts[1].step)):
            backward(net, step)
            do()
    assert_same_bits(everything(one, opts[0]), everything(two, opts[1]))


def test_dtypes_of_factors_may_differ_but_for_fp64():
    for cls in (fusedopt.LoRAProAdamW, fusedopt.LoFTAdamW):
        for a, b in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64, torch.float32)):
            net = Wide(256)
            net.lora_A.data, net.lora_B.data = net.lora_A.data.to(a), net.lora_B.data.to(b)
            net.lora_A.grad, net.lora_B.grad = torch.ones_like(net.lora_A), torch.ones_like(net.lora_B)
            opt, before = (
                cls(net, lr=0.1, alternate=False) if cls is fusedopt.LoFTAdamW else cls(net, lr=0.1),
                weights(net),
            )
            if a == torch.float64:
                with pytest.raises(RuntimeError, match="float64 goes with float64 only"):
                    opt.step()
                assert_same_bits(weights(net), before)
                continue
            opt.step()
            assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(weights(net), before, strict=True))
