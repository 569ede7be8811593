"""Instructions an NVIDIA kernel executes for each round of its main loop, from the text of `cuobjdump -sass`."""

from __future__ import annotations

import heapq
import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def loop_instructions(sass: str) -> int:
    """The length of the shortest way around the loop whose shortest way is longest, 0 without a loop.

    Branches around masked accesses are what makes ways differ: the shortest is that of a full tile. Predicated
    instructions count whether they act or not, as they do in the machine.
    """
    lines = [(int(m[1], 16), bool(m[2]), m[3].split(".")[0], m[4]) for m in _LINE.finditer(sass)]
    index = {address: i for i, (address, *_) in enumerate(lines)}

    def target(rest: str) -> int:
        return index[int(re.search(r"0x([0-9a-f]+)", rest)[1], 16)]

    def successors(i: int) -> list[int]:
        _, predicated, op, rest = lines[i]
        predicated = predicated or bool(re.match(r"\s*!?U?P\d", rest))
        if op == "BRA":
            return [target(rest)] + ([i + 1] if predicated else [])
        if op in ("EXIT", "RET"):
            return [i + 1] if predicated else []
        return [i + 1] if i + 1 < len(lines) else []

    longest = 0
    for end, (_, _, op, rest) in enumerate(lines):
        start = target(rest) if op == "BRA" else end
        if start >= end:
            continue
        distance, heap = {start: 1}, [(1, start)]
        while heap:
            steps, i = heapq.heappop(heap)
            if i == end:
                longest = max(longest, steps)
                break
            for j in successors(i):
                if steps + 1 < distance.get(j, len(lines) + 2):
                    distance[j] = steps + 1
                    heapq.heappush(heap, (steps + 1, j))
    return longest
