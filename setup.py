"""Builds the native core. Metadata stands in pyproject.toml; this file only finds sources.

Switches, read from the environment (0 or 1 unless said otherwise):
  EELLM_DEBUG       -O1 -g instead of -O3
  EELLM_NATIVE      compile everything but the kernels for this CPU (-march=native)
  EELLM_SANITIZE    e.g. "address,undefined"
  EELLM_WERROR      warnings are errors
  EELLM_ABI3        build one module for all Python versions from 3.11 on
"""

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = {"plain": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    LEVELS["avx2"] = [*avx2, "-DEE_LEVEL_AVX2"]
    LEVELS["avx512"] = [*avx2, *avx512, "-mprefer-vector-width=512", "-DEE_LEVEL_AVX512"]


def switch(name):
    value = os.environ.get(name, "0")
    if value not in ("0", "1", ""):
        raise SystemExit(f"eellm: error: {name} must be 0 or 1, got '{value}'")
    return value == "1"


def common_flags():
    flags = ["-std=c11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-pthread", "-g", "-O1" if switch("EELLM_DEBUG") else "-O3"]
    flags += "-Wall -Wextra -Wvla -Wshadow -Wstrict-prototypes -Wmissing-prototypes".split()
    flags += ["-Wno-missing-field-initializers"]
    if switch("EELLM_WERROR"):
        flags += ["-Werror"]
    if os.environ.get("EELLM_SANITIZE"):
        flags += [f"-fsanitize={os.environ['EELLM_SANITIZE']}", "-fno-omit-frame-pointer"]
    return flags


def is_fresh(target, dependencies, command):
    """Whether an object was made by this command from files that have not changed since."""
    record = target.with_suffix(".cmd")
    if not (target.exists() and dependencies.exists() and record.exists()):
        return False
    if record.read_text() != " ".join(command):
        return False
    files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(os.path.exists(file) and os.path.getmtime(file) < made for file in files)


class BuildCore(build_ext):
    """Compiles kernels/cpu once per instruction-set level, and everything in parallel."""

    def build_extension(self, extension):
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # One place for objects, whichever command builds: an editable install and a later
        # build_ext share them.
        temp = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}"]
        include += [f"-I{sysconfig.get_path('include')}", f"-I{numpy.get_include()}"]
        native = ["-march=native"] if switch("EELLM_NATIVE") else []
        abi3 = ["-DPy_LIMITED_API=0x030B0000"] if switch("EELLM_ABI3") else []
        jobs = []
        for source in sorted((ROOT / "csrc").rglob("*.c")):
            jobs.append((source, "", native + abi3))
        for level, flags in LEVELS.items():
            for source in sorted((ROOT / "kernels/cpu").glob("*.c")):
                jobs.append((source, level, [*flags, f"-DEE_ISA_SUFFIX=_{level}"]))

        compiler = self.compiler.compiler_so[0]
        base = [*common_flags(), "-fPIC", *include]

        def compile_one(job):
            source, level, flags = job
            target = temp / source.relative_to(ROOT).with_suffix(f".{level}.o" if level else ".o")
            dependencies = target.with_suffix(".d")
            command = [compiler, *base, *flags, "-MMD", "-MF", str(dependencies)]
            command += ["-c", str(source), "-o", str(target)]
            if not is_fresh(target, dependencies, command):
                target.parent.mkdir(parents=True, exist_ok=True)
                self.spawn(command)
                target.with_suffix(".cmd").write_text(" ".join(command))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        link = [*self.compiler.linker_so, *objects, "-o", str(output), "-pthread", "-lm"]
        link += [flag for flag in base if flag.startswith("-fsanitize")]
        self.spawn(link)


setup(
    ext_modules=[Extension("eellm._core", sources=[], py_limited_api=switch("EELLM_ABI3"))],
    cmdclass={"build_ext": BuildCore},
)
