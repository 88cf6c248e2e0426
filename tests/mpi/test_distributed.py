"""Ranks, their share of a node, torchrun's variables, and an MPI that does not fit."""

import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest

import eellm as package
from eellm import distributed
from tests.mpi.common import FOREIGN, ROOT, TORCHRUN, eellm, environment, needs_mpi, run


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(FOREIGN) or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "_worlds", {})


def test_without_a_job_the_world_is_one_rank():
    assert not distributed.is_job() and distributed.local_size() == 1
    world = distributed.world()
    assert (world.transport, world.rank, world.size, world.timeout) == ("self", 0, 1, 300.0)
    assert distributed.world("self", 5.0) is world and world.timeout == 5.0
    assert distributed.claim_message() and distributed.claim_message()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("tcp",), "transport is invalid (expected one of auto, self, mpi"),
     (("self", 0.0), "timeout is invalid (expected seconds > 0, got 0.0)"),
     (("self", float("nan")), "timeout is invalid")],
)  # fmt: skip
def test_refused_worlds(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        distributed.world(*arguments)


def test_a_build_without_mpi_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delitem(sys.modules, "eellm._mpi", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'eellm\[mpi\]', or build with EELLM_MPI=1"):
        distributed.world()


# (cores of the node, cores that mpirun bound this rank to, ranks of the node) -> threads
SHARES = [
    ((8, 8, 1), 8),
    ((8, 8, 2), 4),
    ((8, 8, 3), 2),
    ((2, 2, 4), 1),
    ((16, 1, 2), 1),
    ((16, 8, 4), 4),
    ((16, 8, 2), 8),
    ((16, 4, 16), 1),
    ((4, 1, 8), 1),
]
MORE_RANKS_THAN_CORES = [(2, 2, 4), (4, 1, 8)]


@pytest.mark.parametrize(("machine", "threads"), SHARES)
def test_ranks_share_the_cores_of_a_node(monkeypatch, machine, threads):
    node, bound, ranks = machine
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(ranks))
    cores = {0: set(range(bound)), os.getppid(): set(range(node))}
    monkeypatch.setattr("os.sched_getaffinity", cores.__getitem__)
    assert distributed.threads_per_rank() == threads
    # A rank polls for messages where that takes nobody's core.
    alone = machine not in MORE_RANKS_THAN_CORES
    assert distributed.world("self").polling == (1.0 if alone else 50e-6)


def test_one_rank_of_a_node_reports(monkeypatch, tmp_path):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("OMPI_FILE_LOCATION", str(tmp_path / str(rank)))
        assert distributed.claim_message() == (rank == 0)


# -- torchrun -----------------------------------------------------------------------------------

UNDER_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


def test_under_torchrun_the_right_command_is_shown():
    command = ["train", "my run.toml", "--set", "train.steps=5"]
    ended = eellm(*command, **UNDER_TORCHRUN)
    assert ended.status == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("eellm: error: torchrun started this process")
    assert line.endswith("run: eellm launch -n 4 -- train 'my run.toml' --set train.steps=5")
    ended = eellm(*command, **{**UNDER_TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"})
    assert ended.status == 2 and ended.err == "" and ended.out == ""


def test_torchrun_on_several_machines(monkeypatch):
    for name, value in {**UNDER_TORCHRUN, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["eellm", "train", "a.toml"])
    expected = "eellm launch -n 4 --nproc-per-node 2 --hostfile HOSTS -- train a.toml"
    with pytest.raises(ValueError, match=re.escape(expected)):
        distributed.refuse_torchrun()


@pytest.mark.parametrize("missing", UNDER_TORCHRUN)
def test_some_of_the_variables_mean_nothing(monkeypatch, missing):
    for name, value in UNDER_TORCHRUN.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    distributed.refuse_torchrun()


def test_a_job_of_mpirun_is_no_job_of_torchrun(monkeypatch):
    with mock.patch.dict(os.environ, {**UNDER_TORCHRUN, "OMPI_COMM_WORLD_SIZE": "4"}):
        distributed.refuse_torchrun()


# -- An MPI that does not fit ---------------------------------------------------------------------


def fake_library(folder, version):
    """A libmpi.so.40 that has all that eellm._mpi needs, and names itself as we say."""
    compiler, nm = shutil.which("cc") or shutil.which("gcc"), shutil.which("nm")
    if not compiler or not nm:
        pytest.skip("no C compiler, or nm is missing")
    (module,) = (ROOT / "eellm").glob("_mpi*.so")
    listed = subprocess.run(
        [nm, "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    lines = ["#include <string.h>"]
    for name in sorted(names):
        if name.startswith("ompi_"):
            lines.append(f"char {name}[1024];")
        elif name.startswith("MPI_") and name != "MPI_Get_library_version":
            lines.append(f"int {name}(void) {{ return 1; }}")
    lines.append("int MPI_Get_library_version(char *text, int *length) {")
    lines.append(f'    strcpy(text, "{version}"); *length = (int)strlen(text); return 0; }}')
    (folder / "mpi.c").write_text("\n".join(lines))
    target = folder / "libmpi.so.40"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libmpi.so.40", "-o", target, folder / "mpi.c"],
        check=True,
    )


@needs_mpi
@pytest.mark.parametrize(
    ("version", "accepted"),
    [("Open MPI v4.1.6, package: Debian, ident: 4.1.6", False),
     ("MPICH Version: 4.2.0", False),
     ("Open MPI v5.0.99, package: another", True)],
)  # fmt: skip
def test_another_mpi_is_refused_by_name(tmp_path, version, accepted):
    fake_library(tmp_path, version)
    program = "import eellm._mpi as m; print(m.library())"
    ended = run([sys.executable, "-c", program], LD_LIBRARY_PATH=str(tmp_path))
    if accepted:
        assert ended.status == 0 and ended.out.strip() == version, ended.err
        return
    text = ended.err.splitlines()[-1]
    assert ended.status == 1 and "eellm._mpi was built against Open MPI 5.0." in text
    assert f"'{version.split(',')[0]}' was loaded; run with" in text


@needs_mpi
def test_the_command_line_refuses_it_too(tmp_path):
    fake_library(tmp_path, "Open MPI v4.1.6, package: Debian")
    program = "from eellm.distributed import world; world('mpi')"
    ended = run([sys.executable, "-c", program], LD_LIBRARY_PATH=str(tmp_path))
    assert ended.status == 1 and "ImportError: eellm._mpi was built against" in ended.err


def test_importing_the_package_loads_no_mpi():
    program = "import sys, eellm.distributed as d; d.world(); print('eellm._mpi' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
    assert package.__version__
