"""What is missing on a machine ends in one line that says how to get it, and in exit status 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(not MAKE, reason="make is missing")

COMPILER = """#!/bin/sh
exit {status}
"""
# A Python for which some checks of `make tools` fail: those whose program has the word in it.
PYTHON = """#!/bin/sh
if [ "$1" = -V ]; then echo Python 3.9.1; exit 0; fi
case "$2" in *{word}*) exit 1;; esac
exec {python} "$@"
"""


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def run(tmp_path, *targets, python="nothing", compiler=0, uid=None, **environment):
    """`make` with a PATH that holds only what is named: (exit status, stdout, stderr)."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("id", "nproc", "grep", "sed", "expand"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    if uid is not None:
        (tools / "id").unlink()
        write(tools / "id", f"#!/bin/sh\necho {uid}\n")
    if python is not None:
        write(tools / "python3", PYTHON.format(word=python, python=sys.executable))
    if compiler is not None:
        write(tools / "gcc", COMPILER.format(status=compiler))
    command = [MAKE, "--no-print-directory", "-C", str(ROOT), *targets]
    found = subprocess.run(
        command, env={"PATH": str(tools), **environment}, capture_output=True, text=True, timeout=60
    )
    return found.returncode, found.stdout, found.stderr


MISSING = {
    "python": ({"python": None}, "python3 is missing; run: ", "python3 python3-venv python3-dev"),
    "old": (
        {"python": "version_info"},
        "3.11 or newer is needed, found Python 3.9.1; run: make",
        "",
    ),
    "venv": ({"python": "ensurepip"}, "venv module is missing; run: ", "python3-venv"),
    "headers": ({"python": "Python.h"}, "Python's headers are missing; run: ", "python3-dev"),
    "gcc": ({"compiler": None}, "gcc is missing; run: ", "gcc libc6-dev"),
    "libc": ({"compiler": 1}, "the C library's headers are missing; run: ", "libc6-dev"),
    "CC": ({"CC": "mycc"}, "mycc is missing; run: ", "gcc libc6-dev"),
}


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said(tmp_path, what, uid):
    options, text, packages = MISSING[what]
    status, out, err = run(tmp_path, "tools", uid=uid, **options)
    lines = [line for line in err.splitlines() if not line.startswith("make:")]
    assert status == 2 and out == "" and len(lines) == 1, err
    assert lines[0].startswith("eellm: error: ") and text in lines[0]
    if packages:
        sudo = "" if uid == 0 else "sudo "
        assert lines[0].endswith(f"; run: {sudo}apt-get install {packages}")


def test_nothing_is_said_where_all_is_there(tmp_path):
    """The negative control."""
    assert run(tmp_path, "tools") == (0, "", "")
    assert run(tmp_path, "tools", compiler=None, CC=shutil.which("true")) == (0, "", "")


def test_help_lists_every_target(tmp_path):
    status, out, err = run(tmp_path, "help")
    assert status == 0 and err == ""
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert all(len(line) <= 100 and line[12:13] != " " for line in rows.values())
    text = (ROOT / "Makefile").read_text()
    public = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert set(rows) == set(public) - {"tools"}
    assert run(tmp_path)[1] == out


def test_the_script_of_the_checks_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK)
