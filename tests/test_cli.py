"""The command line: estimate against numbers worked out by hand, doctor's verdicts, and a tiny demo."""

import importlib.util
import json
import sys
import types

import pytest
import torch

import fusedopt
from fusedopt.__main__ import COMMANDS, main
from fusedopt.backends import select
from fusedopt.backends.reference import ReferenceBackend
from fusedopt.cli import UsageError, corpus, demo, doctor, estimate, parity, progress, speed, training

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
GROUPED = {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8}
# (config, parameters as published with the model)
CONFIGS = {
    "llama-7b": (LLAMA_7B, 6_738_415_616),
    "llama-3-8b": ({**GROUPED, "vocab_size": 128256}, 8_030_261_248),
    "mistral-7b": ({**GROUPED, "model_type": "mistral"}, 7_241_732_096),
    "mixtral-8x7b": ({**GROUPED, "model_type": "mixtral", "num_local_experts": 8}, 46_702_792_704),
    "qwen2-0.5b": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        494_032_768,
    ),
    "qwen3-0.6b": (
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "tie_word_embeddings": True},
        596_049_920,
    ),
    "gemma-2b": (
        {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
         "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
        2_506_172_416,
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "pythia-160m": (
        {"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "vocab_size": 50304},
        162_322_944,
    ),
    "bert-base": (
        {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
        109_482_240,
    ),
    "bert-base-mlm": (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "intermediate_size": 3072,
         "num_hidden_layers": 12, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
        109_514_298,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads only make the tests slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(capsys, *arguments: str) -> dict:
    assert main(["estimate", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(found: dict) -> dict:
    return {c["name"]: c for c in found["choices"]}


# The program itself


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["estimate", "--params", "7e9", "--optim", "adamv"], "lion"),
        (["estimate", "--params", "seven"], "7e9"),
        (["estimate", "--params", "nan"], "at least 1"),
        (["estimate", "--config", "/nowhere/config.json"], "cannot read"),
        (["estimate", "--model", "no_such_module:build"], "ModuleNotFoundError"),
        (["estimate", "--model", "json"], "module:callable"),
        (["estimate", "--model", "builtins:dict"], "torch.nn.Module"),
        (["estimate", "--params", "1M", "--optim", "galore_adamw"], "--config or --model"),
        (["estimate", "--params", "1M", "--rank", "4"], "name one"),
        (["estimate", "--params", "1M", "--rank", "4", "--optim", "frugal_adamw,adamw8bit"], "name one"),
        (["estimate", "--params", "1M", "--optim", "galore_adamw", "--rank", "0"], "Invalid rank"),
        (["demo", "--optim", "adamw9bit"], "names are"),
        (["demo", "--text", "/nowhere"], "no such file"),
        (["demo", "--device", "warp"], "--device warp"),
        (["demo", "--width", "30", "--heads", "4"], "multiple"),
        (["demo", "--out", "/nowhere/x.png"], "no folder"),
        (["demo", "--no-plot", "--optim", "galore_adamw", "--width", "32", "--layers", "1"], "smaller --rank"),
        (["demo", "--no-plot", "--optim", "conda_lion", "--width", "32", "--layers", "1"], "conda_lion: "),
    ],
)
def test_errors_say_what_to_do(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


# estimate


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name, tmp_path, capsys):
    config, expected = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert numbers(capsys, "--config", str(tmp_path))["parameters"] == expected


def test_llama_bytes_by_hand(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    rows = by_name(numbers(capsys, "--config", str(path), "--optim", "adamw8bit"))
    n = CONFIGS["llama-7b"][1]
    assert n % 256 == 0
    eight = rows["adamw8bit"]
    assert eight["chosen"] and not rows["adamw"]["chosen"]
    assert (eight["weights"], eight["gradients"], eight["master"]) == (2 * n, 2 * n, 0)
    assert eight["states"] == 2 * n + 2 * 4 * n // 256
    assert eight["total"] == eight["weights"] + eight["gradients"] + eight["states"]
    assert rows["lion8bit"]["states"] == n + 4 * n // 256
    assert rows["lamb"]["states"] == rows["adamw"]["states"] == 8 * n
    assert rows["sgd momentum"]["states"] == rows["lion"]["states"] == 4 * n
    assert rows["adamw_bf16"]["states"] == 4 * n
    assert rows["torch AdamW"]["total"] == rows["torch AdamW, fp32 master"]["total"] == 16 * n
    assert rows["torch AdamW, fp32 master"]["master"] == 4 * n


def test_dtypes_and_added_optimizers(capsys):
    dtypes = ["--param-dtype", "fp32", "--grad-dtype", "bf16"]
    row = by_name(numbers(capsys, "--params", "1M", *dtypes, "--optim", "adam8bit"))["adam8bit"]
    assert (row["weights"], row["gradients"]) == (4_000_000, 2_000_000)
    assert row["states"] == 2 * (1_000_000 + 4 * -(-1_000_000 // 256))


def test_small_tensors_stay_fp32_and_frozen_ones_have_no_state(capsys, monkeypatch):
    def build():
        model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 50, bias=False))
        model[1].requires_grad_(False)
        return model

    monkeypatch.setitem(sys.modules, "toy_model", types.SimpleNamespace(build=build))
    found = numbers(capsys, "--model", "toy_model:build")
    row = by_name(found)["adamw8bit"]
    assert (found["parameters"], found["tensors"]) == (15_100, 3)
    assert (row["weights"], row["gradients"]) == (4 * 15_100, 4 * 10_100)
    assert row["states"] == 2 * (10_000 + 4 * 40) + 2 * 4 * 100


def test_states_are_those_of_a_real_optimizer(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "toy_model", types.SimpleNamespace(build=lambda: torch.nn.Linear(129, 77)))
    row = by_name(numbers(capsys, "--model", "toy_model:build"))["lamb8bit"]
    model = torch.nn.Linear(129, 77)
    opt = fusedopt.create("lamb8bit", model, backend="reference")
    model(torch.ones(2, 129)).sum().backward()
    opt.step()
    assert row["states"] == fusedopt.state_bytes(opt)


def test_llama_with_galore_by_hand(tmp_path, capsys):
    """Embedding and norms in full, 8-bit states of [rank, longer side] and a bf16 projector [rank, shorter side] for the rest."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    arguments = ["--config", str(path), "--rank", "128", "--optim", "galore_adamw8bit", "--optim", "galore_lion"]
    rows = by_name(numbers(capsys, *arguments))
    h, inner, vocab, r = 4096, 11008, 32000, 128
    square, long = 32 * 4, 32 * 3
    projector = 2 * r * h * (square + long + 1)
    low_rank = r * (h * square + inner * long + vocab)
    table, norms = vocab * h, 65 * h
    eight = [n + 4 * n // 256 for n in (low_rank, table, norms)]
    assert rows["galore_adamw8bit"]["states"] == 2 * sum(eight) + projector
    assert rows["galore_lion"]["states"] == 4 * (low_rank + table + norms) + projector
    assert rows["galore_lion"]["master"] == 0 and rows["galore_lion"]["chosen"]
    assert rows["adamw8bit"]["states"] == rows["adamw8bit"]["total"] - 4 * CONFIGS["llama-7b"][1]


@pytest.mark.parametrize("precision", ["nearest", "kahan"])
def test_projected_states_are_those_of_a_real_optimizer(precision, capsys, monkeypatch):
    def build():
        layers = torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 8)
        return torch.nn.Sequential(*layers).bfloat16()

    monkeypatch.setitem(sys.modules, "toy_model", types.SimpleNamespace(build=build))
    options = {"min_quantized_numel": 256, "param_precision": precision}
    arguments = ["--min-quantized-numel", "256", "--param-precision", precision, "--optim", "galore_adamw8bit"]
    row = by_name(numbers(capsys, "--model", "toy_model:build", *arguments, "--rank", "16"))["galore_adamw8bit"]
    model = build()
    opt = fusedopt.create("galore_adamw8bit", model, rank=16, backend="reference", **options)
    model(torch.arange(9)).sum().backward()
    opt.step()
    assert row["states"] + row["master"] == fusedopt.state_bytes(opt)
    assert row["master"] == (0 if precision == "nearest" else 2 * sum(p.numel() for p in model.parameters()))


def test_estimate_table(capsys):
    assert main(["estimate", "--params", "7e9", "--optim", "adamw8bit", "--param-precision", "nearest"]) == 0
    out = capsys.readouterr().out
    assert "> adamw8bit" in out and "GiB" in out and "2.031" in out and "nearest" in out


def test_unknown_model_type(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "perceptron"}')
    with pytest.raises(UsageError, match="llama"):
        estimate.from_config(str(path), torch.bfloat16)
    path.write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="hidden_size"):
        estimate.from_config(str(path), torch.bfloat16)


# doctor


class Lazy(ReferenceBackend):
    """Claims every bucket and steps nothing."""

    def launch(self, work):
        pass


class Raising(ReferenceBackend):
    def launch(self, work):
        raise RuntimeError("invalid device function")


@pytest.fixture
def only(monkeypatch):
    """Replaces the table of backends by the reference, and one more where a class is given."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)

    def use(cls=None):
        classes = {"reference": "ReferenceBackend"}
        if cls is not None:
            classes["sick"] = "SickBackend"
            monkeypatch.setitem(sys.modules, "fusedopt.backends.sick", types.SimpleNamespace(SickBackend=cls))
        monkeypatch.setattr(select, "_CLASSES", classes)
        monkeypatch.setattr(select, "get_backend", select.get_backend.__wrapped__)

    return use


def test_parity_reaches_every_rule():
    assert {case.rule for case in parity.cases()} == set(fusedopt.list_rules())


@pytest.mark.parametrize(
    "command",
    [
        "estimate --params 1e6 --param-dtype fp16 --param-precision split24",
        "demo --dtype fp16 --param-precision split32",
    ],
)
def test_a_precision_that_cannot_keep_the_dtype(command, capsys):
    assert main(command.split()) == 2
    assert "keeps bfloat16 parameters, not torch.float16" in capsys.readouterr().err


def test_healthy(only, capsys):
    only()
    assert main(["doctor", "--no-timing"]) == 0
    out = capsys.readouterr().out
    assert "Everything is right." in out and "FAIL" not in out and torch.__version__ in out


@pytest.mark.parametrize(("cls", "expected"), [(Lazy, "times its bound"), (Raising, "invalid device function")])
def test_broken_backend(cls, expected, only, capsys, monkeypatch):
    only(cls)
    monkeypatch.setattr(doctor, "cases", lambda: parity.cases()[:2])
    assert main(["doctor", "--no-timing"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and expected in out


def test_backend_that_cannot_be_made(only, capsys, monkeypatch):
    def explode():
        raise OSError("libsick.so: undefined symbol")

    only(explode)
    monkeypatch.setattr(doctor, "cases", lambda: parity.cases()[:1])
    assert main(["doctor", "--no-timing", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any("undefined symbol" in text for text in found["problems"])
    assert [s["status"] for s in found["backends"]] == ["used", "broken"]


def test_unknown_requested_backend(only, monkeypatch, capsys):
    only()
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cuda12")
    monkeypatch.setattr(doctor, "parity", lambda out: None)
    assert main(["doctor", "--no-timing"]) == 1
    assert "FUSEDOPT_BACKEND=cuda12" in capsys.readouterr().out


def test_requested_backend_that_cannot_run(only, monkeypatch, capsys):
    class Absent(ReferenceBackend):
        def supports(self, key):
            return "needs hardware of tomorrow"

    only(Absent)
    monkeypatch.setenv("FUSEDOPT_BACKEND", "sick")
    monkeypatch.setattr(doctor, "cases", lambda: parity.cases()[:1])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "needs hardware of tomorrow" in out and "cannot run on any device" in out


def test_timing_of_a_step(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    found = speed.time_step("adamw", torch.device("cpu"), bandwidth=28e9)
    assert found.backend == "reference" and found.seconds > 0
    assert found.limit == pytest.approx(found.numel / 1e9)


# demo

TINY = ["--steps", "3", "--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)


def test_tiny_demo(text, tmp_path, capsys, monkeypatch):
    out, numbers_path = tmp_path / "demo.png", tmp_path / "demo.json"
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    arguments = ["demo", "--text", text, "--out", str(out), "--json", str(numbers_path), *TINY]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    runs = {r["name"]: r for r in json.loads(numbers_path.read_text())["runs"]}
    assert list(runs) == [training.TORCH, "adamw", "adamw8bit", "lion8bit"]
    assert all(len(r["losses"]) == 3 for r in runs.values())
    assert len({r["losses"][0] for r in runs.values()}) == 1, "the same weights and batches at the start"
    torch.testing.assert_close(runs["adamw"]["losses"], runs[training.TORCH]["losses"], rtol=1e-5, atol=0)
    assert runs["adamw8bit"]["state_bytes"] < 0.5 * runs["adamw"]["state_bytes"]
    assert all(r["label"] in printed for r in runs.values())
    if importlib.util.find_spec("matplotlib"):
        assert out.read_bytes()[:4] == b"\x89PNG"


def test_demo_without_matplotlib_and_tqdm(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    monkeypatch.setattr(progress, "tqdm", None)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--text", text, "--optim", "lion", "--out", str(tmp_path / "x.png"), *TINY]) == 0
    printed = capsys.readouterr()
    assert demo.INSTALL in printed.out and "3/3" in printed.err


def test_demo_with_projections(text, capsys, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    names = ["galore_adamw8bit", "apollo_mini_adamw", "galore_lion"]
    options = ["--optim", ",".join(names), "--rank", "8", "--update-every", "2", "--no-plot", "--json", "-"]
    assert main(["demo", "--text", text, *options, *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    runs = {r["name"]: r for r in found["runs"]}
    labels = ["torch AdamW", "GaLore AdamW int8", "ApolloMini AdamW fp32", "GaLore Lion fp32"]
    assert [r["label"] for r in found["runs"]] == labels and found["setup"]["rank"] == 8
    assert len({r["losses"][0] for r in runs.values()}) == 1
    full, shapes = 2 * 256 * 32 + 17 * 32 - 32 + 3 * 32, ((96, 32), (32, 32), (128, 32), (32, 128))
    low_rank, projectors = sum(8 * max(shape) for shape in shapes), 8 * 32 * len(shapes)
    assert runs["galore_lion"]["state_bytes"] == 4 * (full + low_rank + projectors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["galore_adamw", "subset_norm_adamw", "conda_adamw", "dct_adamw", "apollo_mini_adamw"])
def test_the_demo_projects_the_matrices_of_blocks(name, tied):
    setup = training.Setup(
        None, torch.device("cpu"), 1, width=32, layers=2, heads=2, context=16, rank=8, update_every=3
    )
    model = setup.model()
    if tied:
        model.head.weight = model.bytes.weight
    opt = training.build_optimizer(name, model, setup)
    owners = [(p, group) for group in opt.param_groups for p in group["params"]]
    assert {id(p) for p, _ in owners} == {id(p) for p in model.parameters()}
    projected = {id(p) for p, group in owners if opt.projection_for(p, group) is not None}
    assert projected == {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    (blocks,) = (group for group in opt.param_groups if id(group["params"][0]) in projected)
    others = [group for group in opt.param_groups if group is not blocks]
    method = blocks["projection"]
    ratio = training.PROJECTED.get(method.name, {}).get("ratio", 1.0)
    assert all(group["lr"] == 1e-3 for group in others) and blocks["lr"] == ratio * 1e-3
    assert sorted(g["weight_decay"] * g["lr"] for g in opt.param_groups) == pytest.approx([0.0, 1e-4, 1e-4])
    assert getattr(method, "rank", 8) == (1 if method.name == "apollo_mini" else 8)
    assert method.update_every in (None, 1 if method.name == "dct" else 3)


def test_a_ratio_and_options_replace_the_recipe():
    setup = training.Setup(None, torch.device("cpu"), 1, width=32, layers=1, heads=2, context=16, rank=8)
    opt = training.build_optimizer("galore_adamw", setup.model(), setup, ratio=3.0, method="svd", scale=0.5)
    blocks = opt.param_groups[0]
    assert (blocks["projection"].method, blocks["projection"].scale, blocks["lr"]) == ("svd", 0.5, 3e-3)
    opt = training.build_optimizer(training.TORCH, setup.model(), setup, ratio=2.0)
    assert [group["lr"] for group in opt.param_groups] == [2e-3, 1e-3, 1e-3]


def test_corpus_holds_out_files(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([65 + i]) * 200)
    (tmp_path / "binary.bin").write_bytes(b"\0" * 500)
    loaded = corpus.load(str(tmp_path), 16)
    held, trained = set(loaded.held_out.tolist()), set(loaded.train.tolist())
    assert held == {65 + 9, 65 + 19} and not held & trained and 0 not in trained


def test_corpus_of_the_standard_library():
    loaded = corpus.load(None, 128)
    assert loaded.train.numel() > 5e6 and loaded.held_out.numel() > 5e5
    windows = loaded.windows(4, 128, seed=3)
    assert windows.shape == (4, 129) and torch.equal(windows, loaded.windows(4, 128, seed=3))


def test_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UsageError, match="too little"):
        corpus.load(str(tmp_path), 16)


def test_schedule_warms_up_and_decays():
    rates = [training.schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == pytest.approx(1.0) and rates[-1] < 0.11
