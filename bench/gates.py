"""Gates that need no clock: registers, spills, access widths, launches per step and bytes per parameter.

They are exact and repeatable, so they gate, which times on shared machines cannot. Exits non-zero when one falls short;
what cannot be checked here is listed with the reason (and counts as a failure under --strict).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

import fusedopt
from bench import cases
from bench.providers import backend_why_not
from fusedopt.abi import Phase
from fusedopt.backends.select import backend_names, get_backend
from fusedopt.rule import get_rule

OK, FAIL, UNCHECKED = "ok", "FAIL", "not checked"
PARTS = ("bytes", "launches", "projected", "cuda", "triton", "matrix")
# Registers of a thread that leave room for 512 threads on an SM (65536 registers): with 8 elements each of int8 AdamW on
# bf16 they have 24 KB in flight, and an H200 needs about 25 KB for its bandwidth.
REGISTERS = 128

# Bytes per parameter and step with fp32, bf16 and int8 states: each stream once per read and once per write.
LIMITS = {
    ("adamw", torch.float32): (28, 20, 16.06),
    ("adamw", torch.bfloat16): (22, 14, 10.06),
    ("lion", torch.float32): (20, 16, 14.03),
    ("lion", torch.bfloat16): (14, 10, 8.03),
    ("sgd", torch.float32): (20, 16, 14.03),
    ("sgd", torch.bfloat16): (14, 10, 8.03),
    ("lamb", torch.float32): (40, 28, 22.09),
    ("lamb", torch.bfloat16): (28, 20, 14.09),
}
# The probe of LAMB reads p, g and the states again, and so moves a little more than the limit above.
LAMB_PLAN = {torch.float32: (44, 32, 26.09), torch.bfloat16: (34, 22, 16.09)}
STATE_LIMITS = {"adamw": (8, 4, 2.03), "lion": (4, 2, 1.02), "sgd": (4, 2, 1.02), "lamb": (8, 4, 2.03)}
FORMATS = ("fp32", "bf16", "int8")
LAUNCHES = {"adamw": 1, "lion": 1, "sgd": 1, "lamb": 2}
OPTIONS = {"sgd": {"momentum": 0.9}}
CLIPS = (None, 1.0)


@dataclass(frozen=True)
class Gate:
    """One line of the table: a measured value and the limit it is held against."""

    part: str
    what: str
    value: str
    limit: str
    status: str
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", action="append", metavar="SM", help="such as sm_90: compile for these targets only")
    parser.add_argument("--strict", action="store_true", help="what cannot be checked fails")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def model(shapes, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Parameters with gradients in two groups, matrices with weight decay and vectors without."""
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype, device=device))
        p.grad = torch.full_like(p, 1e-3)
        params.append(p)
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01}]
    vectors = [p for p in params if p.dim() <= 1]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def available_backends(device: torch.device) -> dict[str, str | None]:
    """Name: None, or why not. Not interpreted Triton, which takes minutes, nor the reference beside a faster one."""
    case = cases.Case("gates", ((64,),))
    out = {}
    for name in backend_names():
        out[name] = backend_why_not(name, "adamw", ("fp32", "fp32"), "nearest", case, device)
        if name == "triton" and device.type == "cpu":
            out[name] = "needs a GPU"
    if sum(why is None for why in out.values()) > 1:
        del out["reference"]
    return out


@contextlib.contextmanager
def counted(backend) -> Iterator[list[Phase]]:
    """Collects the phase of every launch a backend is asked for inside the context."""
    calls: list[Phase] = []
    launch = backend.launch

    def counting(work):
        calls.append(work.phase)
        return launch(work)

    backend.launch = counting
    try:
        yield calls
    finally:
        del backend.launch


def launch_gates(device: torch.device, elements: int = 1 << 20) -> list[Gate]:
    """Launches per step of the 291 tensors of Llama 2 7B, scaled down, in two groups; planned and counted."""
    shapes = cases.select(["llama2_7b"])[0].shrunk(elements).shapes
    rows = []
    for name, why in available_backends(device).items():
        if why is not None:
            rows.append(Gate("launches", f"{name}, {device.type} tensors", "-", "-", UNCHECKED, why))
            continue
        for rule, fused in LAUNCHES.items():
            for form in ("fp32", "int8"):
                for clip in CLIPS:
                    expected = fused + (clip is not None)
                    opt = fusedopt.create(
                        rule, model(shapes, torch.float32, device), lr=1e-4, state_format=form, backend=name,
                        min_quantized_numel=0, clip_grad_norm=clip, **OPTIONS.get(rule, {}),
                    )  # fmt: skip
                    planned = sum(len(bucket["phases"]) for bucket in opt.plan().buckets)
                    with counted(get_backend(name)) as calls:
                        opt.step()
                    good = len(calls) == planned == expected
                    note = "" if planned == len(calls) else f"the plan says {planned}"
                    what = f"{name} {rule} {form}, {len(shapes)} tensors, 2 groups{', clip' if clip else ''}"
                    rows.append(Gate("launches", what, str(len(calls)), str(expected), OK if good else FAIL, note))
    return rows


def bytes_gates(device: torch.device) -> list[Gate]:
    """Bytes per parameter: moved by a step as planned, and held by the states as allocated."""
    rows = []
    shapes = [(512, 512), (256, 1024)]
    elements = 2 * 512 * 512
    for (rule, dtype), limits in LIMITS.items():
        for i, form in enumerate(FORMATS):
            options = {"lr": 1e-4, "state_format": form, "clip_grad_norm": None, **OPTIONS.get(rule, {})}
            opt = fusedopt.create(rule, model(shapes, dtype, device), **options)
            moved = opt.plan().bytes / elements
            held = fusedopt.state_bytes(opt) / elements
            bound = LAMB_PLAN[dtype][i] if rule == "lamb" else limits[i]
            note = f"physical limit {limits[i]}: the probe reads p, g and the states again" if rule == "lamb" else ""
            what = f"{rule} {form} states, p and g {str(dtype).removeprefix('torch.')}"
            rows.append(_bound("bytes", what, moved, bound, note))
            rows.append(_bound("bytes", f"{what}: held by states", held, STATE_LIMITS[rule][i], ""))
    return rows


def projected_gates(device: torch.device, elements: int = 1 << 20) -> list[Gate]:
    """Projected and factored optimizers: launches and products counted and planned, bytes as planned (gates_projected)."""
    module = importlib.import_module("bench.gates_projected")
    rows = []
    for name, why in available_backends(device).items():
        if why is not None:
            rows.append(Gate("projected", f"{name}, {device.type} tensors", "-", "-", UNCHECKED, why))
            continue
        for what, found, expected in module.launch_rows(name, device, counted, elements):
            rows.append(Gate("projected", what, found, expected, OK if found == expected else FAIL))
    return rows + [_bound("projected", *row) for row in module.bytes_rows(device)]


def _bound(part: str, what: str, value: float, limit: float, note: str) -> Gate:
    """Limits are given to two decimals, and step counts add a few bytes to the states of a tensor."""
    return Gate(part, what, f"{value:.2f}", f"{limit:.2f}", OK if value <= limit + 0.01 else FAIL, note)


def _widths(counts: dict) -> str:
    return "+".join(f"{n}x{bits // 8}B" for bits, n in sorted(counts.items(), reverse=True) if bits >= 64) or "none"


def _wide(counts: dict, bits: int) -> int:
    return sum(n for width, n in counts.items() if width >= bits)


def resource_gates(part: str, row: dict, loads: tuple, stores: tuple, ceiling: int = REGISTERS) -> list[Gate]:
    """Gates of one compiled kernel.

    row: of gates_cuda.resources or gates_triton.resources. loads, stores: the fewest (16-byte, 8-byte) accesses.
    """
    target = row.get("arch") or row["target"]
    what = f"{row['kernel']} {target}"
    registers, spills = row["registers"], row["spills"]
    rows = [
        Gate(part, f"{what}: registers", str(registers), f"<= {ceiling}", OK if registers <= ceiling else FAIL),
        Gate(part, f"{what}: spills and stack", str(spills), "0", OK if spills == 0 else FAIL),
    ]
    for kind, (full, half) in (("loads", loads), ("stores", stores)):
        if full + half:
            counts = row[kind]
            good = _wide(counts, 128) >= full and _wide(counts, 64) >= full + half
            limit = f">= {full}x16B" + (f"+{half}x8B" if half else "")
            rows.append(Gate(part, f"{what}: wide {kind}", _widths(counts), limit, OK if good else FAIL))
    return rows


def _rule_name(functor: str) -> str:
    """ "AdamAmsgrad" -> "adam_amsgrad"."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in functor).lstrip("_")


def cuda_gates(archs: list[str] | None) -> list[Gate]:
    """A CUDA kernel serves every format and dtype of its rule: for each stream the 8 values of a lane are two 16-byte
    accesses in fp32, one in 16 bits, one of 8 bytes in codes. Then each mode of AdamW by itself."""
    module = importlib.import_module("bench.gates_cuda")
    why = module.missing()
    if why is not None:
        return [Gate("cuda", "compiled kernels", "-", "-", UNCHECKED, why)]
    chosen = module.ARCHS if archs is None else tuple(a for a in archs if a.startswith("sm_"))
    rows = []
    for row in module.resources(chosen):
        functor, _, probe = row["kernel"].partition(" ")
        loads, stores = {"encode": ((3, 0), (0, 1)), "decode": ((0, 1), (3, 0))}.get(functor, ((0, 0), (0, 0)))
        if _rule_name(functor) in fusedopt.list_rules():
            states = len(get_rule(_rule_name(functor)).states)
            loads = (2 * (2 + states), states)
            stores = (0, 0) if probe else (2 * (1 + states), states)
        rows += resource_gates("cuda", row, loads, stores)
    return rows + mode_gates(chosen)


def mode_gates(archs: tuple[str, ...]) -> list[Gate]:
    """Formats and precisions of AdamW, each compiled alone: what a lane runs and moves for its 8 elements."""
    module = importlib.import_module("bench.gates_cuda_modes")
    rows = []
    for row in module.compiled(archs):
        form, precision, *_ = row["mode"]
        what = f"adamw {form} states, bf16 p and g, {precision} {row['arch']}"
        count, budget = row["instructions"], module.budget(row["mode"])
        good = OK if count <= budget else FAIL
        rows.append(Gate("cuda", f"{what}: instructions per parameter", f"{count:.1f}", f"<= {budget:.0f}", good))
        for kind, expected in zip(("loads", "stores"), module.expected(row["mode"]), strict=True):
            good = OK if {b: n for b, n in row[kind].items() if b >= 64} == expected else FAIL
            rows.append(Gate("cuda", f"{what}: {kind} of a lane", _widths(row[kind]), _widths(expected), good))
        value = f"{row['spills']}, {row['loops'] - 1}"
        good = OK if value == "0, 0" else FAIL
        rows.append(Gate("cuda", f"{what}: local memory, searches (inner loops)", value, "0, 0", good))
    return rows


def triton_gates(targets: list[str] | None) -> list[Gate]:
    """A Triton kernel is compiled for its formats and dtypes: 16-byte accesses for every stream, 8 for 8-bit codes, 4 for
    int4 (gates_triton._needs says why)."""
    module = importlib.import_module("bench.gates_triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [Gate("triton", "compiled kernels", "-", "-", UNCHECKED, "TRITON_INTERPRET=1 is set: unset it")]
    by_name = {str(case): case for case in module.CASES}
    rows = []
    for row in module.resources(tuple(targets or module.TARGETS)):
        case, needs = by_name[row["kernel"]], row["needs"]
        wide = [(needs[kind].get(128, 0), needs[kind].get(64, 0)) for kind in ("loads", "stores")]
        rows += resource_gates("triton", row, *wide, module.register_ceiling(case, row["target"]))
        budget = module.budget(case, row["target"])
        if budget is not None:
            count, what = row["per_parameter"], f"{row['kernel']} {row['target']}: instructions per parameter"
            rows.append(Gate("triton", what, f"{count:.1f}", f"<= {budget}", OK if count <= budget else FAIL))
    others = {str(case): case for case in module.OTHERS}
    for row in module.resources((targets or ("sm_90",))[:1], module.OTHERS):
        limit = module.register_ceiling(others[row["kernel"]], row["target"])
        good = OK if row["registers"] <= limit and row["spills"] == 0 else FAIL
        what, value = f"{row['kernel']} {row['target']}: registers, spills", f"{row['registers']}, {row['spills']}"
        rows.append(Gate("triton", what, value, f"<= {limit}, 0", good))
    return rows


def matrix_gates(targets: list[str] | None) -> list[Gate]:
    """Triton kernels on matrices: also instructions of the matrix units, and shared memory (gates_matrix)."""
    module = importlib.import_module("bench.gates_matrix")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [Gate("matrix", "compiled kernels", "-", "-", UNCHECKED, "TRITON_INTERPRET=1 is set: unset it")]
    by_name = {str(case): case for case in module.CASES}
    rows = []
    for row in module.resources(None if targets is None else tuple(targets)):
        case, needs, what = by_name[row["kernel"]], row["needs"], f"{row['kernel']} {row['target']}"
        rows += resource_gates(
            "matrix", row, needs["loads"], needs["stores"], module.register_ceiling(case, row["target"])
        )
        for name, value, low, high in module.limits(case, row):
            good = low <= value <= high
            limit = f"<= {high}" if low == 0 else f">= {low}"
            rows.append(Gate("matrix", f"{what}: {name}", str(value), limit, OK if good else FAIL))
    return rows


def check(parts=PARTS, device: torch.device | None = None, archs: list[str] | None = None) -> list[Gate]:
    """All gates of the named parts. A part whose tools are missing gives one line that says so."""
    device = device or torch.device("cpu")
    runs = {
        "bytes": lambda: bytes_gates(device),
        "launches": lambda: launch_gates(device),
        "projected": lambda: projected_gates(device),
        "cuda": lambda: cuda_gates(archs),
        "triton": lambda: triton_gates(archs),
        "matrix": lambda: matrix_gates(archs),
    }
    rows = []
    for part in parts:
        try:
            rows += runs[part]()
        except ImportError as error:
            rows.append(Gate(part, "compiled kernels", "-", "-", UNCHECKED, f"cannot import: {error}"))
        except Exception as error:  # a kernel that no longer compiles falls short; the other parts are still checked
            text = f"{type(error).__name__}: {error}"
            text = text if len(text) < 2000 else text[:1000] + " ... " + text[-1000:]
            rows.append(Gate(part, "all", "-", "-", FAIL, text))
    return rows


def table(rows: list[Gate]) -> str:
    width = max((len(row.what) for row in rows), default=4)
    lines = [f"{'part':11}{'gate':{width}}  {'value':>20}  {'limit':>15}  status"]
    for row in rows:
        note = f"  ({row.note})" if row.note else ""
        lines.append(f"{row.part:11}{row.what:{width}}  {row.value:>20}  {row.limit:>15}  {row.status}{note}")
    counts = {s: sum(row.status == s for row in rows) for s in (OK, FAIL, UNCHECKED)}
    lines.append(", ".join(f"{n} {s}" for s, n in counts.items()))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    rows = check(args.part or PARTS, torch.device(args.device), args.arch)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))
    bad = {FAIL, UNCHECKED} if args.strict else {FAIL}
    return int(any(row.status in bad for row in rows))
