"""What setup.py makes of its switches, what the module exports, and what the packages hold.

The long tests build copies of the tree: with sanitizers, for the stable ABI, and in an empty
environment with pip, which needs the network.
"""

import importlib.machinery
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from eellm import _core

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.so", "*.egg-info", ".*_cache"
)
PARTS = ("CUDA", "MPI", "NCCL", "BLAS")
NOT_YET = ("CUDA", "NCCL", "BLAS")
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("EELLM_")}


def run(command, folder, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def setup_py(*arguments, folder, **environment):
    return run([sys.executable, "setup.py", "-q", *arguments], folder, **environment)


def build(folder, **environment):
    return setup_py("build_ext", "--inplace", folder=folder, **environment).stderr


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree without what is built."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_COPIED)
    return tmp_path / "tree"


# -- Switches --------------------------------------------------------------------------------------


def settings(**environment):
    """The names that setup.py defines and the arguments of its setup(); nothing is built."""
    with mock.patch("setuptools.setup") as setup, mock.patch.dict(os.environ, CLEAN, clear=True):
        os.environ.update(environment)
        script = runpy.run_path(str(ROOT / "setup.py"))
        script["flags"] = script["common_flags"]()
    return script, setup.call_args.kwargs


REFUSED = [
    *[
        ({f"EELLM_{part}": "1"}, f"EELLM_{part}=1, but this version has no {part}")
        for part in NOT_YET
    ],
    *[
        ({f"EELLM_{part}": "yes"}, "is invalid (expected auto, 0 or 1, got 'yes')")
        for part in PARTS
    ],
    ({"EELLM_MPI": "1", "MPICC": "/none/mpicc"}, "EELLM_MPI=1, but no '/none/mpicc'; run: pip"),
    ({"EELLM_MPI": "1", "MPICC": "true"}, "is not the compiler of an Open MPI; run: pip install"),
    ({"EELLM_CUDA_ARCHS": "90"}, "EELLM_CUDA_ARCHS needs the CUDA part"),
    ({"EELLM_DEBUG": "2"}, "EELLM_DEBUG is invalid (expected 0 or 1, got '2')"),
    ({"EELLM_ABI3": "on"}, "EELLM_ABI3 is invalid"),
    ({"EELLM_WERROR": "true"}, "EELLM_WERROR is invalid"),
    ({"EELLM_SANITIZE": "adress"}, "EELLM_SANITIZE is invalid (expected address, undefined"),
    ({"EELLM_SANITIZE": "address,1"}, "got '1')"),
]


@pytest.mark.parametrize(("environment", "text"), REFUSED)
def test_switches_refuse_nonsense(environment, text):
    with pytest.raises(SystemExit) as error:
        settings(**environment)
    message = str(error.value)
    assert message.startswith("eellm: error: ") and text in message and "\n" not in message


def test_a_refused_switch_ends_the_build():
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**CLEAN, "EELLM_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "eellm: error: EELLM_CUDA=1, but this version has no CUDA part; unset EELLM_CUDA"
    ]


def test_switches_change_the_flags():
    plain, arguments = settings()
    assert "-O3" in plain["flags"] and not any("sanitize" in flag for flag in plain["flags"])
    assert arguments["options"] == {} and not arguments["ext_modules"][0].py_limited_api
    allowed = {
        f"EELLM_{part}": value for part, value in zip(PARTS, ("auto", "0", "", "auto"), strict=True)
    }
    assert settings(**allowed)[0]["flags"] == plain["flags"]
    assert "-O1" in settings(EELLM_DEBUG="1")[0]["flags"]
    assert "-Werror" in settings(EELLM_WERROR="1")[0]["flags"]
    assert settings(CFLAGS="-fno-inline '-DA=b c'")[0]["flags"][-2:] == ["-fno-inline", "-DA=b c"]
    assert (
        "-fsanitize=address,undefined" in settings(EELLM_SANITIZE="address,undefined")[0]["flags"]
    )
    _, arguments = settings(EELLM_ABI3="1")
    assert arguments["ext_modules"][0].py_limited_api
    assert arguments["options"]["bdist_wheel"] == {"py_limited_api": "cp311"}


def test_levels_follow_the_machine():
    for machine, levels in (("x86_64", ["plain", "avx2", "avx512"]), ("aarch64", ["plain"])):
        with mock.patch("platform.machine", lambda machine=machine: machine):
            assert [*settings()[0]["LEVELS"]] == levels


# -- What is built ---------------------------------------------------------------------------------


def exports(library):
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is missing")
    lines = run([nm, "-D", "--defined-only", library], ROOT).stdout.splitlines()
    return {line.split()[-1] for line in lines}


def test_only_the_init_function_is_exported():
    assert exports(_core.__file__) == {"PyInit__core"}


def test_exports_are_seen():
    """The negative control."""
    import math

    library = getattr(math, "__file__", None)
    numpy_core = sys.modules["numpy"]._core._multiarray_umath.__file__
    assert len(exports(library or numpy_core) | exports(numpy_core)) >= 1


def test_module_has_the_suffix_of_this_interpreter():
    assert any(_core.__file__.endswith(each) for each in importlib.machinery.EXTENSION_SUFFIXES)


# -- What the packages hold ------------------------------------------------------------------------


def wanted(folder, *suffixes):
    paths = (ROOT / folder).rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


NEEDED = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "MANIFEST.in"}


def pack(tree, target):
    """The names in a source package of the tree, without its first folder."""
    setup_py("sdist", "-d", str(target), folder=tree)
    (file,) = target.glob("eellm-*.tar.gz")
    with tarfile.open(file) as package:
        names = {member.name.partition("/")[2] for member in package if member.isfile()}
    return file, names


def test_the_source_package_is_complete(tree, tmp_path):
    needed = NEEDED | wanted("csrc", ".c", ".h") | wanted("kernels", ".c", ".h")
    needed |= wanted("eellm", ".py", ".pyi", ".typed") | wanted("tests", ".py", ".c", ".h", ".npz")
    needed |= {"eellm/py.typed"}
    _, names = pack(tree, tmp_path / "dist")
    assert needed <= names, needed - names
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names)


def test_a_missing_rule_is_noticed(tree, tmp_path):
    """The negative control."""
    manifest = tree / "MANIFEST.in"
    manifest.write_text(manifest.read_text().replace("recursive-include kernels", "# kernels"))
    _, names = pack(tree, tmp_path / "dist")
    assert not wanted("kernels", ".c", ".h") & names


def test_python_files_of_a_wheel(tree):
    setup_py("build_py", "-d", "out", folder=tree)
    found = {path.relative_to(tree / "out").as_posix() for path in (tree / "out").rglob("*.*")}
    assert wanted("eellm", ".py", ".pyi") | {"eellm/py.typed"} <= found
    assert not any(name.startswith(("tests", "benchmarks")) for name in found)


# -- Whole builds ----------------------------------------------------------------------------------


@pytest.mark.long
def test_only_what_has_changed_is_built_again(tree):
    text = build(tree)
    assert "eellm: building _core" in text and "not in this version: CUDA, NCCL" in text
    module = next((tree / "eellm").glob("_core*.so"))
    made = module.stat().st_mtime_ns

    def objects():
        return {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.o")}

    before = objects()
    times = []
    for _ in range(3):
        start = time.monotonic()
        assert build(tree) == ""
        times.append(time.monotonic() - start)
    print(f"a build without changes takes {min(times):.2f} s")
    assert module.stat().st_mtime_ns == made and objects() == before

    (tree / "csrc/comm/local.h").touch()
    build(tree)
    changed = {path.relative_to(tree / "build").parts[1:] for path, at in objects().items()
               if at != before[path]}  # fmt: skip
    names = ("comm_local", "local_collectives", "local_messages")
    assert changed == {("csrc", "comm", f"{name}.o") for name in names}
    assert module.stat().st_mtime_ns > made

    (tree / "csrc/base/arena.c").write_text("broken")
    failed = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                            cwd=tree, env=CLEAN, capture_output=True, text=True)  # fmt: skip
    assert failed.returncode == 1 and "arena.c" in failed.stderr and module.exists()


@pytest.mark.long
def test_the_stable_abi(tree):
    build(tree, EELLM_ABI3="1", EELLM_WERROR="1")
    assert all("abi3" in module.name for module in (tree / "eellm").glob("*.so"))
    (module,) = (tree / "eellm").glob("_core*.so")
    assert module.name == "_core.abi3.so" and exports(module) == {"PyInit__core"}
    tests = ["tests/python", "tests/parity/test_golden.py"]
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run(pytest_command, tree, PYTHONPATH=str(tree))
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps",
         "-w", tree / "out", "."], tree, EELLM_ABI3="1", EELLM_WERROR="1")  # fmt: skip
    (wheel,) = (tree / "out").glob("*.whl")
    assert "-cp311-abi3-linux" in wheel.name
    assert "eellm/_core.abi3.so" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.long
def test_parity_under_sanitizers(tree):
    """AddressSanitizer and UndefinedBehaviorSanitizer in the interpreter itself: preloaded, with
    Python's allocations made by malloc, and without the leaks that Python leaves at its end."""
    compiler = shutil.which("gcc")
    libraries = [
        run([compiler, f"-print-file-name={name}"], ROOT).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("the sanitizers' libraries are missing")
    switches = {"EELLM_SANITIZE": "address,undefined", "EELLM_DEBUG": "1", "CFLAGS": "-g1"}
    build(tree, **switches)
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(tree),
    }
    tests = ["tests/parity/test_golden.py", "tests/parity/test_parity.py"]
    tests += ["tests/parity/test_dropout.py"]
    tests += ["tests/python"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-s", *tests]
    run(command, tree, **environment)


def new_environment(folder):
    run([sys.executable, "-m", "venv", folder], ROOT)
    return folder / "bin/python"


def check_installed(python, folder):
    """The package works from a folder that has nothing to do with the tree."""
    program = "import eellm, eellm._core as c; print(eellm.__version__, c.build_info()['isa'])"
    version = run([python, "-c", program], folder).stdout.split()[0]
    assert version in run([python.parent / "eellm", "--version"], folder).stdout
    place = run([python, "-c", "import eellm; print(eellm.__file__)"], folder).stdout
    assert str(python.parent.parent) in place


@pytest.mark.long
def test_pip_installs_the_source_package_in_an_empty_environment(tree, tmp_path):
    file, _ = pack(tree, tmp_path / "dist")
    python = new_environment(tmp_path / "empty")
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", file], tmp_path)
    check_installed(python, tmp_path)


@pytest.mark.long
def test_make_wheel_makes_one_that_installs(tree, tmp_path):
    # A module that a build has left behind, and that is in the tree no more.
    left = tree / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/eellm"
    left.mkdir(parents=True)
    (left / "gone.py").touch()
    run(["make", "wheel"], tree)
    (wheel,) = (tree / "dist").glob("eellm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"eellm/py.typed", "eellm/_core.pyi"} <= names
    assert "eellm/gone.py" not in names
    modules = {name.partition(".")[0] for name in names if name.endswith(".so")}
    assert "eellm/_core" in modules <= {"eellm/_core", "eellm/_mpi"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "build/")) for name in names)
    python = new_environment(tmp_path / "empty")
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel], tmp_path)
    check_installed(python, tmp_path)


@pytest.mark.long
def test_clang_builds_it_too(tree):
    if not shutil.which("clang"):
        pytest.skip("clang is missing")
    build(tree, CC="clang", EELLM_WERROR="1")
    tests = ["tests/parity/test_golden.py", "tests/python/test_failed_steps.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run(command, tree, PYTHONPATH=str(tree))
    program = "import eellm; print(eellm.build_info()['compiler'])"
    assert run([sys.executable, "-c", program], tree).stdout.startswith("clang")
