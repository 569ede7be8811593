"""Registers, spills, access widths and instruction counts of the CUDA kernels as nvcc compiles them, without a GPU.

Compiled once per content of the sources, under build/gates.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "simt"))
import build as simt  # noqa: E402

sys.path.insert(0, str(ROOT))
from bench.sass import access_widths  # noqa: E402

ARCHS = ("sm_80", "sm_90")


def nvcc() -> str | None:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).exists() else None


def cuobjdump() -> str | None:
    """From the toolkit, or from triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def missing() -> str | None:
    """Why `resources` cannot run here, or None."""
    if nvcc() is None:
        return "nvcc not found"
    return None if cuobjdump() else "cuobjdump not found (CUDA toolkit or the triton package)"


def compile_unit(source: Path, arch: str, gen: Path, output: Path) -> Path:
    number = arch.removeprefix("sm_")
    command = [nvcc(), *"-O3 -std=c++17 --expt-relaxed-constexpr -cubin".split(), f"-I{simt.CSRC}", f"-I{gen}"]
    command += ["-gencode", f"arch=compute_{number},code={arch}", "-o", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return output


def _name(symbol: str) -> str:
    """_ZN2fo11step_kernelINS_4AdamELb1EEEv... -> "Adam probe"; codec_kernel's by what it does, squares_kernel's by its type,
    others by their own."""
    if found := re.match(r"_ZN2fo\d+step_kernelINS_\d+(\w+?)ELb([01])E", symbol):
        return found[1] + (" probe" if found[2] == "1" else "")
    if found := re.match(r"_ZN2fo\d+codec_kernelILb([01])E", symbol):
        return "encode" if found[1] == "1" else "decode"
    if found := re.match(r"_ZN2fo\d+squares_kernelILi([012])ELb([01])E", symbol):
        return f"squares {('fp32', 'bf16', 'fp16')[int(found[1])]}" + (" weighted" if found[2] == "1" else "")
    length = re.match(r"_ZN2fo(\d+)", symbol)
    return symbol[length.end() : length.end() + int(length[1])] if length else symbol


def _dump(path: Path, flag: str) -> str:
    return subprocess.run([cuobjdump(), flag, str(path)], capture_output=True, text=True, check=True).stdout


def functions(path: Path) -> dict[str, str]:
    """The SASS of each function of a cubin by its symbol."""
    return {body.split()[0]: body for body in _dump(path, "-sass").split("Function : ")[1:]}


def read_cubin(path: Path) -> list[dict]:
    usage = {
        name: fields for name, fields in re.findall(r"Function (\S+):\s*\n\s*(.*REG.*)", _dump(path, "-res-usage"))
    }
    rows = []
    for symbol, body in functions(path).items():
        use = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage[symbol])}
        ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        widths = access_widths(ops)
        rows.append(
            {
                "kernel": _name(symbol),
                "symbol": symbol,
                "registers": use["REG"],
                "spills": use["STACK"] + use["LOCAL"] + sum(op.startswith(("LDL", "STL")) for op in ops),
                "shared": use["SHARED"],
                "loads": dict(widths["LDG"]),
                "stores": dict(widths["STG"]),
                "instructions": sum(op not in ("NOP", "BRA") for op in ops),
                "calls": sum(op.startswith("CALL") for op in ops),
                "atomics": sorted({".".join(op.split(".")[:3]) for op in ops if op.startswith(("ATOM", "RED."))}),
            }
        )
    return rows


def resources(archs=ARCHS, workers: int = 2) -> list[dict]:
    """One dict per kernel and arch: kernel, arch, registers, spills (bytes of stack and local memory, plus local
    accesses), shared (bytes), loads and stores ({bits: static count}), instructions (static), calls, atomics."""
    out = simt.BUILD / "gates" / simt.digest(*archs, Path(__file__).read_text())
    cached = out / "resources.json"
    with simt.alone(out):
        if not cached.exists():
            cached.write_text(json.dumps(_compile(out, archs, workers)))
    rows = json.loads(cached.read_text())
    for row in rows:
        row["loads"], row["stores"] = ({int(k): v for k, v in row[n].items()} for n in ("loads", "stores"))
    return rows


def _compile(out: Path, archs: tuple[str, ...], workers: int) -> list[dict]:
    gen = out / "gen"
    gen.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in simt.sources(gen) for arch in archs]

    def run(job):
        source, arch = job
        cubin = compile_unit(source, arch, gen, out / f"{source.stem}.{arch}.cubin")
        return [{"arch": arch, **row} for row in read_cubin(cubin)]

    with ThreadPoolExecutor(workers) as pool:
        return [row for part in pool.map(run, jobs) for row in part]


if __name__ == "__main__":
    for row in resources(tuple(sys.argv[1:]) or ARCHS):
        print(row)
