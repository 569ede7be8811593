"""Registers, spills, access widths and instructions of the Triton step kernel, compiled ahead of time without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import fusedopt  # noqa: F401  (registers the rules)
from bench.sass import access_widths, main_loop
from fusedopt.abi import Phase
from fusedopt.formats import get_format
from fusedopt.precision import get_precision
from fusedopt.rule import get_rule, list_rules

WORKERS = min(12, os.cpu_count() or 1)  # processes that compile
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

    @property
    def names(self) -> tuple[str, ...]:
        return (self.formats,) * len(get_rule(self.rule).states) if isinstance(self.formats, str) else self.formats


class Blockwise(NamedTuple):
    """A public quantisation kernel; encode: quantize, otherwise dequantize."""

    formats: str
    signed: bool
    encode: bool
    dtype: torch.dtype = BF16
    aligned: bool = True

    def __str__(self) -> str:
        name = "quantize" if self.encode else "dequantize"
        return f"{name} {self.formats} {'signed' if self.signed else 'unsigned'} {str(self.dtype)[6:]}"


def register_ceiling(case: Case | Blockwise, target: str) -> int:
    """128 registers of 256 threads let two programs share an NVIDIA SM. Three coded states and unaligned rows run one."""
    if target.startswith("gfx"):
        return 256
    if isinstance(case, Blockwise):
        return 64
    coded = sum(get_format(name).block > 0 for name in case.names)
    heavy = ("coded" if coded else "plain") in get_rule(case.rule).heavy
    return 192 if not case.aligned or coded > 2 or heavy else 128


# A few rules in their cheapest and in a dense storage; formats, precisions, types and phases where they take other code.
CASES = (
    *(Case(rule) for rule in ("sgd", "sgd_momentum", "adam", "lion", "lars_momentum")),
    *(Case(rule, "int8", BF16, BF16, "stochastic") for rule in ("adam", "adam_amsgrad")),
    *(Case("adam", formats, BF16, BF16) for formats in ("int8", "int8c", "fp8", "int4")),
    *(Case("lion", formats, BF16, BF16, "stochastic") for formats in ("int8c", "fp8", "int4")),
    *(Case("adam", "fp32", BF16, BF16, precision) for precision in ("kahan", "split24", "split32", "master")),
    Case("adam_amsgrad", ("int8c", "fp8", "int4"), BF16, BF16, "stochastic"),
    Case("adam", "int4", F16, F16, "kahan"),
    Case("adam", "bf16_stochastic", BF16, BF16, "split24"),
    Case("lars", "fp32", BF16, BF16),
    Case("adam", ("int8", "bf16"), F32, BF16),
    Case("adam", "bf16", F16, F16, "stochastic"),
    Case("adam", "int8", BF16, BF16, aligned=False),
    Case("adam", "int4", BF16, BF16, "split24", aligned=False),
    Case("lamb", "fp32", phase=Phase.PROBE),
    Case("lamb", "int8", BF16, BF16, "stochastic", Phase.APPLY),
    Case("lamb", "int8c", BF16, BF16, "split32", Phase.PROBE),
    Case("sgd", "fp32", BF16, BF16, phase=Phase.NORM),
    Case("lars", "fp32", phase=Phase.NORM),
    *(Blockwise("int4", True, encode) for encode in (True, False)),
    Blockwise("int8", False, True, F32),
)
# Every other rule and its probe, with plain states and with the codes that take most registers.
NAMED = {case.rule for case in CASES if isinstance(case, Case)}


def _others():
    for rule in (name for name in list_rules() if name not in NAMED):
        states = get_rule(rule).states
        formats = tuple("fp32" if state.wide else "int4" for state in states)
        for phase in (Phase.FUSED, Phase.PROBE) if get_rule(rule).probes else (Phase.FUSED,):
            yield Case(rule, phase=phase)
            if "int4" in formats:
                yield Case(rule, formats, BF16, BF16, "stochastic", phase)


OTHERS = tuple(_others())

# Instructions executed for each parameter of AdamW with bf16 parameters and gradients: a ceiling for sm_90 and Triton 3.9.
# At the memory limit an H200 has time for about 78 with 8-bit states and 63 with int4 (DESIGN, section 5).
INSTRUCTIONS = {"int8": 116, "int8c": 67, "fp8": 72, "int4": 98}


def budget(case: Case | Blockwise, target: str) -> int | None:
    """Instructions executed for each parameter, at most, where a case has a limit."""
    if target != "sm_90" or case not in [Case("adam", name, BF16, BF16) for name in INSTRUCTIONS]:
        return None
    return INSTRUCTIONS[case.formats]


def _source(case: Case | Blockwise):
    from triton.compiler import ASTSource

    from fusedopt.backends.triton import constants
    from fusedopt.kernels.driver import launch_options, step_kernel
    from fusedopt.kernels.quantize import dequantize_kernel, quantize_kernel

    if isinstance(case, Blockwise):
        element = {F32: "*fp32", BF16: "*bf16", F16: "*fp16"}[case.dtype]
        kernel = quantize_kernel if case.encode else dequantize_kernel
        fixed = {"FORMAT": get_format(case.formats).code(case.signed), "ALIGNED": case.aligned}
        types = {"x": element, "out": element, "codes": "*u8", "scale": "*fp32", "numel": "i64"}
        signature = {n: "constexpr" if n in fixed else types[n] for n in kernel.arg_names}
        divisible = {(i,): [["tt.divisibility", 16]] for i in range(4) if kernel.arg_names[i] != "numel"}
        return ASTSource(kernel, signature, fixed, divisible), lambda nvidia: {"num_warps": 8 if nvidia else 4}
    rule = get_rule(case.rule)
    fixed = constants(
        rule, [get_format(n) for n in case.names], case.param, case.grad, case.precision, case.phase, case.aligned
    )
    reduces = case.phase in (Phase.NORM, Phase.PROBE)
    absent = set() if reduces else {"partials", "totals", "norm", "counters"}
    absent |= {"found_inf"} if reduces else set()
    absent |= set() if rule.trust_on or case.phase == Phase.PROBE else {"sums"}
    fixed |= dict.fromkeys(absent)
    types = {"table": "*i64", "chunks": "*i64", "counters": "*i32", "max_norm": "fp32"}
    integers = ("rows", "live_rows", "chunk", "total_index", "total_count")
    types |= dict.fromkeys(integers, "i32")
    signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in step_kernel.arg_names}
    return ASTSource(step_kernel, signature, fixed), lambda nvidia: launch_options(fixed, nvidia, rule.heavy)


def cuda_listing(kernel, what: str = "-sass") -> str:
    """What cuobjdump says about a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def cuda_resources(kernel) -> dict:
    usage, sass = cuda_listing(kernel, "-res-usage"), cuda_listing(kernel)
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    widths, loop = access_widths(instructions), main_loop(sass)
    return {
        "registers": use["REG"],
        "spills": use["STACK"] + use["LOCAL"] + sum(op.startswith(("LDL", "STL")) for op in instructions),
        "shared": use["SHARED"],
        "loads": dict(widths["LDG"]),
        "stores": dict(widths["STG"]),
        "instructions": len(instructions),
        "per_parameter": loop["instructions"] / 8,
        "loop": loop,
        "barriers": sum(op.startswith("BAR") for op in instructions),
    }


def hip_resources(kernel) -> dict:
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


def _needs(case: Case | Blockwise) -> dict:
    """Accesses of full tiles: {"loads": {bits: count}, "stores": ...}. A thread has 8 elements of each stream.

    int4 comes in 4 bytes a thread, 128 to a warp: whole sectors, but half as many bytes in flight as other codes. 8 would
    need 16 elements a thread and their registers, and its codes are a tenth of what a step moves.
    """
    if not case.aligned:
        return {"loads": {}, "stores": {}}

    def accesses(sizes) -> Counter:
        """By bits; sizes: bytes of 8 elements."""
        return Counter(min(128, 8 * size) for size in sizes for _ in range(max(1, size // 16)))

    if isinstance(case, Blockwise):
        sides = accesses([8 * case.dtype.itemsize]), accesses([get_format(case.formats).bits])
        read, written = sides if case.encode else sides[::-1]
        return {"loads": dict(read), "stores": dict(written)}
    if case.phase == Phase.NORM:  # the loop may stay rolled, with 16 elements a thread
        streams = [case.grad, case.param] if get_rule(case.rule).trust_on else [case.grad]
        return {"loads": {128: sum(dtype.itemsize for dtype in streams)}, "stores": {}}
    precision = get_precision(case.precision)
    states = [get_format(name).bits for name in case.names]
    param = [8 * case.param.itemsize]
    companion = [8 * precision.companion_dtype(case.param).itemsize] if precision.companion else []
    weights = companion if precision.name == "master" else param + companion
    read = accesses(weights + states + [8 * case.grad.itemsize])
    written = accesses(param + companion + states)
    return {"loads": dict(read), "stores": dict(written) if case.phase != Phase.PROBE else {}}


def compile_case(case: Case | Blockwise, target: str):
    """The compiled kernel of a case; `asm` holds every stage."""
    import triton
    from triton.backends.compiler import GPUTarget

    hip = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source, options = _source(case)
    return triton.compile(source, target=machine, options=options(not hip) | {"enable_fp_fusion": True})


def _resources(job: tuple[Case | Blockwise, str]) -> dict:
    case, target = job
    kernel = compile_case(case, target)
    use = hip_resources(kernel) if target.startswith("gfx") else cuda_resources(kernel)
    return {"kernel": str(case), "target": target, **use, "needs": _needs(case)}


def resources(targets=TARGETS, cases=CASES, workers: int = WORKERS) -> list[dict]:
    """One dict per case and target: kernel, target, registers, spills, shared (bytes), loads and stores ({bits:
    count}),
    instructions, per_parameter (executed in a full tile; NVIDIA), barriers, needs (the accesses its streams come to in full
    tiles). Must not run under
    TRITON_INTERPRET=1."""
    jobs = [(case, target) for case in cases for target in targets]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_resources, jobs, chunksize=1))


if __name__ == "__main__":
    import json
    import sys

    for row in resources(tuple(sys.argv[1:]) or TARGETS):
        print(json.dumps(row))
