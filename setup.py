"""Builds the native parts with ninja: the CPU drivers, and the CUDA driver where nvcc and a GPU are found.

Environment: FUSEDOPT_NATIVE=0 installs pure Python, 1 forces the CPU part. FUSEDOPT_CUDA=0 leaves the CUDA part out, 1
forces it; FUSEDOPT_CUDA_ARCHS="80;90" chooses its targets. CXX and CUDA_HOME name the compilers. A part that is not
forced and cannot be built is left out with a warning.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import generate  # noqa: E402

X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# No contraction and no fast-math: all instruction sets give the same bits. gcc 12 warns inside its own intrinsics.
KERNEL = "-fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
ISAS = {"baseline": ""}
if X86:
    ISAS["avx2"] = "-mavx2 -mf16c -mfma"  # fused only where the source says so: products of matrices
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mprefer-vector-width=512"


class BuildError(RuntimeError):
    pass


def run(command, **options):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        output = "".join(getattr(error, name, None) or "" for name in ("stdout", "stderr"))
        raise BuildError(f"{error}\n{output}") from error


def find_cxx():
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler found (CXX, c++, g++, clang++)")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if Path(p).exists()), None)


def gpu_archs():
    """Compute capabilities of the GPUs of this machine, such as ["90"]."""
    try:
        lines = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
    except BuildError:
        return []
    return sorted({line.replace(".", "") for line in lines if line.replace(".", "").isdigit()})


def openmp_flag(cxx, work):
    probe = work / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        run([*cxx.split(), "-fopenmp", str(probe), "-o", str(work / "openmp")])
        return "-fopenmp"
    except BuildError:
        print("fusedopt: the compiler has no OpenMP: steps will run on one thread", file=sys.stderr)
        return ""


class Ninja:
    """Collects the edges of one shared library and runs them."""

    def __init__(self, work):
        self.work, self.lines, self.objects = work, [], []

    def rule(self, name, command):
        deps = "  depfile = $out.d\n  deps = gcc\n" if "$out.d" in command else ""
        self.lines.append(f"rule {name}\n  command = {command}\n  description = $out\n{deps}")

    def compile(self, rule, source, name, **variables):
        output = self.work / "obj" / f"{name}.o"
        text = "".join(f"  {key} = {value}\n" for key, value in variables.items())
        self.lines.append(f"build {self.quote(output)}: {rule} {self.quote(source)}\n{text}")
        self.objects.append(self.quote(output))

    def link(self, target):
        self.lines.append(f"build {self.quote(target)}: link {' '.join(self.objects)}\n")

    def run(self):
        (self.work / "build.ninja").write_text("\n".join(self.lines))
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        print(run([*command, "-C", str(self.work)]))

    @staticmethod
    def quote(path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def include_flags(gen):
    import pybind11

    paths = [sysconfig.get_path("include"), pybind11.get_include()]
    return " ".join(f"-I'{p}'" for p in (ROOT / "csrc", gen)), " ".join(f"-isystem '{p}'" for p in paths)


def link_flags():
    return "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,--gc-sections"


def build_cpu(work, target):
    """One object per rule header and instruction set, each set in a namespace of its own (csrc/cpu/isa.h)."""
    gen = work / "gen"
    gen.mkdir(parents=True, exist_ok=True)
    generate.registry(gen)
    cxx = find_cxx()
    openmp = openmp_flag(cxx, work)
    ours, theirs = include_flags(gen)
    ninja = Ninja(work)
    ninja.rule("cxx", f"{cxx} {COMMON} {openmp} {ours} $flags -MMD -MF $out.d -c $in -o $out")
    ninja.rule("link", f"{cxx} {link_flags()} {openmp} $in -o $out")
    units = {stem: generate.unit(gen, stem, "cpu/driver.h", ".cpp") for stem in generate.rules()}
    units.update({path.stem: path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))})
    for isa, flags in ISAS.items():
        for stem, source in units.items():
            ninja.compile("cxx", source, f"{stem}_{isa}", flags=f"{KERNEL} {flags} -Dfo=fo_{isa}")
    ninja.compile("cxx", ROOT / "csrc" / "bindings.cpp", "bindings", flags=f"{theirs} {'-DFO_X86' if X86 else ''}")
    ninja.link(target)
    ninja.run()


def build_cuda(work, target):
    """One object per rule header and csrc/cuda/*.cu, each for all targets; the CUDA runtime is linked statically."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc not found (CUDA_HOME, PATH, /usr/local/cuda)")
    present = gpu_archs()
    chosen = os.environ.get("FUSEDOPT_CUDA_ARCHS", "").replace(",", ";").split(";")
    archs = [a.strip().replace(".", "") for a in chosen if a.strip()] or present or ["80", "90"]
    codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    if not present:  # also for GPUs newer than the targets
        codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    gen = work / "gen"
    gen.mkdir(parents=True, exist_ok=True)
    generate.registry(gen)
    cxx = find_cxx()
    ours, theirs = include_flags(gen)
    ninja = Ninja(work)
    host = f"{nvcc} -ccbin {cxx.split()[0]} -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden {ours} -MD -MF $out.d"
    # nvcc also compiles the C++ file: it alone knows where its headers are
    ninja.rule("cxx", f"{host} {theirs} -x c++ -c $in -o $out")
    ninja.rule("nvcc", f"{host} --expt-relaxed-constexpr {' '.join(codes)} -c $in -o $out")
    ninja.rule("link", f"{nvcc} -ccbin {cxx.split()[0]} -shared -cudart static $in -o $out")
    for stem in generate.rules():
        ninja.compile("nvcc", generate.unit(gen, stem, "cuda/driver.cuh", ".cu"), f"rule_{stem}")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        ninja.compile("nvcc", source, f"cuda_{source.stem}")
    ninja.compile("cxx", ROOT / "csrc" / "cuda" / "bindings.cpp", "bindings")
    ninja.link(target)
    ninja.run()


BUILDERS = {"fusedopt._native_cpu": build_cpu, "fusedopt._native_cuda": build_cuda}


class NinjaBuild(build_ext):
    """A part that cannot be built is left out with a warning, unless the environment asks for it by name."""

    def build_extensions(self):
        built = []
        for extension in self.extensions:
            part = extension.name.rsplit("_", 1)[1]
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            work = (ROOT / "build" / f"{part}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}").resolve()
            work.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # of an earlier build
            try:
                BUILDERS[extension.name](work, target)
                built.append(extension)
            except BuildError as error:
                if os.environ.get(f"FUSEDOPT_{'CUDA' if part == 'cuda' else 'NATIVE'}") == "1":
                    raise
                print(f"WARNING: fusedopt is installed without {extension.name}: {error}", file=sys.stderr)
        self.extensions = built

    def copy_extensions_to_source(self):
        for extension in self.extensions:  # a running process keeps the file that it has mapped
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def extensions():
    if os.environ.get("FUSEDOPT_NATIVE") == "0":
        return []
    names = ["fusedopt._native_cpu"]
    cuda = os.environ.get("FUSEDOPT_CUDA")
    if cuda == "1" or (cuda != "0" and find_nvcc() and gpu_archs()):
        names.append("fusedopt._native_cuda")
    return [Extension(name, sources=[], optional=True) for name in names]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
