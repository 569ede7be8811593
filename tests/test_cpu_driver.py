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
    code_numbers,
    make_problem,
    oracle,
    snapshot,
)

from fusedopt import abi
from fusedopt.abi import Phase
from fusedopt.backends import cpu
from fusedopt.formats import get_format, list_formats
from fusedopt.precision import get_precision, list_precisions, philox16, round_stochastic
from fusedopt.rule import get_rule, list_rules

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native CPU module is not built")

ISAS = [name for name, _ in cpu.native.isa()] if cpu.native else []
MIXED = (
    ("int8", "fp32"),
    ("fp32", "int4"),
    ("int8c", "bf16_stochastic"),
    ("fp8", "int8"),
    ("int4", "bf16"),
    ("bf16", "int8c"),
)
PROBES = [(form, torch.float32, "nearest") for form in list_formats()]
PROBES += [("fp32", torch.bfloat16, name) for name in list_precisions()]
PROBES += [("int4", torch.float16, name) for name in ("nearest", "kahan", "master")]
NUMELS = (300, 1, 2048, 5000, 17, 20000)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(problem, isa=None, clip=False, phases=None):
    problem.run(cpu.CpuBackend(isa), clip, phases)
    return snapshot(problem)


def cells():
    """(rule, state formats, dtype of p and g, precision): every rule in every format and every precision, and mixtures."""
    for rule in RULES:
        count = len(get_rule(rule).states)
        for form in list_formats() if count else ("fp32",):
            yield rule, form, torch.float32, "nearest"
        for dtype in DTYPES[1:]:
            for name in list_precisions():
                if dtype in get_precision(name).dtypes:
                    yield rule, "fp32", dtype, name
    for i, forms in enumerate(MIXED):
        for rule in ("adam", "lamb"):
            yield rule, forms, torch.float32, "nearest"
            yield rule, forms, torch.bfloat16, list_precisions()[i % 6]
            yield rule, forms, torch.float16, ("nearest", "kahan", "master", "stochastic")[i % 4]
        yield "adam_amsgrad", (*forms, forms[0]), torch.bfloat16, list_precisions()[(i + 3) % 6]


def label(value):
    return "+".join(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("rule", "forms", "dtype", "precision"), list(cells()), ids=label)
def test_step(rule, forms, dtype, precision, threads):
    """One thread, small chunks, baseline code: right. Everything else: the same bits."""

    def problem(numels=NUMELS, **changes):
        return make_problem(
            rule, numels, param_dtype=dtype, grad_dtype=dtype, formats=forms, precision=precision, **changes
        )

    threads(1)
    small = problem((300, 1, 2048, 5000))
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


@pytest.mark.parametrize("form", [f for f in list_formats() if get_format(f).block])
@pytest.mark.parametrize("isa", ISAS)
def test_bad_and_extreme_gradients(isa, form):
    """NaN and infinities spoil their own elements only; 1e-30 and 1e15 beside each other, zero blocks."""

    def gradients(g, i):
        g[: g.numel() // 2] *= 1e-30
        g[600:900] = 0.0
        g[1100::700] *= 1e15
        for k, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
            g[301 + 500 * k :: 4111] = bad
        return g

    problem = make_problem("adam", (5000, 300), formats=form, grad_values=gradients)
    for item in problem.work.items:
        for state, scale in zip(item.states, item.scales, strict=True):
            scale[2:4].zero_()
            state[512 * get_format(form).bits // 8 : 1024 * get_format(form).bits // 8] = 0
    exact = oracle(problem)
    run(problem, isa)
    for got, want in zip(problem.work.items, exact.work.items, strict=True):
        bad = ~torch.isfinite(got.grad)
        assert torch.equal(torch.isnan(got.param), bad) and torch.equal(torch.isnan(want.param), bad)
        torch.testing.assert_close(got.param[~bad], want.param[~bad], rtol=1e-5, atol=1e-6)
        for state, a, b, sa, sb in zip(
            problem.work.rule.states, got.states, want.states, got.scales, want.scales, strict=True
        ):
            torch.testing.assert_close(sa, sb, rtol=1e-5, atol=0)
            assert torch.isfinite(sa).all()
            form_ = get_format(form)
            off = (code_numbers(form_, state.signed, a) - code_numbers(form_, state.signed, b)).abs()
            assert off.max() <= 1 and (off > 0).sum() <= max(1, 0.01 * off.numel())


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


@pytest.mark.parametrize(("form", "dtype", "precision"), PROBES, ids=label)
def test_probe_writes_only_sums(dtype, form, precision, threads):
    results = []
    for isa in ISAS:
        for count, chunk in ((1, 2048), (2, 16384)):
            threads(count)
            problem = make_problem(
                "lamb", NUMELS, param_dtype=dtype, grad_dtype=dtype, formats=form, precision=precision, chunk=chunk
            )
            before = snapshot(problem)
            exact = oracle(problem)
            assert_bitwise(run(problem, isa, phases=[Phase.PROBE]), before)
            results.append([problem.work.sums])
            torch.testing.assert_close(problem.work.sums.double(), exact.work.sums, rtol=1e-5, atol=0)
    for other in results[1:]:
        assert_bitwise(other, results[0])


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_writes_nothing(rule):
    problem = make_problem(rule, found_inf=1.0)
    before = snapshot(problem)
    assert_bitwise(run(problem), before)


@pytest.mark.parametrize("precision", [p for p in list_precisions() if p != "nearest"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_stores_are_the_reference_bit_for_bit(isa, dtype, precision):
    """SGD without decay is p - lr g in fp32, which torch reproduces exactly; values down to fp16 subnormals, NaN, infinity."""
    keeps = get_precision(precision)
    if dtype not in keeps.dtypes:
        with pytest.raises(ValueError, match="keeps"):
            keeps.for_dtype(dtype)
        return
    changes = {"weight_decay": 0.0, "lr": 0.25}
    problem = make_problem(
        "sgd",
        NUMELS,
        param_dtype=dtype,
        precision=precision,
        hyper_changes=changes,
        grad_values=lambda g, i: g * 10.0 ** (-i),
    )
    for item in problem.work.items[3:]:
        item.param.mul_(1e-6)
        if item.companion is not None and item.companion.is_floating_point():
            item.companion.mul_(1e-6)
        item.grad[5::97] = float("nan")
        item.grad[7::99] = -float("inf")
        item.grad[9::98] = 3.39e38
    expected = []
    for item in problem.work.items:
        row = problem.work.numbers[item.scalar_row]
        x = keeps.load(item.param, item.companion, torch.float32)
        x = x - torch.tensor(row.lr, dtype=torch.float32) * item.grad
        random16 = (
            philox16(row.seed, row.step, item.tensor_id, x.numel(), first=8 * item.first_octet)
            if keeps.random
            else None
        )
        expected.append(keeps.store(x, dtype, random16))
    run(problem, isa)
    for item, (p, companion) in zip(problem.work.items, expected, strict=True):
        assert_same_weights(item.param, p)
        if companion is not None:
            assert_same_weights(item.companion, companion)


def assert_same_weights(got, want):
    """Bit for bit, but for which NaN a NaN is."""
    if want.is_floating_point():
        assert torch.equal(got.isnan(), want.isnan())
        got, want = got.nan_to_num(7.0, float("inf"), -float("inf")), want.nan_to_num(7.0, float("inf"), -float("inf"))
    assert_bitwise([got], [want])


@pytest.mark.parametrize("isa", ISAS)
def test_stochastic_states_are_the_reference_bit_for_bit(isa):
    """Every state draws from its own stream: Adam's moments of a zero state are products that torch reproduces."""
    problem = make_problem("adam", NUMELS, formats="bf16_stochastic")
    want = []
    for item in problem.work.items:
        row = problem.work.numbers[item.scalar_row]
        weights = dict(zip(problem.work.rule.scalar_names, row.scalars, strict=True))
        for i, (state, moment) in enumerate(zip(item.states, (item.grad, item.grad * item.grad), strict=True)):
            state.zero_()
            x = torch.tensor(weights[f"weight{i + 1}"], dtype=torch.float32) * moment
            random16 = philox16(row.seed, row.step, item.tensor_id, x.numel(), stream=1 + i, first=8 * item.first_octet)
            want.append(round_stochastic(x, torch.bfloat16, random16))
    run(problem, isa)
    assert_bitwise([s.clone() for it in problem.work.items for s in it.states], want)


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
    for name in (*list_rules(), "ema", "adam_denominator", "adam_lazy"):
        assert backend.supports(key._replace(rule=name)) is None


def test_a_rule_of_another_version_is_refused(monkeypatch):
    backend = cpu.CpuBackend()
    key = make_problem("adam").work.key
    index, states, scalars, trust_on = backend._rules["adam"]
    monkeypatch.setitem(backend._rules, "adam", (index, states, scalars[::-1], trust_on))
    assert "another version" in backend.supports(key)
