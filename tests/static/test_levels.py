"""The levels of the code: a file uses its own level and lower ones, never a higher one.

Every `#include "..."` of the C sources and every import of the Python sources is an edge; an edge
that leads upwards, or into the other of two halves that must not know each other, fails.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The longest matching prefix counts. The entry points of the package stand above the rest of it.
LEVELS = {
    "csrc/base/": 0,
    "csrc/tensor/": 1,
    "csrc/ops/": 2,
    "kernels/": 2,
    "csrc/comm/": 3,
    "csrc/mpi/": 3,
    "csrc/model/": 4,
    "csrc/train/": 5,
    "csrc/infer/": 5,
    "csrc/python/": 6,
    "eellm/": 7,
    "eellm/cli/": 8,
    "eellm/__main__.py": 8,
    "benchmarks/": 9,
    "tests/": 9,
}
STRANGERS = [
    ("csrc/train/", "csrc/infer/"),
    ("kernels/cpu/", "kernels/cuda/"),
    # A transport of its own knows the headers of base and comm alone.
    *(("csrc/mpi/", other) for other in ("csrc/tensor/", "csrc/ops/", "kernels/")),
]
C_SUFFIXES = {".c", ".h", ".cu", ".cuh"}
PYTHON_HEADER = re.compile(r"Python\.h|structmember\.h|numpy/.*")
PYTHON_PLACES = ("csrc/python/", "csrc/mpi/module.c")


def level(path):
    """The level of a path below the root; None where it has none."""
    prefixes = [prefix for prefix in LEVELS if path.startswith(prefix)]
    return LEVELS[max(prefixes, key=len)] if prefixes else None


def included(root, source):
    """(line, target) of each include of a C file; an unknown target is None, a system header that
    belongs to Python is its name."""
    for number, line in enumerate(source.read_text().splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if not match:
            continue
        kind, name = match.groups()
        if kind == "<":
            if PYTHON_HEADER.fullmatch(name):
                yield number, name
            continue
        places = [source.parent / name, root / "csrc" / name, root / "kernels" / name]
        found = [place for place in places if place.is_file()]
        yield number, found[0].resolve().relative_to(root).as_posix() if found else None


def module_path(root, name):
    """The file of a dotted module name, or None for one that is not ours."""
    if name.split(".")[0] not in ("eellm", "tests", "benchmarks"):
        return None
    path = root / name.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(root).as_posix()
    return None


def imported(root, source):
    """(line, target) of each import of a Python file that leads to one of ours."""
    package = source.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(source.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            # `from eellm import model` names a module, `from eellm.model import Model` a value.
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for target in filter(None, (module_path(root, name) for name in names)):
            yield node.lineno, target


def edges(root):
    """(source, line, target) of everything that a source file of ours includes or imports."""
    for top in ("csrc", "kernels", "eellm"):
        for source in sorted((root / top).rglob("*")):
            if source.suffix in C_SUFFIXES:
                find = included
            elif source.suffix == ".py":
                find = imported
            else:
                continue
            for line, target in find(root, source):
                yield source.relative_to(root).as_posix(), line, target


def fault(source, target):
    """What is wrong with an edge; None if nothing is."""
    if target is None:
        return "includes a file that is not there"
    if PYTHON_HEADER.fullmatch(target):
        return None if source.startswith(PYTHON_PLACES) else f"includes {target}"
    if level(source) is None or level(target) is None:
        return f"uses {target}, and one of them has no level"
    if level(target) > level(source):
        return f"uses {target}, of level {level(target)} above {level(source)}"
    for pair in STRANGERS:
        if {prefix for prefix in pair for path in (source, target) if path.startswith(prefix)} == {
            *pair
        }:
            return f"uses {target}, which it must not know"
    return None


def faults(root):
    """Every edge that is wrong, as text."""
    found = ((source, line, fault(source, target)) for source, line, target in edges(root))
    return [f"{source}:{line} {what}" for source, line, what in found if what]


def test_nothing_points_upwards():
    assert faults(ROOT) == []


def test_every_source_has_a_level():
    sources = [path for top in ("csrc", "kernels", "eellm") for path in (ROOT / top).rglob("*")]
    names = [p.relative_to(ROOT).as_posix() for p in sources if p.suffix in {*C_SUFFIXES, ".py"}]
    assert len(names) > 20
    assert [name for name in names if level(name) is None] == []


def test_edges_are_found():
    """The real tree has the edges that it is known to have."""
    found = {(source, target) for source, _, target in edges(ROOT)}
    assert ("csrc/ops/ctx.c", "kernels/cpu/cpu.h") in found
    assert ("csrc/tensor/tensor.h", "csrc/base/status.h") in found
    assert ("eellm/__main__.py", "eellm/cli/__init__.py") in found
    assert ("csrc/python/py_util.h", "Python.h") in found


TREE = {
    "csrc/base/base.h": "",
    "csrc/ops/ops.h": '#include "base/base.h"',
    "csrc/model/model.h": '#include "ops/ops.h"\n#include <stdio.h>',
    "csrc/train/step.h": '#include "model/model.h"',
    "csrc/infer/engine.h": '#include "model/model.h"',
    "csrc/python/module.c": '#include <Python.h>\n#include "train/step.h"',
    "csrc/mpi/module.c": '#include <Python.h>\n#include "base/base.h"',
    "csrc/mpi/job.c": '#include "base/base.h"',
    "kernels/cpu/cpu.h": '#include "ops/ops.h"',
    "kernels/cuda/cuda.h": '#include "ops/ops.h"',
    "eellm/__init__.py": "",
    "eellm/model.py": "from eellm import _core",
    "eellm/cli/__init__.py": "from eellm.model import Model\nfrom . import info",
    "eellm/cli/info.py": "import numpy",
    "tests/__init__.py": "",
    "tests/tool.py": "import eellm",
}
FAULTS = {
    "csrc/base/base.h": ('#include "ops/ops.h"', "above 0"),
    "csrc/ops/ops.h": ('#  include "../model/model.h"', "level 4 above 2"),
    "csrc/model/model.h": ("#include <Python.h>", "includes Python.h"),
    "csrc/train/step.h": ('#include "infer/engine.h"', "must not know"),
    "csrc/infer/engine.h": ('#include "train/step.h"', "must not know"),
    "csrc/python/module.c": ('#include "train/lost.h"', "not there"),
    "kernels/cpu/cpu.h": ('#include "cuda/cuda.h"', "must not know"),
    "csrc/mpi/job.c": ("#include <Python.h>", "includes Python.h"),
    "csrc/mpi/module.c": ('#include "ops/ops.h"', "must not know"),
    "kernels/cuda/cuda.h": ("#include <numpy/arrayobject.h>", "includes numpy/arrayobject.h"),
    "csrc/other/new.h": ('#include "base/base.h"', "no level"),
    "eellm/__init__.py": ("def f():\n    import eellm.cli", "level 8 above 7"),
    "eellm/model.py": ("from .cli import info", "level 8 above 7"),
    "eellm/config.py": ("from tests.tool import x", "level 9 above 7"),
}


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_a_sound_tree_passes(tmp_path):
    write_tree(tmp_path, TREE)
    assert faults(tmp_path) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_edge_is_found(tmp_path, name):
    """Negative control: one wrong edge in a made-up tree."""
    text, message = FAULTS[name]
    write_tree(tmp_path, {**TREE, name: text})
    found = faults(tmp_path)
    assert found and all(line.startswith(f"{name}:") and message in line for line in found)
