"""Applies each fault of faults.toml to a copy of the tree: a named test must turn red.

    python tests/mutations/run.py [NAME ...]

A fault is one line that silently changes a result: a sign, an index, a factor, an order. The copy
is built once and then, per fault, only what the changed file needs. Ends with status 1 when a fault
goes unnoticed, does not apply any more, breaks the build or the process instead of a result, or the
tests fail without any fault.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "__pycache__", ".*_cache", "demo-out*"
)
TIME_LIMIT = 900  # seconds; a fault may also make a loop endless
# What pytest ends with; anything else (nothing collected, an error of the test file, a crash) means
# that no test has judged the result.
PASSED, FAILED = 0, 1


class BuildError(Exception):
    """The copy does not compile."""


def problem_of(fault, tree=ROOT):
    """Why a fault can't be applied to a tree, None if it can."""
    path = tree / fault["file"]
    if not path.is_file():
        return f"names no file: {fault['file']}"
    if "\n" in fault["find"] + fault["replace"]:
        return "is more than one line"
    if path.read_text().count(fault["find"]) != 1:
        return "does not apply: its text does not stand there just once"
    if fault["replace"] == fault["find"]:
        return "changes nothing"
    file, _, function = shlex.split(fault["test"])[0].partition("::")
    function = function.partition("[")[0]
    if not (tree / file).is_file() or f"def {function}" not in (tree / file).read_text():
        return f"names no test: {fault['test']}"
    return None


def build(tree):
    """Builds what has changed."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # A fault may leave an argument unused.
    environment = dict(os.environ, EELLM_WERROR="0")
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(done.stderr[-2000:])


def run_tests(tree, *tests):
    """The exit status of pytest, with the package of the copy; None if it did not end."""
    environment = dict(os.environ, PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(" ".join(tests))]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def failing(tree, tests):
    """What is wrong with the tests where there is no fault. All in one process, as a rule."""
    if run_tests(tree, *tests) == PASSED:
        return []
    return [f"{each} fails without any fault" for each in tests if run_tests(tree, each) != PASSED]


def objects_of(tree, file):
    """What was made of a C file alone."""
    if not file.endswith(".c"):
        return []
    made = (tree / "build").rglob(f"{Path(file).stem}.*")
    return [path for path in made if path.parent.match(f"*/{Path(file).parent.name}")]


def try_fault(tree, fault):
    """What is wrong, or None when the test turned red."""
    problem = problem_of(fault, tree)
    if problem:
        return problem
    path = tree / fault["file"]
    text = path.read_text()
    objects = {each: each.read_bytes() for each in objects_of(tree, fault["file"])}
    path.write_text(text.replace(fault["find"], fault["replace"]))
    try:
        # Builds even for a Python file: the module may still hold the fault before this one.
        build(tree)
        status = run_tests(tree, fault["test"])
    except BuildError as error:
        return f"does not compile:\n{error}"
    finally:
        path.write_text(text)
        for each, content in objects.items():  # newer than the text, so not compiled again
            each.write_bytes(content)
    if status == FAILED:
        return None
    return "was not noticed" if status == PASSED else f"ended {fault['test']} with status {status}"


def main():
    """Runs the faults that are named, or all."""
    from tqdm import tqdm

    faults = tomllib.loads((Path(__file__).parent / "faults.toml").read_text())["fault"]
    unknown = set(sys.argv[1:]) - {fault["name"] for fault in faults}
    if unknown:
        raise SystemExit(f"eellm: error: no fault is named {', '.join(sorted(unknown))}")
    if len(sys.argv) > 1:
        faults = [fault for fault in faults if fault["name"] in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "eellm"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        try:
            build(tree)
        except BuildError as error:
            raise SystemExit(f"eellm: error: the build failed:\n{error}") from None
        failures = failing(tree, sorted({fault["test"] for fault in faults}))
        for fault in tqdm(faults, desc="faults"):
            problem = try_fault(tree, fault)
            if problem:
                failures.append(f"{fault['name']} ({fault['file']}) {problem}")
    for failure in failures:
        print(failure)
    print(f"{len(faults) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
