"""Builds the CUDA sources for the host shim (simt.h) into one shared library and loads it: `library()`.

Built once per content of the sources, under build/simt.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC, SIMT, BUILD = ROOT / "csrc", ROOT / "tests" / "simt", ROOT / "build"
sys.path.insert(0, str(CSRC))
import generate  # noqa: E402

# The sources are written for nvcc: its pragmas and attributes mean nothing here.
FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -DFO_SIMT".split()
FLAGS += "-Wall -Wno-unknown-pragmas -Wno-attributes -Wno-maybe-uninitialized".split()
EXPORT = "-fvisibility=default"
# Rule headers of the library with the address sanitizer: those that its test steps. All of them take minutes, and a rule without
# its own is refused by name.
SANITIZED = ("adam", "lamb", "lars", "lion", "sgd")


def compiler() -> str | None:
    return next((name for name in ("g++", "clang++") if shutil.which(name)), None)


def digest(*parts: str) -> str:
    """Of everything the CUDA sources are made of."""
    h = hashlib.sha256("\0".join(parts).encode())
    files = [*CSRC.rglob("*.h"), *(CSRC / "cuda").iterdir(), *SIMT.iterdir(), Path(generate.__file__)]
    for path in sorted(p for p in files if p.is_file()):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:16]


def sources(gen: Path, stems: tuple[str, ...] | None = None) -> list[Path]:
    """All CUDA translation units: one per rule header (of `stems`), and csrc/cuda/*.cu."""
    generate.registry(gen, stems)
    units = [generate.unit(gen, stem, "cuda/driver.cuh", ".cu") for stem in stems or generate.rules()]
    return units + sorted((CSRC / "cuda").glob("*.cu"))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time builds in a folder: the workers of pytest-xdist start together."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(asan: bool = False) -> Path:
    flags = FLAGS + (["-g", "-O1", "-fsanitize=address", "-fno-omit-frame-pointer"] if asan else [])
    out = BUILD / "simt" / f"{digest(*flags)}{'_asan' if asan else ''}"
    target = out / "libsimt.so"
    with alone(out):
        if not target.exists():
            compile_library(out, target, flags, SANITIZED if asan else None)
    return target


def compile_library(out: Path, target: Path, flags: list[str], stems: tuple[str, ...] | None) -> None:
    gen = out / "gen"
    units = [*sources(gen, stems), SIMT / "simt.cpp"]
    include = [f"-I{p}" for p in (CSRC, gen, SIMT)]

    def compile_unit(path: Path) -> Path:
        output = out / f"{path.stem}.o"
        visible = [EXPORT] if path.name == "simt.cpp" else []
        command = [compiler(), *flags, *visible, *include, "-x", "c++", "-c", str(path), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    fresh = out / "libsimt.so.new"
    subprocess.run([compiler(), *flags, "-shared", *map(str, objects), "-o", str(fresh)], check=True)
    fresh.replace(target)


class Library:
    """The interface of fusedopt._native_cuda, on host memory."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))
        for name in ("describe", "launch", "encode", "decode", "row_col_sums", "weighted_square_sum"):
            getattr(self._lib, f"fo_simt_{name}").restype = ctypes.c_char_p
        word, address = ctypes.c_int, ctypes.c_int64
        self._lib.fo_simt_sums_scratch.restype = address
        self._lib.fo_simt_sums_scratch.argtypes = [address] * 2
        for name in ("row_col_sums", "weighted_square_sum"):
            getattr(self._lib, f"fo_simt_{name}").argtypes = [address, word, *[address] * 6]
        self._lib.fo_simt_encode.argtypes = [address, word, address, word, address, address]
        self._lib.fo_simt_decode.argtypes = [address, address, address, word, address, word]
        self._lib.fo_simt_order.argtypes = [ctypes.c_uint64]

    def describe(self) -> list[tuple[str, str, str, int]]:
        rows = [line.split(";") for line in self._lib.fo_simt_describe().decode().splitlines()]
        return [(name, states, scalars, int(trust)) for name, states, scalars, trust in rows]

    def launch_bytes(self) -> int:
        return self._lib.fo_simt_launch_bytes()

    def _call(self, name: str, *arguments) -> None:
        error = getattr(self._lib, f"fo_simt_{name}")(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def launch(self, packed: bytes, stream: int = 0) -> None:
        self._call("launch", packed)

    def encode(self, values, dtype, numel, form, codes, scales, stream: int = 0) -> None:
        self._call("encode", values, dtype, numel, form, codes, scales)

    def decode(self, codes, scales, numel, form, values, dtype, stream: int = 0) -> None:
        self._call("decode", codes, scales, numel, form, values, dtype)

    def sums_scratch(self, rows: int, cols: int) -> int:
        return self._lib.fo_simt_sums_scratch(rows, cols)

    def row_col_sums(self, *arguments) -> None:
        self._call("row_col_sums", *arguments[:-1])  # without the stream

    def weighted_square_sum(self, *arguments) -> None:
        self._call("weighted_square_sum", *arguments[:-1])

    def order(self, seed: int) -> None:
        """Order in which the blocks of a grid run: 0 ascending, else a permutation."""
        self._lib.fo_simt_order(seed)

    def sm_count(self, device: int) -> int:
        return 1


@cache
def library(asan: bool = False) -> Library:
    return Library(build(asan))
