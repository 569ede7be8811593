"""The native CPU driver: right by the fp64 reference, same bits for every instruction set, thread count, chunk."""

import struct
from dataclasses import replace

import pytest
import torch
from harness import (
    DTYPES,
    RULES,
    assert_bitwise,
    assert_close,
    assert_guards,
    make_problem,
    oracle,
    snapshot,
)

from fusedopt import abi
from fusedopt.abi import Phase
from fusedopt.backends import cpu
from fusedopt.formats import INT8, dynamic_map
from fusedopt.precision import philox16, round_stochastic
from fusedopt.rule import get_rule, list_rules

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native CPU module is not built")

ISAS = [name for name, _ in cpu.native.isa()] if cpu.native else []
FORMATS = ("fp32", "bf16", "int8")
NUMELS = (300, 1, 2048, 5000, 17, 20000)
TAILS = (1, 7, 8, 15, 16, 31, 255, 256, 257, 511, 1000, 4096)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(problem, isa=None, clip=False, phases=None):
    problem.run(cpu.CpuBackend(isa), clip, phases)
    return snapshot(problem)


def encode(x, signed, isa):
    codes = torch.full((x.numel() + 64,), 77, dtype=torch.uint8)
    scales = torch.full((INT8.scale_count(x.numel()) + 4,), 77.0)
    cpu.native.int8_encode(
        x.data_ptr(), x.numel(), signed, codes.data_ptr(), scales.data_ptr(), dict(cpu.native.isa())[isa]
    )
    assert (codes[x.numel() :] == 77).all() and (scales[-4:] == 77).all()
    return codes[: x.numel()], scales[:-4]


def decode(codes, scales, signed, isa):
    out = torch.full((codes.numel() + 64,), 77.0)
    cpu.native.int8_decode(
        codes.data_ptr(), scales.data_ptr(), codes.numel(), signed, out.data_ptr(), dict(cpu.native.isa())[isa]
    )
    assert (out[codes.numel() :] == 77).all()
    return out[: codes.numel()]


def hard_values(signed):
    """Blocks of absmax 1 with the 4 neighbours of each midpoint, map value, power of two and power of ten."""
    table = dynamic_map(signed)
    points = torch.cat([table, (table[:-1] + table[1:]) / 2, 2.0 ** -torch.arange(32), 10.0 ** -torch.arange(12)])
    bits = points.double().abs().float().view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)
    values = bits.clamp(min=0).view(torch.float32).flatten().clamp(max=1)
    values = torch.cat([values, -values]) if signed else values
    padded = torch.ones(-(-values.numel() // 255), 256)  # each block holds a 1
    flat = torch.nn.functional.pad(values, (0, padded[:, 1:].numel() - values.numel()))
    padded[:, 1:] = flat.view(-1, 255)
    return padded.flatten()


def spread(n, signed, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=gen) * torch.rand(n, generator=gen) ** 12
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("isa", ISAS)
def test_codec_is_the_baseline_bit_for_bit(isa, signed):
    hostile = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 1.2e-38, 3e38, 1.0] * 30
    )
    cases = [hard_values(signed), spread(1 << 18, signed), hostile[:256], hostile[3:10].repeat(40), torch.zeros(300)]
    cases += [spread(n, signed, n) for n in TAILS] + [torch.full((256,), 1e-39), torch.full((256,), 2e-38)]
    for x in cases:
        codes, scales = encode(x, signed, isa)
        want = encode(x, signed, "baseline")
        assert_bitwise([codes, scales], list(want))
        assert_bitwise([decode(codes, scales, signed, isa)], [decode(codes, scales, signed, "baseline")])


@pytest.mark.parametrize("signed", [True, False])
def test_codec_is_the_table(signed):
    for n in (*TAILS, 1 << 16):
        x = spread(n, signed, n)
        codes, scales = encode(x, signed, ISAS[-1])
        want, want_scales = INT8.encode(x, signed)
        assert torch.equal(scales, want_scales)
        ties = (codes != want).sum()
        assert ties <= max(1, 1e-4 * n) and (codes.int() - want.int()).abs().max() <= 1
        all_codes = torch.arange(256, dtype=torch.uint8)
        one = torch.ones(1)
        torch.testing.assert_close(
            decode(all_codes, one, signed, ISAS[-1]),
            INT8.decode(all_codes, one, signed, torch.float32),
            rtol=4e-7,
            atol=0,
        )


def cells():
    """(rule, state format, dtype of p and g, precision)"""
    for rule in RULES:
        for form in FORMATS if get_rule(rule).states else FORMATS[:1]:
            for dtype in DTYPES:
                yield pytest.param(rule, form, dtype, "nearest", id=f"{rule}-{form}-{dtype}")
                if dtype != torch.float32:
                    yield pytest.param(rule, form, dtype, "stochastic", id=f"{rule}-{form}-{dtype}-stochastic")


@pytest.mark.parametrize(("rule", "form", "dtype", "precision"), list(cells()))
def test_step(rule, form, dtype, precision, threads):
    """One thread, small chunks, baseline code: right. Everything else: the same bits."""

    def problem(**changes):
        return make_problem(
            rule, NUMELS, param_dtype=dtype, grad_dtype=dtype, formats=form, precision=precision, **changes
        )

    threads(1)
    if precision == "nearest":
        small = make_problem(rule, param_dtype=dtype, grad_dtype=dtype, formats=form)
        exact = oracle(small)
        run(small, "baseline")
        assert_close(small, exact)
    first = problem()
    want = run(first, "baseline")
    assert_guards(first)
    for isa in ISAS:
        for count, chunk, offset in ((1, 2048, 0), (2, 16384, 0), (2, 2048, 1)):
            threads(count)
            other = problem(chunk=chunk, offset=offset)
            assert_bitwise(run(other, isa), want)
            assert_guards(other)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
def test_dtype_pairs(param_dtype, grad_dtype):
    problem = make_problem(
        "adam",
        param_dtype=param_dtype,
        grad_dtype=grad_dtype,
        formats=("int8", "fp32"),
        maximize=True,
        grad_scale=8.0,
        max_norm=2.0,
    )
    exact = oracle(problem, clip=True)
    run(problem, clip=True)
    assert_close(problem, exact)
    torch.testing.assert_close(problem.work.norm.double(), exact.work.norm.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(problem.work.clip.double(), exact.work.clip.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, threads):
    results = []
    for isa in ISAS:
        for count, chunk in ((1, 2048), (2, 16384)):
            threads(count)
            problem = make_problem("lars", NUMELS, param_dtype=dtype, grad_dtype=dtype, chunk=chunk)
            problem.work.found_inf = torch.ones(1)  # norms are computed all the same
            before = snapshot(problem)
            run(problem, isa, phases=[Phase.NORM])
            assert_bitwise(snapshot(problem), before)
            results.append([problem.work.sums, problem.work.norm, problem.work.totals])
            for item in problem.work.items:
                want = torch.stack([t.double().square().sum() for t in (item.param, item.grad)])
                torch.testing.assert_close(problem.work.sums[item.tensor_id].double(), want, rtol=1e-6, atol=0)
            norm = torch.cat([it.grad.double() for it in problem.work.items]).norm()
            torch.testing.assert_close(problem.work.norm.double().view(()), norm, rtol=1e-6, atol=0)
    for other in results[1:]:
        assert_bitwise(other, results[0])


def test_norm_over_launches_and_without_sums():
    first, second = make_problem("adam", max_norm=0.5, seed=1), make_problem("adam", max_norm=0.5, seed=2)
    totals, backend = torch.zeros(2), cpu.CpuBackend()
    for i, problem in enumerate((first, second)):
        shared = {"totals": totals, "clip": first.work.clip, "norm": first.work.norm, "sums": None, "cache": {}}
        backend.launch(replace(problem.work, phase=Phase.NORM, total_index=i, total_count=2, **shared))
    norm = torch.cat([it.grad for p in (first, second) for it in p.work.items]).double().norm()
    torch.testing.assert_close(first.work.norm.double().view(()), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.work.clip.double().view(()), 0.5 / (norm + 1e-6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_writes_only_sums(dtype, form, threads):
    results = []
    for isa in ISAS:
        for count, chunk in ((1, 2048), (2, 16384)):
            threads(count)
            problem = make_problem("lamb", NUMELS, param_dtype=dtype, grad_dtype=dtype, formats=form, chunk=chunk)
            before = snapshot(problem)
            exact = oracle(problem)
            assert_bitwise(run(problem, isa, phases=[Phase.PROBE]), before)
            results.append([problem.work.sums])
            torch.testing.assert_close(problem.work.sums.double(), exact.work.sums, rtol=1e-4, atol=0)
    for other in results[1:]:
        assert_bitwise(other, results[0])


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_writes_nothing(rule):
    problem = make_problem(rule, found_inf=1.0)
    before = snapshot(problem)
    assert_bitwise(run(problem), before)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("isa", ISAS)
def test_stochastic_rounding_is_the_reference_bit_for_bit(isa, dtype):
    """SGD without decay is p - lr g in fp32, which torch reproduces exactly; values down to fp16 subnormals."""
    changes = {"weight_decay": 0.0, "lr": 0.25}
    problem = make_problem(
        "sgd",
        NUMELS,
        param_dtype=dtype,
        precision="stochastic",
        hyper_changes=changes,
        grad_values=lambda g, i: g * 10.0 ** (-i),
    )
    for item in problem.work.items[3:]:
        item.param.mul_(1e-6)
    expected = []
    for item in problem.work.items:
        row = problem.work.numbers[item.scalar_row]
        x = item.param.float() - torch.tensor(row.lr, dtype=torch.float32) * item.grad
        random16 = philox16(row.seed, row.step, item.tensor_id, x.numel())
        expected.append(round_stochastic(x, dtype, random16))
    run(problem, isa)
    assert_bitwise([it.param.clone() for it in problem.work.items], expected)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_subnormals_are_flushed_inside_and_kept_outside(threads_used, threads):
    """A second moment of 1e-40 costs nothing and becomes 0; the caller's arithmetic still has subnormals afterwards."""
    threads(threads_used)
    problem = make_problem("adam", (40000,), grad_values=lambda g, i: torch.full_like(g, 1e-19))
    problem.work.items[0].states[1].zero_()
    run(problem)
    assert (problem.work.items[0].states[1] == 0).all()
    tiny = torch.tensor([1e-38])
    assert (tiny * 0.25).item() > 0
    assert all((torch.full((200000,), 1e-38) * 0.25 > 0).tolist())  # also in torch's workers


def test_empty_launches_and_bad_launches():
    backend = cpu.CpuBackend()
    problem = make_problem("adam", (0, 0))
    run(problem)
    work = make_problem("adam").work
    fields = work.fields() | {"rule": 0, "threads": 1}
    good = abi.pack_launch(fields)
    for bad in (
        b"",
        good[:-4],
        good[:-4] + struct.pack("=i", 3),
        abi.pack_launch(fields | {"rule": 999}),
        abi.pack_launch(fields | {"phase": 9}),
        abi.pack_launch(fields | {"isa": 77}),
    ):
        with pytest.raises(ValueError):
            cpu.native.launch(bad)
    assert backend.units(torch.device("cpu")) == torch.get_num_threads()


def test_support_and_reasons(monkeypatch):
    key = make_problem("adam").work.key
    backend = cpu.CpuBackend()
    assert backend.reason() is None and backend.supports(key) is None
    for change, words in (
        ({"device": torch.device("cuda")}, "cuda"),
        ({"param_dtype": torch.float64}, "float64"),
        ({"formats": ("int4", "fp32")}, "int4"),
        ({"precision": "kahan"}, "kahan"),
        ({"rule": "unheard_of"}, "without this rule"),
    ):
        assert words in backend.supports(key._replace(**change))
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", "baseline")
    assert cpu.CpuBackend().isa == "baseline"
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", "mmx")
    assert "mmx" in cpu.CpuBackend().reason()
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "_import_error", "no such file", raising=False)
    assert "no such file" in cpu.CpuBackend().supports(key)


def test_native_rules_match_the_declarations():
    backend = cpu.CpuBackend()
    key = make_problem("adam").work.key
    for name in list_rules():
        assert backend.supports(key._replace(rule=name)) is None


def test_a_rule_of_another_version_is_refused(monkeypatch):
    backend = cpu.CpuBackend()
    key = make_problem("adam").work.key
    index, states, scalars, trust_on = backend._rules["adam"]
    monkeypatch.setitem(backend._rules, "adam", (index, states, scalars[::-1], trust_on))
    assert "another version" in backend.supports(key)
