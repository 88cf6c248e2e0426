"""Starts jobs of mpirun, with a hard time limit and the process group ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from eellm.distributed import find_program
from tests.conftest import has_mpi

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).resolve().parent / "jobs"
needs_mpi = pytest.mark.skipif(
    not has_mpi(),
    reason="eellm is built without MPI, or mpirun is missing (pip install eellm[mpi])",
)
# What a launcher or another test may have left in the environment.
FOREIGN = ("OMPI_", "PMIX_", "PRTE_", "SLURM_", "EELLM_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ended(NamedTuple):
    status: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self):
        """The lines that eellm itself has written as errors."""
        return [line for line in self.err.splitlines() if line.startswith("eellm: error:")]


def environment(**more):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and name not in TORCHRUN
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(command, timeout=60.0, interrupt=None, **more):
    """Runs a command in a process group of its own. interrupt: (text, signal), sent when standard
    output has shown the text."""
    started = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        shown = ""
        if interrupt:
            text, number = interrupt
            while text not in shown and (line := process.stdout.readline()):
                shown += line
            process.send_signal(number)
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} did not end within {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    finally:
        # Ranks are in groups of their own, but mpirun ends them when it goes.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(process.returncode, shown + out, err, time.monotonic() - started)


def mpirun(ranks, job, *arguments, timeout=60.0, **more):
    """Runs a program of jobs/ as so many ranks."""
    command = [find_program("mpirun"), "-n", str(ranks), "--bind-to", "none"]
    command += ["--map-by", "slot:OVERSUBSCRIBE"]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return run([*command, sys.executable, JOBS / job, *arguments], timeout, **more)


def eellm(*arguments, **more):
    """Runs the command line."""
    return run([sys.executable, "-m", "eellm", *arguments], **more)
