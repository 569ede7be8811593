"""PEFT's adapters: every pair's product is what its layer adds; the README's recipe fine-tunes end to end."""

import warnings

import pytest
import torch

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from trainer_data import one_thread, run_recipe, text_windows  # noqa: E402, F401

import fusedopt  # noqa: E402

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes))


def batch(step: int, first: int = 32) -> dict:
    tokens = text_windows()[first : first + 32]
    chosen = torch.randint(0, len(tokens), (8,), generator=torch.Generator().manual_seed(1000 + step))
    return {"input_ids": tokens[chosen], "labels": tokens[chosen]}


@pytest.fixture(scope="module")
def pretrained() -> dict:
    """Weights of a model that has seen the first half of the text."""
    model = llama()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        model(**batch(step, first=0)).loss.backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def adapted(weights: dict, seed: int = 0) -> torch.nn.Module:
    model = llama()
    model.load_state_dict(weights)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_products_are_what_layers_add(options):
    """Two adapters of different ranks, on linear layers and an embedding."""
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*TARGETS, "embed_tokens"], **options)
    )
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=10, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name and p.dim() == 2:
            torch.nn.init.normal_(p)
    pairs = fusedopt.lora_pairs(model)
    assert len(pairs) == 2 * 4 + 1 + 2
    assert sum(p.embedding for p in pairs) == 1
    assert {p.rank for p in fusedopt.lora_pairs(model, adapters=["second"])} == {2}
    modules = dict(model.named_modules())
    for pair in pairs:
        name, _, last = pair.name.rpartition(".")
        layer, adapter = (modules[name], last) if last in ("default", "second") else (modules[pair.name], "default")
        product = pair.scale * pair.B @ pair.A
        torch.testing.assert_close(product.t() if pair.transposed else product, layer.get_delta_weight(adapter))


def test_gpt2_is_transposed():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out
        model = peft.get_peft_model(
            transformers.GPT2LMHeadModel(config), peft.LoraConfig(r=2, target_modules=["c_attn"])
        )
    (pair,) = fusedopt.lora_pairs(model)
    (layer,) = (m for m in model.modules() if getattr(m, "fan_in_fan_out", False))
    torch.nn.init.normal_(pair.B)
    assert pair.transposed and pair.shape == (48, 16)
    torch.testing.assert_close((pair.scale * pair.B @ pair.A).t(), layer.get_delta_weight("default"))


def test_convolutions_are_refused():
    net = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 4)),
        peft.LoraConfig(r=2, target_modules=["0", "2"]),
    )
    with pytest.raises(ValueError, match=r"'base_model.model.0'.*convolution.*filter="):
        fusedopt.lora_pairs(net)
    (pair,) = fusedopt.lora_pairs(net, filter=lambda name: not name.endswith("model.0"))
    assert pair.shape == (4, 8)


def test_the_recipe(pretrained):
    """The README's lines: the loss falls, the base stays, and the adapters alone are trained."""
    torch.manual_seed(0)
    model = llama()
    model.load_state_dict(pretrained)
    names = run_recipe("LoRA with PEFT.", peft=peft, model=model, batches=[batch(step) for step in range(60)], lr=1e-2)
    tuned, opt = names["model"], names["opt"]
    assert type(opt) is fusedopt.LoRAProAdamW and len(opt.pairs) == 14
    with torch.no_grad(), tuned.disable_adapter():
        before = sum(float(tuned(**batch(step)).loss) for step in range(50, 60))
    with torch.no_grad():
        after = sum(float(tuned(**batch(step)).loss) for step in range(50, 60))
    assert after < 0.96 * before
    for name, p in tuned.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, pretrained[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name


def finetuned(pretrained, make, seed: int, steps: int = 60) -> float:
    """The mean loss of the last ten steps."""
    model = adapted(pretrained, seed)
    opt, losses = make(model), []
    for step in range(steps):
        loss = model(**batch(step)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_lora_pro_is_faster_at_one_learning_rate(pretrained):
    """Plain LoRA has to find a larger rate of its own; with it, it is about as fast here."""
    for seed in range(2):
        plain = finetuned(
            pretrained,
            lambda m: fusedopt.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0),
            seed,
        )
        pro = finetuned(pretrained, lambda m: fusedopt.LoRAProAdamW(m, lr=3e-3, state_format="int8"), seed)
        assert pro < plain - 0.02
