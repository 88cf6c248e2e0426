"""Applies each fault of faults.toml to a copy of the tree: a named test must turn red.

    python tests/mutations/run.py [NAME ...]

A fault is one line that silently changes a result: a sign, an index, a factor, an order. The copy is
built once and then, per fault, only what the changed file needs. Ends with status 1 when a fault
goes unnoticed, does not apply any more, or the tests fail without any fault.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "__pycache__", ".*_cache", "demo-out*"
)


def build(tree):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"eellm: error: the build failed:\n{done.stderr[-2000:]}")


def passes(tree, test):
    """Whether pytest passes for `test`, with the package of the copy."""
    environment = dict(os.environ, PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test.split()]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode == 0


def apply(tree, fault):
    """Replaces the one place that matches; returns the old text, or None if there is not just one."""
    path = tree / fault["file"]
    text = path.read_text()
    if text.count(fault["find"]) != 1:
        return None
    path.write_text(text.replace(fault["find"], fault["replace"]))
    return text


def try_fault(tree, fault):
    """What is wrong, or None when the test turned red."""
    text = apply(tree, fault)
    if text is None:
        return "does not apply: its text is not there just once"
    try:
        if fault["file"].endswith((".c", ".h")):
            build(tree)
        return "was not noticed" if passes(tree, fault["test"]) else None
    finally:
        (tree / fault["file"]).write_text(text)


def main():
    faults = tomllib.loads((Path(__file__).parent / "faults.toml").read_text())["fault"]
    if len(sys.argv) > 1:
        faults = [fault for fault in faults if fault["name"] in sys.argv[1:]]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "eellm"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        build(tree)
        for test in tqdm(sorted({fault["test"] for fault in faults}), desc="without faults"):
            if not passes(tree, test):
                failures.append(f"{test} fails without any fault")
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
