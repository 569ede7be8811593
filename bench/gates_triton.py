"""Registers, spills, access widths and instructions of the Triton step kernel, compiled ahead of time without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fusedopt.abi import Phase
from fusedopt.rule import get_rule

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    rule: str
    formats: str | tuple = "fp32"
    param: torch.dtype = F32
    grad: torch.dtype = F32
    precision: str = "nearest"
    phase: Phase = Phase.FUSED
    aligned: bool = True

    def __str__(self) -> str:
        short = {F32: "f32", BF16: "bf16", F16: "f16"}
        formats = self.formats if isinstance(self.formats, str) else "+".join(self.formats)
        types = f"p:{short[self.param]} g:{short[self.grad]}"
        text = f"{self.rule} {formats} {types} {self.precision} {self.phase.name.lower()}"
        return text if self.aligned else text + " unaligned"


def register_ceiling(case: Case, target: str) -> int:
    """128 registers of 256 threads let two programs share an NVIDIA SM. Three int8 states and unaligned rows run one."""
    if target.startswith("gfx"):
        return 256
    return 192 if not case.aligned or case.formats == "int8" and len(get_rule(case.rule).states) > 2 else 128


# Every rule in its cheapest and its densest storage; other formats, types and phases where they take other code.
CASES = (
    *(Case(rule) for rule in ("sgd", "sgd_momentum", "adam", "adam_amsgrad", "lion", "lars_momentum")),
    *(
        Case(rule, "int8", BF16, BF16, "stochastic")
        for rule in ("sgd_momentum", "adam", "adam_amsgrad", "lion", "lars_momentum")
    ),
    Case("lars", "fp32", BF16, BF16),
    Case("adam", ("int8", "bf16"), F32, BF16),
    Case("adam", "bf16", F16, F16, "stochastic"),
    Case("adam", "int8", BF16, BF16, aligned=False),
    Case("lamb", "fp32", phase=Phase.PROBE),
    Case("lamb", "int8", BF16, BF16, "stochastic", Phase.APPLY),
    Case("sgd", "fp32", BF16, BF16, phase=Phase.NORM),
    Case("lars", "fp32", phase=Phase.NORM),
)


def _source(case: Case):
    from triton.compiler import ASTSource

    import fusedopt  # noqa: F401  (registers the rules)
    from fusedopt.backends.triton import constants
    from fusedopt.formats import get_format
    from fusedopt.kernels.driver import step_kernel
    from fusedopt.rule import get_rule

    rule = get_rule(case.rule)
    names = (case.formats,) * len(rule.states) if isinstance(case.formats, str) else case.formats
    fixed = constants(
        rule, [get_format(n) for n in names], case.param, case.grad, case.precision, case.phase, case.aligned
    )
    reduces = case.phase in (Phase.NORM, Phase.PROBE)
    absent = set() if reduces else {"partials", "totals", "norm", "counters"}
    absent |= {"found_inf"} if reduces else set()
    absent |= set() if rule.trust_on else {"sums"}
    fixed |= dict.fromkeys(absent)
    types = {"table": "*i64", "chunks": "*i64", "counters": "*i32", "max_norm": "fp32"}
    integers = ("rows", "live_rows", "chunk", "total_index", "total_count")
    types |= dict.fromkeys(integers, "i32")
    signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in step_kernel.arg_names}
    return ASTSource(step_kernel, signature, fixed), fixed


def _cuda_resources(kernel) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    widths: dict[str, Counter] = {"LDG": Counter(), "STG": Counter()}
    for op in instructions:
        name, *flags = op.split(".")
        if name in widths:
            narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths[name][next((narrow[f] for f in flags if f in narrow), 32)] += 1
    return {
        "registers": use["REG"],
        "spills": use["STACK"] + use["LOCAL"] + sum(op.startswith(("LDL", "STL")) for op in instructions),
        "shared": use["SHARED"],
        "loads": dict(widths["LDG"]),
        "stores": dict(widths["STG"]),
        "instructions": len(instructions),
        "barriers": sum(op.startswith("BAR") for op in instructions),
    }


def _hip_resources(kernel) -> dict:
    text = kernel.asm["amdgcn"]
    number = {
        k: int(v)
        for k, v in re.findall(
            r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size|group_segment_fixed_size):\s+(\d+)",
            text,
            re.M,
        )
    }
    widths = {}
    for kind in ("load", "store"):
        found = re.findall(
            rf"\b(?:global|buffer)_{kind}_(dwordx4|dwordx3|dwordx2|dword|short|ushort|byte|ubyte|sbyte|sshort)", text
        )
        size = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
        widths[kind] = dict(Counter(size.get(w, 16 if "short" in w else 8) for w in found))
    return {
        "registers": number["vgpr_count"],
        "spills": number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        "shared": number["group_segment_fixed_size"],
        "loads": widths["load"],
        "stores": widths["store"],
        "instructions": len(re.findall(r"^\s+[vs]_|^\s+(?:global|ds|buffer)_", text, re.M)),
        "barriers": len(re.findall(r"s_barrier", text)),
    }


def _needs(case: Case) -> dict:
    """Accesses of full tiles: {"loads": {bits: count}, "stores": ...}. A thread has 8 elements of each stream."""
    from fusedopt.formats import get_format
    from fusedopt.rule import get_rule

    rule = get_rule(case.rule)
    if not case.aligned:
        return {"loads": {}, "stores": {}}
    if case.phase == Phase.NORM:  # the loop may stay rolled, with 16 elements a thread
        streams = [case.grad, case.param] if rule.trust_on else [case.grad]
        return {"loads": {128: sum(dtype.itemsize for dtype in streams)}, "stores": {}}
    names = (case.formats,) * len(rule.states) if isinstance(case.formats, str) else case.formats
    sizes = [get_format(name).storage.itemsize for name in names]
    written = Counter(
        64 if size == 1 else 128 for size in (case.param.itemsize, *sizes) for _ in range(max(1, size // 2))
    )
    read = written + Counter({128: max(1, case.grad.itemsize // 2)})
    return {"loads": dict(read), "stores": dict(written) if case.phase != Phase.PROBE else {}}


def compile_case(case: Case, target: str):
    """The compiled kernel of a case; `asm` holds every stage."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fusedopt.kernels.driver import launch_options

    hip = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source, fixed = _source(case)
    return triton.compile(source, target=machine, options=launch_options(fixed, nvidia=not hip))


def _resources(job: tuple[Case, str]) -> dict:
    case, target = job
    kernel = compile_case(case, target)
    use = _hip_resources(kernel) if target.startswith("gfx") else _cuda_resources(kernel)
    return {"kernel": str(case), "target": target, **use, "needs": _needs(case)}


def resources(targets=TARGETS, cases=CASES, workers: int = 2) -> list[dict]:
    """One dict per case and target: kernel, target, registers, spills, shared (bytes), loads and stores ({bits:
    count}),
    instructions, barriers, needs (the accesses its streams come to in full tiles). Must not run under
    TRITON_INTERPRET=1."""
    jobs = [(case, target) for case in cases for target in targets]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_resources, jobs, chunksize=1))


if __name__ == "__main__":
    import json
    import sys

    for row in resources(tuple(sys.argv[1:]) or TARGETS):
        print(json.dumps(row))
