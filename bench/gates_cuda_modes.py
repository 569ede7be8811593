"""Step kernels compiled with their switches constant, one mode at a time: what a block of 256 elements runs and moves.

The kernel of csrc/cuda/driver.cuh switches on formats, types and precision while it runs; with constants in their place its
loop is one path, whose instructions can be counted and whose accesses belong to known streams. Not counted are the branches
of the switches themselves, and what only blocks with non-finite values run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gates_cuda, sass  # noqa: E402
from bench.gates_cuda import simt  # noqa: E402
from fusedopt.formats import get_format, list_formats  # noqa: E402
from fusedopt.precision import get_precision, list_precisions  # noqa: E402
from fusedopt.rule import get_rule  # noqa: E402

LANE = 8  # elements of a lane
# Lane instructions that an H200 has time for while a byte moves (bench/gpu_table.py), and the share of them that a kernel may take:
# with all of them it would be as fast as memory only if every slot were used.
PER_BYTE, SHARE = 128 * 132 * 1.98e9 / 4.32e12, 0.95
# What was gained stays gained: a few more than the compiled kernels take (CUDA 13.0, sm_80 and sm_90).
INSTRUCTIONS = {
    ("int8", "nearest"): 64,
    ("int8", "stochastic"): 73,
    ("int8", "split24"): 79,
    ("int4", "nearest"): 58,
    ("bf16_stochastic", "nearest"): 42,
}


class Mode(NamedTuple):
    """What a kernel switches on: the format of all states, the precision, the rule, the dtype of p and g; probe: of LAMB."""

    form: str
    precision: str = "nearest"
    rule: str = "adam"
    dtype: str = "bf16"
    probe: bool = False

    @property
    def functor(self) -> str:
        return "".join(part.capitalize() for part in self.rule.split("_"))

    @property
    def symbol(self) -> str:
        return "Mode_" + "_".join(map(str, self))


MODES = (
    *(Mode(name) for name in list_formats()),
    *(Mode("bf16", name) for name in list_precisions()[1:]),
    *(Mode("int8", name) for name in ("stochastic", "split24")),
)

SOURCE = """{headers}
#include "cuda/driver.cuh"

namespace fo {{
{modes}
}}  // namespace fo
"""
MODE = """
struct {name} {{
  const Launch& launch;
  FO_DEV int format(int i) const {{ constexpr int codes[] = {{{codes}}}; return codes[i]; }}
  FO_DEV int param_dtype() const {{ return {dtype}; }}
  FO_DEV int grad_dtype() const {{ return {dtype}; }}
  FO_DEV int precision() const {{ return {precision}; }}
  FO_DEV bool is_full(int, int) const {{ return true; }}
}};
template __global__ void step_kernel<{functor}, {probe}, {name}>(const __grid_constant__ Launch);
"""
PLAIN = "template __global__ void step_kernel<{functor}, {probe}>(const __grid_constant__ Launch);"  # the kernel in use


def source(folder: Path, modes: tuple[Mode, ...]) -> Path:
    headers = {name: stem for stem, names in simt.generate.rules().items() for name in names}
    texts = []
    for mode in modes:
        codes = [str(get_format(mode.form).code(state.signed)) for state in get_rule(mode.rule).states] or ["0"]
        texts.append(
            MODE.format(
                name=mode.symbol, codes=", ".join(codes), precision=get_precision(mode.precision).id,
                functor=mode.functor, probe=str(mode.probe).lower(), dtype={"bf16": "kBF16", "fp32": "kF32"}[mode.dtype],
            )
        )  # fmt: skip
    kernels = dict.fromkeys((mode.functor, str(mode.probe).lower()) for mode in modes)
    texts += [PLAIN.format(functor=functor, probe=probe) for functor, probe in kernels]
    includes = dict.fromkeys(f'#include "rules/{headers[functor]}.h"' for functor, _ in kernels)
    path = folder / "modes.cu"
    path.write_text(SOURCE.format(headers="\n".join(includes), modes="\n".join(texts)))
    return path


def expected(mode: Mode) -> tuple[Counter, Counter]:
    """Bits of an access: how many a lane needs for its 8 elements, (loads, stores). 4-bit codes: 8 bytes by every other lane."""
    form, precision = get_format(mode.form), get_precision(mode.precision)

    def stream(bits: int) -> Counter:
        return Counter({64: 1}) if bits <= 8 else Counter({128: bits // 16})

    states = Counter()
    for _ in get_rule(mode.rule).states:
        states += stream(form.bits)
    beside = Counter()
    if precision.companion:
        beside = stream(8 * precision.companion_dtype(torch.bfloat16).itemsize)
    reads_param = precision.name != "master"
    param = 2 if mode.dtype == "fp32" else 1
    loads = Counter({128: param * (1 + reads_param)}) + states + beside
    return loads, Counter({128: param}) + states + beside


def budget(mode: Mode) -> float:
    """Instructions of a lane for an element, at most: what fits into the time of the bytes, and less where that is known."""
    moved = sum(bits * n for part in expected(mode) for bits, n in part.items()) / 8 / LANE
    known = INSTRUCTIONS.get((mode.form, mode.precision)) if mode.rule == "adam" else None
    return min(SHARE * PER_BYTE * moved, known or float("inf"))


def compiled(archs=gates_cuda.ARCHS, modes: tuple[Mode, ...] = MODES) -> list[dict]:
    """One dict per mode and arch: mode, arch, registers, spills, shared (bytes), instructions (of a lane per element), loads and
    stores (of a lane per 8 elements, {bits: count}), loops, loop (sass.main_loop), in_use (registers and shared of the kernel
    that switches). Compiled once per content of the sources, under build/gates."""
    ours = [Path(module.__file__).read_text() for module in (gates_cuda, sass)]
    out = simt.BUILD / "gates" / simt.digest(str(modes), *archs, Path(__file__).read_text(), *ours)
    cached = out / "modes.json"
    with simt.alone(out):
        if not cached.exists():
            cached.write_text(json.dumps([row for arch in archs for row in _compile(out, arch, modes)]))
    rows = json.loads(cached.read_text())
    for row in rows:
        row["mode"] = Mode(*row["mode"])
        row["loads"], row["stores"] = ({int(k): v for k, v in row[n].items()} for n in ("loads", "stores"))
    return rows


def _compile(out: Path, arch: str, modes: tuple[Mode, ...]) -> list[dict]:
    cubin = gates_cuda.compile_unit(source(out, modes), arch, out, out / f"modes.{arch}.cubin")
    bodies = gates_cuda.functions(cubin)
    usages = gates_cuda.read_cubin(cubin)
    in_use = {usage["kernel"]: usage for usage in usages if usage["symbol"].endswith("_4ModeEEEvNS_6LaunchE")}
    rows = []
    for usage in usages:
        mode = next((m for m in modes if f"{len(m.symbol)}{m.symbol}E" in usage["symbol"]), None)
        if mode is None:
            continue
        path, loops = sass.hot_path(bodies[usage["symbol"]])
        widths = sass.access_widths(path)
        real = in_use[usage["kernel"]]
        rows.append(
            {
                "mode": mode,
                "arch": arch,
                "registers": usage["registers"],
                "spills": usage["spills"],
                "shared": usage["shared"],
                "instructions": len(path) / LANE,
                "loads": widths["LDG"],
                "stores": widths["STG"],
                "loops": loops,
                "loop": sass.main_loop(bodies[usage["symbol"]]),
                "in_use": {"registers": real["registers"], "shared": real["shared"]},
            }
        )
    return rows


if __name__ == "__main__":
    for row in compiled(tuple(sys.argv[1:]) or gates_cuda.ARCHS):
        print(row)
