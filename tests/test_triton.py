"""The Triton backend, interpreted on the CPU (TRITON_INTERPRET=1), against the fp64 reference and bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from harness import (  # noqa: E402
    RULES,
    assert_bitwise,
    assert_close,
    assert_guards,
    clone,
    code_numbers,
    make_problem,
    oracle,
    snapshot,
)

import fusedopt  # noqa: E402, F401  (registers the rules)
from fusedopt.abi import GRAIN_SIZE, Phase  # noqa: E402
from fusedopt.backends.base import BucketKey  # noqa: E402
from fusedopt.backends.reference import ReferenceBackend  # noqa: E402
from fusedopt.backends.triton import TritonBackend, interpreted  # noqa: E402
from fusedopt.formats import get_format, list_formats  # noqa: E402
from fusedopt.precision import get_precision, list_precisions  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKEND = TritonBackend()
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 when Triton is imported"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy on NaN
]

CODED = [name for name in list_formats() if get_format(name).block]
# Types of p, g and rounding beside each format. Every rule takes each.
STORAGE = {
    "fp32": (F32, F32, "nearest"),
    "bf16": (BF16, BF16, "nearest"),
    "bf16_stochastic": (F16, BF16, "nearest"),
    "int8": (BF16, BF16, "stochastic"),
    "int8c": (F16, F32, "stochastic"),
    "fp8": (F32, BF16, "nearest"),
    "int4": (BF16, F16, "stochastic"),
}
NUMELS = (300, 1, 2048, 2501)


def check(problem, clip: bool = False):
    exact = oracle(problem, clip)
    problem.run(BACKEND, clip)
    assert_close(problem, exact)
    assert_guards(problem)
    assert not problem.work.counters.any(), "counters were left non-zero"
    return exact


def seed_of(rule: str) -> int:
    return 1 if rule == "lion" else 0  # data without a sign that hangs on the last bit of fp32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("formats", list_formats())
def test_every_rule_in_every_format(rule, formats):
    param, grad, precision = STORAGE[formats]
    check(
        make_problem(
            rule,
            NUMELS,
            param_dtype=param,
            grad_dtype=grad,
            formats=formats,
            precision=precision,
            seed=seed_of(rule),
        )
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", list_precisions())
def test_every_rule_in_every_precision(rule, precision):
    check(make_problem(rule, NUMELS, param_dtype=BF16, precision=precision, seed=seed_of(rule)))


@pytest.mark.parametrize("precision", [name for name in list_precisions() if F16 in get_precision(name).dtypes])
@pytest.mark.parametrize("offset", (0, 1))
def test_fp16_parameters_in_every_precision(precision, offset):
    check(make_problem("adam", (2300, 5), param_dtype=F16, grad_dtype=F16, precision=precision, offset=offset))


@pytest.mark.parametrize(
    "rule,formats",
    (
        ("adam", ("int8", "int4")),
        ("adam", ("int4", "fp8")),
        ("adam", ("bf16_stochastic", "int8c")),
        ("adam_amsgrad", ("int8", "bf16", "fp32")),
        ("adam_amsgrad", ("fp8", "bf16_stochastic", "int4")),
        ("lamb", ("int8c", "int4")),
    ),
)
def test_mixed_formats(rule, formats):
    check(make_problem(rule, (3000, 129), param_dtype=BF16, formats=formats, precision="kahan"))


@pytest.mark.parametrize("rule", ("adam", "sgd_momentum", "lars_momentum", "lamb"))
@pytest.mark.parametrize("offset", (0, 1))
def test_clip_unscale_maximize(rule, offset):
    problem = make_problem(
        rule, (4200, 5), param_dtype=BF16, grad_dtype=F16, max_norm=0.5, grad_scale=64.0, maximize=True, offset=offset
    )  # fmt: skip
    exact = check(problem, clip=True)
    torch.testing.assert_close(problem.work.norm.double(), exact.work.norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(problem.work.clip.double(), exact.work.clip, rtol=1e-5, atol=0)


@pytest.mark.parametrize("numels", ((127, 129, 255, 257, 2), (2047, 2049, 1)))
@pytest.mark.parametrize("offset", (0, 3))
@pytest.mark.parametrize(
    "formats,precision", tuple(zip(CODED, ("split24", "split32", "stochastic", "kahan"), strict=True))
)
def test_tails_and_misaligned_rows(numels, offset, formats, precision):
    check(
        make_problem(
            "adam", numels, param_dtype=BF16, grad_dtype=BF16, formats=formats, precision=precision, offset=offset
        )
    )


def test_the_unused_half_of_an_odd_tail_is_zero():
    """Its second moment decodes to 1 / 16 of the scale, which would be the largest of all that is left of a block."""
    problem = make_problem("adam", (131,), formats="int4", hyper_changes={"betas": (0.9, 0.5), "weight_decay": 0.0})
    item = problem.work.items[0]
    item.grad.mul_(1e-12)
    item.states[1].zero_()
    item.scales[1].fill_(1e-20)
    problem.run(BACKEND)
    assert_guards(problem)
    assert [int(codes[-1]) & 15 for codes in item.states] == [7, 0]


@pytest.mark.parametrize("rule", ("lamb", "lars_momentum"))
def test_empty_rows_are_no_rows(rule):
    with_empty, without = (make_problem(rule, numels, formats="int8") for numels in ((7, 0), (7,)))
    for problem in (with_empty, without):
        problem.run(BACKEND)
        assert not problem.work.counters.any()
    assert torch.equal(with_empty.params[0], without.params[0])


@pytest.mark.parametrize(
    "rule,formats,precision",
    (("adam", "int4", "kahan"), ("lamb", "int8", "split24"), ("lars_momentum", "fp8", "master")),
)
def test_found_inf_writes_nothing(rule, formats, precision):
    problem = make_problem(rule, (2100,), param_dtype=BF16, formats=formats, precision=precision, found_inf=1.0)
    before = snapshot(problem)
    problem.run(BACKEND)
    assert_bitwise(before, snapshot(problem))
    assert not problem.work.counters.any()


def test_found_inf_zero_steps():
    check(make_problem("adam", (300,), found_inf=0.0))


@pytest.mark.parametrize(
    "rule,formats,precision",
    (
        ("adam", ("int8", "int4"), "stochastic"),
        ("lamb", ("bf16_stochastic", "int8c"), "kahan"),
        ("lars_momentum", "fp8", "split24"),
    ),
)
def test_results_do_not_depend_on_chunk_size(rule, formats, precision):
    outcomes = []
    for chunk in (GRAIN_SIZE, 3 * GRAIN_SIZE, 16 * GRAIN_SIZE):
        problem = make_problem(
            rule,
            (20000, 3),
            param_dtype=BF16,
            grad_dtype=BF16,
            formats=formats,
            precision=precision,
            max_norm=0.5,
            chunk=chunk,
        )
        problem.run(BACKEND, clip=True)
        outcomes.append([*snapshot(problem), problem.work.norm, problem.work.clip])
    assert_bitwise(outcomes[0], outcomes[1])
    assert_bitwise(outcomes[0], outcomes[2])


def test_norm_of_several_launches():
    """The last of several NORM launches combines the totals of all. Without `sums` only gradients are read."""
    first, second = (make_problem("adam", n, max_norm=1.0, seed=i) for i, n in enumerate([(5000, 0, 30), (100,)]))
    shared = {"totals": torch.zeros(2), "norm": torch.zeros(1), "clip": torch.zeros(1), "sums": None, "total_count": 2}
    for index, problem in enumerate((first, second)):
        for item in problem.work.items:
            item.param.fill_(float("nan"))
        BACKEND.launch(replace(problem.work, phase=Phase.NORM, total_index=index, cache={}, **shared))
        assert not problem.work.counters.any()
    grads = [item.grad.double() for p in (first, second) for item in p.work.items]
    want = torch.cat(grads).norm()
    torch.testing.assert_close(shared["norm"].double(), want.view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(shared["clip"].double(), (1 / (want + 1e-6)).clamp(max=1).view(1), rtol=1e-6, atol=0)


def test_norm_without_elements():
    problem = make_problem("adam", (0, 0), max_norm=1.0)
    problem.work.norm.fill_(7)
    BACKEND.launch(replace(problem.work, phase=Phase.NORM, cache={}))
    assert problem.work.norm.item() == 0 and problem.work.clip.item() == 1


@pytest.mark.parametrize("formats", CODED)
def test_a_nan_gradient_spoils_its_own_element(formats):
    """Its parameter; its codes are their block's largest, and the scales are those of the other elements."""
    problem = make_problem("adam", (600,), formats=formats)
    item = problem.work.items[0]
    item.grad[300] = float("nan")
    exact = oracle(problem)
    problem.run(BACKEND)
    assert problem.params[0].isnan().nonzero().tolist() == [[300]]
    for got, want in zip(item.scales, exact.work.items[0].scales, strict=True):
        assert got.isfinite().all() and (got > 0).all()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for state, codes, scale, signed in zip(
        item.states, exact.work.items[0].states, item.scales, (True, False), strict=True
    ):
        form = get_format(formats)
        share = form.decode(state, scale, signed, F32, 600)[300] / scale[300 // form.block]
        assert share > 0.88
        differ = (code_numbers(form, signed, state) != code_numbers(form, signed, codes)).sum()
        assert differ <= 6


@pytest.mark.parametrize("formats", CODED)
def test_zeros_stay_zero(formats):
    """A block without gradients keeps zero codes and a zero scale; its neighbour of tiny gradients does not round to 0."""
    problem = make_problem("adam", (1024,), formats=formats, hyper_changes={"weight_decay": 0.0})
    item, form = problem.work.items[0], get_format(formats)
    for state, scale, signed in zip(item.states, item.scales, (True, False), strict=True):
        state.fill_(form.zero_code(signed))
        scale.zero_()
    item.grad[:512] = 0.0
    item.grad[512:] = 1e-15 * item.grad[512:].sign()
    check(problem)
    half = 512 // form.block
    for state, scale, signed in zip(item.states, item.scales, (True, False), strict=True):
        assert (scale[:half] == 0).all() and (scale[half:] > 0).all()
        assert (state[: 512 * form.bits // 8] == form.zero_code(signed)).all()
    item.grad[600] = 1e12  # what is 1e27 times larger leaves the others' second moments above zero
    check(problem)
    v = form.decode(item.states[1], item.scales[1], False, F32, 1024)
    assert (v[512:] > 0).all()


def test_master_weights_are_the_weights():
    """p is only written; a phase without stores writes neither."""
    problem = make_problem("lamb", (2300,), param_dtype=BF16, precision="master")
    exact = oracle(problem)
    problem.params[0].fill_(float("nan"))
    before = snapshot(problem)
    problem.run(BACKEND, phases=(Phase.PROBE,))
    assert_bitwise(before, snapshot(problem))
    problem.run(BACKEND)
    assert_close(problem, exact)


@pytest.mark.parametrize("precision", ("split24", "split32"))
def test_a_parameter_that_was_zeroed_drops_negative_low_bits(precision):
    problem = make_problem("sgd", (300,), param_dtype=BF16, precision=precision)
    problem.params[0][::3] = 0.0
    assert (problem.work.items[0].companion[::3] < 0).any()
    check(problem)


def test_zero_gradient_and_zero_lr_change_no_parameter():
    problem = make_problem("adam", (300,), param_dtype=BF16, precision="stochastic", hyper_changes={"lr": 0.0})
    problem.work.items[0].grad.zero_()
    before = problem.params[0].clone()
    problem.run(BACKEND)
    assert torch.equal(before, problem.params[0])


def test_supports_names_the_reason():
    key = BucketKey(torch.device("cpu"), "triton", "adam", F32, F32, ("fp32", "fp32"), "nearest", True)
    assert BACKEND.supports(key) is None
    assert "float64" in BACKEND.supports(key._replace(param_dtype=torch.float64))
    assert "meta" in BACKEND.supports(key._replace(device=torch.device("meta")))


def test_reference_sees_the_same_sums():
    problem = make_problem("lars", (4100, 9))
    exact = clone(problem)
    exact.run(ReferenceBackend(torch.float64), phases=(Phase.NORM,))
    problem.run(BACKEND, phases=(Phase.NORM,))
    torch.testing.assert_close(problem.work.sums.double(), exact.work.sums, rtol=1e-6, atol=0)
