"""The main loop of an NVIDIA kernel from the text of `cuobjdump -sass`: what a thread executes in a round, and on which units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# Units of an SM by the names of instructions. What is not named only takes an issue slot: moves, branches, uniform numbers.
UNITS = {
    "float": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 IMAD",
    "integer": "IADD3 VIADD LOP3 SHF SHL SHR PRMT SEL FSEL LEA FMNMX VIMNMX IMNMX FSETP ISETP HSETP2 FSET BMSK SGXT IABS "
    "VABSDIFF F2FP I2FP LOP PLOP3 VOTE FCHK",
    "convert": "I2F F2I F2F I2I FRND",
    "special": "MUFU POPC FLO BREV",
    "load/store": "LDG STG LDS STS LDC LDL STL LD ST SHFL REDUX ATOM ATOMG ATOMS RED LDSM",
}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}


def instructions(body: str) -> list[tuple[int, bool, str, str]]:
    """(address, whether predicated, name, operands) of each in the text of a function."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", body)
    return [(int(at, 16), bool(when), name, rest) for at, when, name, rest in found]


def hot_path(body: str) -> tuple[list[str], int]:
    """(names along the shortest way round the outermost loop, number of loops) of a function; ([], 0) without a loop.

    The shortest way is that of a full tile or block: it leaves out what only some need. BRA.DIV leads to code for diverged
    warps, of which there are none. Predicated instructions count whether they act or not, as they do in the machine.
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
    for last, first in sorted(back, key=lambda edge: edge[1] - edge[0]):  # the longest first
        path = shortest(edges, first, last)
        if path:
            return [code[i][2] for i in path if code[i][2] != "NOP"], len(back)
    return [], len(back)


def shortest(edges: dict[int, list[int]], first: int, last: int) -> list[int]:
    """The nodes from first to last on a shortest way between these numbers, or [] where there is none: a jump back from code that
    lies behind a loop, and is a part of another, closes no loop."""
    before, level = {first: first}, [first]
    while level and last not in before:  # breadth first: instructions have equal weight
        reached = [(i, j) for i in level for j in edges[i] if first <= j <= last]
        level = []
        for i, j in reached:
            if j not in before:
                before[j] = i
                level.append(j)
    if last not in before:
        return []
    path = [last]
    while path[-1] != first:
        path.append(before[path[-1]])
    return path[::-1]


def access_widths(names: Iterable[str]) -> dict[str, Counter]:
    """Bits of a global access: how often, for LDG and STG."""
    widths: dict[str, Counter] = {"LDG": Counter(), "STG": Counter()}
    for name in names:
        op, *flags = name.split(".")
        if op in widths:
            widths[op][next((WIDTHS[f] for f in flags if f in WIDTHS), 32)] += 1
    return widths


def units(names: Iterable[str]) -> dict[str, int]:
    """How many instructions each unit of UNITS gets."""
    counts = Counter(UNIT_OF.get(name.split(".")[0]) for name in names)
    return {unit: counts[unit] for unit in UNITS}


def main_loop(body: str) -> dict:
    """Of a round of the main loop, a thread's: instructions, units, read (bytes loaded from global memory), loops."""
    path, loops = hot_path(body)
    read = sum(bits // 8 * n for bits, n in access_widths(path)["LDG"].items())
    return {"instructions": len(path), "units": units(path), "read": read, "loops": loops}
