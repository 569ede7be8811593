"""The AdamW kernel compiled with its switches constant, one mode at a time: what a block of 256 elements runs and moves.

The kernel of csrc/cuda/driver.cuh switches on formats, types and precision while it runs; with constants in their place its
loop is one path, whose instructions can be counted and whose accesses belong to known streams. Not counted are the branches
of the switches themselves, and what only blocks with non-finite values run.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gates_cuda  # noqa: E402
from bench.gates_cuda import simt  # noqa: E402
from fusedopt.formats import get_format, list_formats  # noqa: E402
from fusedopt.precision import get_precision, list_precisions  # noqa: E402
from fusedopt.rule import get_rule  # noqa: E402

LANE = 8  # elements of a lane
# Lane instructions that an H200 has time for while 10 bytes per parameter move, those of bf16 weights and 8-bit states.
BUDGET = 78
# (formats of both states, precision), p and g bf16
MODES = [(name, "nearest") for name in list_formats()] + [("bf16", name) for name in list_precisions()[1:]]

SOURCE = """#include "rules/adam.h"
#include "cuda/driver.cuh"

namespace fo {{
{modes}
}}  // namespace fo
"""
MODE = """
struct {name} {{
  const Launch& launch;
  FO_DEV int format(int i) const {{ return i == 0 ? {first} : {second}; }}
  FO_DEV int param_dtype() const {{ return kBF16; }}
  FO_DEV int grad_dtype() const {{ return kBF16; }}
  FO_DEV int precision() const {{ return {precision}; }}
  FO_DEV bool is_full(int, int) const {{ return true; }}
}};
template __global__ void step_kernel<Adam, false, {name}>(const __grid_constant__ Launch);
"""


def mode_name(mode: tuple[str, str]) -> str:
    return "Mode_" + "_".join(mode)


def source(folder: Path) -> Path:
    signs = [state.signed for state in get_rule("adam").states]
    texts = []
    for mode in MODES:
        first, second = (get_format(mode[0]).code(signed) for signed in signs)
        identity = get_precision(mode[1]).id
        texts.append(MODE.format(name=mode_name(mode), first=first, second=second, precision=identity))
    path = folder / "modes.cu"
    path.write_text(SOURCE.format(modes="".join(texts)))
    return path


def expected(mode: tuple[str, str]) -> tuple[Counter, Counter]:
    """Bits of an access: how many a lane needs for its 8 elements, (loads, stores). 4-bit codes: 8 bytes by every other lane."""
    form, precision = get_format(mode[0]), get_precision(mode[1])

    def stream(bits: int) -> Counter:
        return Counter({64: 1}) if bits <= 8 else Counter({128: bits // 16})

    states = stream(form.bits) + stream(form.bits)
    beside = Counter()
    if precision.companion:
        beside = stream(8 * precision.companion_dtype(torch.bfloat16).itemsize)
    reads_param = precision.name != "master"
    loads = Counter({128: 1 + reads_param}) + states + beside
    return loads, Counter({128: 1}) + states + beside


def instructions(body: str) -> list[tuple[int, bool, str, str]]:
    """(address, whether predicated, name, operands) of each in the text of a function."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", body)
    return [(int(at, 16), bool(when), name, rest) for at, when, name, rest in found]


def hot_path(body: str) -> tuple[list[str], int]:
    """(names along the shortest way round the outermost loop, number of loops) of a function.

    The shortest way leaves out what only some blocks need. BRA.DIV leads to code for diverged warps, of which there are none.
    """
    code = instructions(body)
    index = {at: i for i, (at, *_) in enumerate(code)}

    def target(i: int) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", code[i][3].strip())
        return index.get(int(found[1], 16)) if found else None

    def following(i: int) -> list[int]:
        _, predicated, name, rest = code[i]
        out = []
        if name.startswith("BRA") and "DIV" not in name:
            out = [j for j in (target(i),) if j is not None]
            predicated = predicated or re.match(r"\s*!?U?P\w", rest) is not None
        stops = name.startswith(("BRA", "EXIT", "RET")) and "DIV" not in name and not predicated
        return out if stops else [*out, i + 1]

    reached, edges, todo = {0}, {}, [0]
    while todo:
        i = todo.pop()
        edges[i] = [j for j in following(i) if j < len(code)]
        todo += [j for j in edges[i] if j not in reached]
        reached.update(edges[i])
    back = [(i, j) for i in edges for j in edges[i] if j <= i and code[i][2].startswith("BRA") and i != j]
    last, first = max(back, key=lambda edge: edge[0] - edge[1])
    before: dict[int, int] = {first: first}
    level = [first]
    while last not in before:  # breadth first: instructions have equal weight
        level = [j for i in level for j in edges[i] if first <= j <= last and before.setdefault(j, i) == i]
    path = [last]
    while path[-1] != first:
        path.append(before[path[-1]])
    return [code[i][2] for i in reversed(path) if code[i][2] != "NOP"], len(back)


def compiled(archs=gates_cuda.ARCHS) -> list[dict]:
    """One dict per mode and arch: mode, arch, registers, spills, instructions (of a lane per element), loads and stores (of a lane
    per 8 elements, {bits: count}), loops. Compiled once per content of the sources, under build/gates."""
    out = (
        simt.BUILD
        / "gates"
        / simt.digest("modes", *archs, Path(__file__).read_text(), Path(gates_cuda.__file__).read_text())
    )
    cached = out / "modes.json"
    with simt.alone(out):
        if not cached.exists():
            cached.write_text(json.dumps([row for arch in archs for row in _compile(out, arch)]))
    rows = json.loads(cached.read_text())
    for row in rows:
        row["mode"] = tuple(row["mode"])
        row["loads"], row["stores"] = ({int(k): v for k, v in row[n].items()} for n in ("loads", "stores"))
    return rows


def _compile(out: Path, arch: str) -> list[dict]:
    cubin = gates_cuda.compile_unit(source(out), arch, out, out / f"modes.{arch}.cubin")
    bodies = gates_cuda.functions(cubin)
    rows = []
    for usage in gates_cuda.read_cubin(cubin):
        mode = next((m for m in MODES if f"{len(mode_name(m))}{mode_name(m)}E" in usage["symbol"]), None)
        if mode is None:
            continue
        path, loops = hot_path(bodies[usage["symbol"]])
        widths = gates_cuda.access_widths(path)
        rows.append(
            {
                "mode": mode,
                "arch": arch,
                "registers": usage["registers"],
                "spills": usage["spills"],
                "instructions": len(path) / LANE,
                "loads": widths["LDG"],
                "stores": widths["STG"],
                "loops": loops,
            }
        )
    return rows


if __name__ == "__main__":
    for row in compiled(tuple(sys.argv[1:]) or gates_cuda.ARCHS):
        print(row)
