"""Builds the C tests with AddressSanitizer and UndefinedBehaviorSanitizer and runs each program.

The sources, the flags and the instruction-set levels are those of setup.py, with -O1 and the
sanitizers; csrc/python is left out, so no Python is in the process. Objects stay in build/ctest and
are compiled again when a file that they include has changed.
"""

import fcntl
import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build/ctest"
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.c"))
FOLDERS = ("base", "tensor", "ops", "comm", "model", "train", "infer")
COMPILER = os.environ.get("CC", "gcc")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Not detect_stack_use_after_return: gcc's frames on the heap are not aligned to 64 bytes, which
# spilled AVX-512 registers need.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("EELLM_")},
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

pytestmark = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no C compiler ({COMPILER})")


def build_settings():
    """The flags and the levels of setup.py, which is run without its last step."""
    switches = {"EELLM_DEBUG": "1", "EELLM_SANITIZE": "address,undefined"}
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, switches):
        script = runpy.run_path(str(ROOT / "setup.py"))
        flags = script["common_flags"]()
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}", f"-I{HERE}"]
    # Line numbers are enough, and variable tracking of instrumented kernels takes minutes.
    return [*flags, *SANITIZE, "-g1", *include], script["LEVELS"]


def is_fresh(target, command):
    """Whether `target` was made by this command and none of the files it was made of is newer."""
    record, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and record.exists() and dependencies.exists()):
        return False
    if record.read_text() != " ".join(command):
        return False
    made = target.stat().st_mtime
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(os.path.exists(name) and os.stat(name).st_mtime < made for name in names)


def compile_one(source, target, flags):
    """Compiles one file; returns its object."""
    command = [COMPILER, *flags, "-MMD", "-c", str(source), "-o", str(target)]
    if not is_fresh(target, command):
        target.parent.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"{source} does not compile:\n{run.stderr[-4000:]}"
        target.with_suffix(".cmd").write_text(" ".join(command))
    return target


def link(objects, program):
    """Links a program unless it is newer than all its objects."""
    made = program.stat().st_mtime if program.exists() else 0
    if any(path.stat().st_mtime >= made for path in objects):
        command = [COMPILER, *SANITIZE, *map(str, objects), "-o", str(program), "-pthread", "-lm"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"{program.name} does not link:\n{run.stderr[-4000:]}"


def run_program(path):
    """Runs a program with leak detection; returns what it did."""
    return subprocess.run([path], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


@pytest.fixture(scope="session")
def programs():
    """Builds every test program; returns their folder."""
    flags, levels = build_settings()
    jobs = [(HERE / f"{name}.c", BUILD / f"{name}.o", flags) for name in PROGRAMS]
    for folder in FOLDERS:
        for source in sorted((ROOT / "csrc" / folder).glob("*.c")):
            jobs.append((source, BUILD / folder / f"{source.stem}.o", flags))
    for level, extra in levels.items():
        for source in sorted((ROOT / "kernels/cpu").glob("*.c")):
            target = BUILD / "kernels" / f"{source.stem}.{level}.o"
            jobs.append((source, target, [*flags, *extra, f"-DEE_ISA_SUFFIX=_{level}"]))
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: compile_one(*job), jobs))
            mains, rest = objects[: len(PROGRAMS)], objects[len(PROGRAMS) :]
            list(pool.map(lambda main: link([main, *rest], main.with_suffix("")), mains))
    return BUILD


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(programs, name):
    """Every check of the program holds, and the sanitizers find nothing."""
    run = run_program(programs / name)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-6000:]}"


FAULTY = {
    "overflow": (
        'volatile size_t n = 7; char *p = calloc(n, 1); printf("%d", p[n + argc - 1]); free(p);',
        "heap-buffer-overflow",
    ),
    "undefined": ('int n = 0x7fffffff; n += argc; printf("%d", n);', "signed integer overflow"),
    "leak": ("char *volatile p = malloc(7); p[0] = 1; p = NULL;", "detected memory leaks"),
    "check": ("EE_EXPECT(1 + 1 == 3);", "1 + 1 == 3 is false"),
    "status": ('EE_EXPECT_OK(ee_fail(EE_ERR_IO, "no disk"));', "no disk"),
    "message": (
        'EE_EXPECT_STATUS(ee_fail(EE_ERR_IO, "no disk"), EE_ERR_IO, "no tape");',
        "no tape",
    ),
    "held": ('EE_EXPECT_OK(ee_alloc(&held, 8, ""));', "live_count == live is false"),
    "loop": ('ee_test_allocations("keeps", keeps);', "1 blocks held"),
}
FAULTY_SOURCE = """
#include "ee_test.h"
static void *held;
static enum ee_status keeps(void) {
    EE_TRY(ee_alloc(&held, 8, "first"));
    return ee_alloc(&held, 8, "second");
}
static void test(void) {
    int argc = 1 + (held != NULL);
    (void)keeps, (void)argc;
    %s
}
EE_TEST_MAIN(test)
"""


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found(tmp_path, fault):
    """Negative control: a program with this fault fails, and says so."""
    code, message = FAULTY[fault]
    source = tmp_path / "faulty.c"
    source.write_text(FAULTY_SOURCE % code)
    flags, _ = build_settings()
    objects = [compile_one(source, tmp_path / "faulty.o", flags)]
    for name in ("alloc", "status"):
        objects.append(compile_one(ROOT / f"csrc/base/{name}.c", tmp_path / f"{name}.o", flags))
    link(objects, tmp_path / "faulty")
    run = run_program(tmp_path / "faulty")
    assert run.returncode != 0
    assert message in run.stderr
