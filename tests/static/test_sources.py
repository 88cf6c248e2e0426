"""Rules that every source file keeps: length, no printing, no stray allocation, no fast arithmetic,
headers that stand alone, no paths of one machine."""

import ast
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LIMIT, FUNCTION_LIMIT = 800, 100

# What may be longer, with the reason: "path" or "path:function".
ALLOWED_LENGTH = {}

C_SUFFIXES = {".c", ".h", ".cu", ".cuh"}
SOURCE_FOLDERS = ("csrc", "kernels", "eellm", "tests", "benchmarks")
TEXT_SUFFIXES = {*C_SUFFIXES, ".py", ".pyi", ".md", ".toml", ".cfg", ".ini", ".sh", ".yml", ".yaml"}
SKIPPED = {"build", "dist", ".git", ".venv", "__pycache__"}
HEADER_FOLDERS = ("base", "tensor", "ops", "comm", "model", "train", "infer")


def walk(root, suffixes, folders=None):
    """The files below the folders (all of them if None), without what is built."""
    for folder, folders_below, names in os.walk(root):
        hidden = [name for name in folders_below if name.startswith(".") and name != ".ci"]
        folders_below[:] = sorted({*folders_below} - {*SKIPPED, *hidden})
        for name in sorted(names):
            path = Path(folder, name)
            top = path.relative_to(root).parts[0]
            if path.suffix in suffixes and (folders is None or top in folders):
                yield path


def blank(match):
    """As many line ends as the match has, and nothing else."""
    return "\n" * match.group().count("\n")


def code_of(text):
    """C code without comments, strings and preprocessor lines; the lines keep their numbers."""
    tokens = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.S)

    def replace(match):
        return blank(match) if match.group().startswith("/") else '""'

    text = tokens.sub(replace, text)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)


def c_functions(text):
    """(name, lines) of each function definition: from the declaration to the closing brace."""
    depth, start, head = 0, None, ""
    for number, line in enumerate(code_of(text).splitlines(), 1):
        for char in line + "\n":
            if depth == 0 and char == "{":
                name = re.match(r"[^={]*?\b(\w+)\s*\(", head, re.S)
                is_function = name and "=" not in head and ")" in head
                body = name.group(1) if is_function else None
            depth += (char == "{") - (char == "}")
            if depth == 0 and char == "}" and body:
                yield body, number - start + 1
            if depth == 0 and char in ";}":
                start, head = None, ""
            elif depth == 0 and (head or not char.isspace()):
                start = start or number
                head += char


def python_functions(text):
    """(name, lines) of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def too_long(root):
    """The files and functions over the limits, as {name: lines}."""
    found = {}
    for path in walk(root, {*C_SUFFIXES, ".py"}, SOURCE_FOLDERS):
        name, text = path.relative_to(root).as_posix(), path.read_text()
        lines = len(text.splitlines())
        if lines > FILE_LIMIT:
            found[name] = lines
        functions = c_functions if path.suffix in C_SUFFIXES else python_functions
        for function, lines in functions(text):
            if lines > FUNCTION_LIMIT:
                found[f"{name}:{function}"] = lines
    return found


def test_length():
    found = too_long(ROOT)
    assert {name: lines for name, lines in found.items() if name not in ALLOWED_LENGTH} == {}


def test_allowed_length_has_no_stale_entries():
    assert set(ALLOWED_LENGTH) <= set(too_long(ROOT))


def test_functions_are_seen():
    """The scanner finds the functions that the real sources are known to have."""
    names = [name for name, _ in c_functions((ROOT / "csrc/base/threads.c").read_text())]
    assert names[0] == "count_fork" and "ee_pool_create" in names and len(names) > 8


def test_length_finds_what_is_too_long(tmp_path):
    body = "    x++;\n" * 98
    (tmp_path / "csrc").mkdir()
    (tmp_path / "eellm").mkdir()
    (tmp_path / "csrc/a.c").write_text(
        f"struct s {{\n    int x;\n}};\nint\nlong_one(int x)\n{{\n{body}}}\n"
        f"int exact(int x) {{\n{body}}}\nstatic int t[] = {{\n{body}    1,\n    2,\n}};\n"
    )
    (tmp_path / "csrc/b.h").write_text("// line\n" * 801)
    (tmp_path / "eellm/c.py").write_text("def g():\n" + "    x = 1\n" * 100)
    found = too_long(tmp_path)
    assert found == {"csrc/a.c:long_one": 102, "csrc/b.h": 801, "eellm/c.py:g": 101}


# Calls that are refused, and the files where they stand.
PRINTING = {"printf", "fprintf", "vprintf", "vfprintf", "puts", "fputs", "putchar", "perror"}
ENDING = {"exit", "_exit", "_Exit", "quick_exit", "abort", "assert"}
ALLOCATING = {"malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign", "free", "strdup"}
CALL_RULES = [
    (PRINTING, {"csrc/base/log.c", "csrc/base/status.c"}),
    (ENDING, {"csrc/base/status.c", "csrc/mpi/job.c"}),
    (ALLOCATING, {"csrc/base/alloc.c"}),
]


def forbidden_calls(root):
    """The calls that the core must not make, as text."""
    found = []
    for path in walk(root, C_SUFFIXES, ("csrc", "kernels")):
        name = path.relative_to(root).as_posix()
        # A member of a struct (comm->abort) and a declared function of another name are no calls.
        code = code_of(path.read_text())
        for number, line in enumerate(code.splitlines(), 1):
            for call in re.findall(r"(?<![\w.>*])(\w+)\s*\(", line):
                if any(call in calls and name not in files for calls, files in CALL_RULES):
                    found.append(f"{name}:{number} {call}")
    return found


def test_the_core_neither_prints_nor_ends_the_process():
    assert forbidden_calls(ROOT) == []


def test_forbidden_calls_are_found(tmp_path):
    for name in ("csrc/base/log.c", "kernels/cpu/a.c", "csrc/ops/b.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "csrc/base/log.c").write_text('void f(void) { fprintf(stderr, "x"); exit(1); }\n')
    (tmp_path / "kernels/cpu/a.c").write_text(
        '/* printf("no") */\nint f(void) { g("abort()"); return snprintf(p, 1, "x"); }\n'
        "void g(void) { comm->abort(comm); (*abort)(x); }\nvoid h(void) { free (x); }\n"
    )
    (tmp_path / "csrc/ops/b.c").write_text("void f(int x) {\n    assert(x > 0);\n    puts(p);\n}\n")
    assert forbidden_calls(tmp_path) == [
        "csrc/base/log.c:1 exit",
        "csrc/ops/b.c:2 assert",
        "csrc/ops/b.c:3 puts",
        "kernels/cpu/a.c:4 free",
    ]


FAST = re.compile(r"-Ofast\b|-f?(?:unsafe-math|fast-math|finite-math|associative-math)|fast-math\b")


def fast_arithmetic(root):
    """Where a build file or a source asks for arithmetic that is not IEEE's."""
    build = [root / name for name in ("setup.py", "Makefile", "pyproject.toml")]
    build += [path for path in (root / ".ci").glob("*") if path.is_file()]
    files = [*filter(Path.exists, build), *walk(root, C_SUFFIXES, ("csrc", "kernels"))]
    found = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            # base.h refuses to be compiled that way and says so.
            if FAST.search(line) and not re.match(r"\s*#\s*error", line):
                found.append(f"{path.relative_to(root).as_posix()}:{number}")
    return found


def test_arithmetic_is_ieee():
    assert fast_arithmetic(ROOT) == []


def test_fast_arithmetic_is_found(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text('flags = ["-O3"]\nflags += ["-Ofast"]\n')
    (tmp_path / "csrc/a.c").write_text('#pragma GCC optimize("fast-math")\n# error "-Ofast"\n')
    assert fast_arithmetic(tmp_path) == ["setup.py:2", "csrc/a.c:1"]


COMPILERS = {
    "c11": ["gcc", "-x", "c", "-std=c11", "-Wstrict-prototypes"],
    "c++17": ["g++", "-x", "c++", "-std=c++17"],
}


def header_errors(root, header, standard):
    """What the compiler says about a file that includes this header and nothing else."""
    command = [*COMPILERS[standard], "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [
        "-Wno-missing-field-initializers",
        f"-I{root / 'csrc'}",
        f"-I{root / 'kernels'}",
        "-",
    ]
    source = f'#include "{header}"\n#include "{header}"\n'
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


def headers(root):
    """The public headers, as they are included."""
    folders = (root / "csrc" / folder for folder in HEADER_FOLDERS)
    return [
        path.relative_to(root / "csrc").as_posix()
        for folder in folders
        for path in sorted(folder.glob("*.h"))
    ]


@pytest.mark.parametrize("standard", COMPILERS)
def test_headers_stand_alone(standard):
    if not shutil.which(COMPILERS[standard][0]):
        pytest.skip(f"no {COMPILERS[standard][0]}")
    names = headers(ROOT)
    assert "ops/ops.h" in names and "comm/comm.h" in names
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = list(pool.map(lambda name: header_errors(ROOT, name, standard), names))
    assert {name: error for name, error in zip(names, errors, strict=True) if error} == {}


@pytest.mark.parametrize("standard", COMPILERS)
def test_faulty_headers_are_found(tmp_path, standard):
    if not shutil.which(COMPILERS[standard][0]):
        pytest.skip(f"no {COMPILERS[standard][0]}")
    (tmp_path / "csrc").mkdir()
    faults = {
        "unguarded.h": "struct s { int x; };",
        "needs.h": "#pragma once\nint f(size_t n);",
        "c_only.h": "#pragma once\nstatic inline void f(int *restrict p) { (void)p; }",
    }
    found = {}
    for name, text in faults.items():
        (tmp_path / "csrc" / name).write_text(text + "\n")
        found[name] = bool(header_errors(tmp_path, name, standard))
    assert found == {"unguarded.h": True, "needs.h": True, "c_only.h": standard == "c++17"}


# An absolute path of one machine, and a mark of unfinished work without its reason in parentheses.
WORDS = {
    "machine path": re.compile(r"(?<![\w.<:}/-])/(?:home|root|work)\b(?!\w)"),
    "unfinished": re.compile(r"\b(?:TO[D]O(?!\([^)]{3,}\): \S)|FIX[M]E|XX[X])\b"),
}


def forbidden_words(root):
    """Where a text file has a word that it must not have."""
    found = []
    files = [*walk(root, TEXT_SUFFIXES), *filter(Path.exists, [root / "Makefile"])]
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for what, pattern in WORDS.items():
                if pattern.search(line):
                    found.append(f"{path.relative_to(root).as_posix()}:{number} {what}")
    return found


def test_words():
    assert forbidden_words(ROOT) == []


def test_forbidden_words_are_found(tmp_path):
    mark = "TO" + "DO"
    lines = [
        "open('/" + "home/me/x')",
        f"# {mark}: later",
        f"# {mark}(needs the sharded reader): read in parts",
        "see https://example.org/" + "work and homework/" + "home",
        "cd /" + "work",
        "# FIX" + "ME",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "build/b.py").write_text(lines[0])
    assert forbidden_words(tmp_path) == [
        "a.py:1 machine path",
        "a.py:2 unfinished",
        "a.py:5 machine path",
        "a.py:6 unfinished",
    ]
