"""eellm launch."""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

EPILOG = """\
Every rank runs the same command, as torchrun has it; mpirun of Open MPI starts them. Options of
launch stand before --, the command and its options after it.

examples:
  eellm launch -n 4 -- train run.toml                 four ranks on this machine
  eellm launch -n 4 --dry-run -- train run.toml       print the mpirun command and do nothing
  eellm launch -n 4 --max-restarts 3 -- train run.toml
                                                      after a failure go on from the last checkpoint
  eellm launch --nnodes 2 --nproc-per-node 4 --hostfile hosts -- train run.toml
                                                      four ranks on each of two machines
  eellm launch -n 2 -- generate run/model --engine pipeline --prompt "def main"

A hostfile has a line for each machine, its name and how many ranks it takes:

  node1 slots=4
  node2 slots=4

eellm must be installed on all of them in the same place, and ssh must let you in without a
password. Ctrl-C and SIGTERM make train save a checkpoint and stop, and other commands stop at once.
The exit status is that of the first rank that failed.
"""

# Ends that a new start would not change: done, a wrong call, Ctrl-C, SIGTERM.
FINAL_STATUSES = (0, 2, 130, 143)
SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.usage = "eellm launch -n RANKS [options] -- COMMAND ..."
    parser.add_argument("-n", "--np", type=int, metavar="RANKS", help="ranks in all")
    parser.add_argument("--nproc-per-node", type=int, metavar="RANKS", help="ranks on each machine")
    parser.add_argument("--nnodes", type=int, metavar="MACHINES", help="machines; default 1")
    parser.add_argument(
        "--hostfile", metavar="FILE", help="the machines, one a line, as mpirun has it"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="TIMES",
        help="start a job that failed again, train with --resume auto; default 0",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the mpirun command and do nothing"
    )
    parser.add_argument(
        "command_line", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="what each rank runs"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    command = _rank_command(options.command_line)
    start = [*_mpirun_command(options), sys.executable, "-m", "eellm"]
    if options.max_restarts < 0:
        raise _contradiction("--max-restarts must be at least 0", options.max_restarts)
    if options.dry_run:
        print(shlex.join([*start, *command]))
        return 0
    for restart in range(options.max_restarts + 1):
        job = _Job([*start, *command])
        status = job.run()
        if status in FINAL_STATUSES or job.stopped or restart == options.max_restarts:
            break
        if command[0] == "train" and "--resume" not in command:
            command = [*command, "--resume", "auto"]
        print(
            f"eellm: the job failed with status {status}; restart {restart + 1} of "
            f"{options.max_restarts}: {shlex.join(command)}",
            file=sys.stderr,
            flush=True,
        )
    return status


def _contradiction(text: str, got: object) -> ValueError:
    return ValueError(f"{text}, got {got}")


def _rank_command(words: Sequence[str]) -> list[str]:
    """What each rank runs, checked as far as that is possible without running it."""
    from eellm.cli import COMMANDS

    command = list(words)
    while command[:1] in (["--"], ["eellm"]):
        del command[0]
    known = [name for name in COMMANDS if name not in ("launch", "demo")]
    if not command:
        raise ValueError("launch needs a command after --, as in: eellm launch -n 4 -- train FILE")
    if command[0] not in known:
        raise ValueError(
            f"launch cannot run this command (expected one of {', '.join(known)}, got "
            f"'{command[0]}'); options of launch stand before --"
        )
    return command


# -- Ranks and machines -------------------------------------------------------------------------


def _counts(options: argparse.Namespace) -> tuple[int, int | None]:
    """(ranks in all, ranks on each machine or None where mpirun may choose)."""
    named = {
        "-n": options.np,
        "--nproc-per-node": options.nproc_per_node,
        "--nnodes": options.nnodes,
    }
    for name, value in named.items():
        if value is not None and value < 1:
            raise _contradiction(f"{name} must be at least 1", value)
    ranks, each, nodes = named.values()
    if ranks is None and each is None:
        raise ValueError("launch needs the number of ranks; give -n or --nproc-per-node")
    if ranks is None:
        return each * (nodes or 1), each
    if nodes is not None and each is not None and ranks != nodes * each:
        raise ValueError(
            f"-n {ranks} is not --nnodes {nodes} x --nproc-per-node {each} = {nodes * each}; "
            "leave one of them out"
        )
    if nodes is None and each is not None and ranks % each:
        raise ValueError(f"-n {ranks} is no multiple of --nproc-per-node {each}")
    if nodes is not None and each is None and ranks % nodes:
        raise ValueError(f"-n {ranks} is no multiple of --nnodes {nodes}")
    return ranks, each or (ranks // nodes if nodes else None)


def _read_hosts(name: str) -> dict[str, int | None]:
    """The machines of a hostfile and their slots, None where the file does not say."""
    hosts: dict[str, int | None] = {}
    for line in Path(name).read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words:
            slots = [word[6:] for word in words[1:] if word.startswith("slots=")]
            if slots and not slots[0].isdecimal():
                raise ValueError(f"{name}: slots must be a number, got '{line.strip()}'")
            before = hosts.get(words[0])
            hosts[words[0]] = (before or 0) + int(slots[0]) if slots else before
    if not hosts:
        raise ValueError(f"{name} names no machine; write one a line, as in: node1 slots=4")
    return hosts


def _check_hosts(options: argparse.Namespace, ranks: int, each: int | None) -> None:
    nodes = math.ceil(ranks / each) if each else 1
    if options.hostfile is None:
        scheduled = any(name in os.environ for name in SCHEDULERS)
        if max(nodes, options.nnodes or 1) > 1 and not scheduled:
            raise ValueError(
                f"{max(nodes, options.nnodes or 1)} machines need a --hostfile that names them"
            )
        return
    hosts = _read_hosts(options.hostfile)
    if max(nodes, options.nnodes or 1) > len(hosts):
        raise ValueError(
            f"{options.hostfile} names {len(hosts)} machines, and "
            f"{max(nodes, options.nnodes or 1)} are needed"
        )
    room = sum(slots or 1 for slots in hosts.values())
    if each is None and None not in hosts.values() and ranks > room:
        raise ValueError(f"{options.hostfile} has {room} slots for {ranks} ranks")


def _mpirun_command(options: argparse.Namespace) -> list[str]:
    from eellm.distributed import find_program

    ranks, each = _counts(options)
    _check_hosts(options, ranks, each)
    mpirun = find_program("mpirun")
    if mpirun is None:
        raise FileNotFoundError(
            "mpirun is missing; run: pip install 'eellm[mpi]', or install Open MPI"
        )
    command = [mpirun, "-n", str(ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        command += ["--allow-run-as-root"]
    if options.hostfile is None:
        place = "slot" if each is None else f"ppr:{each}:node"
        command += ["--map-by", f"{place}:OVERSUBSCRIBE"]
    else:
        command += ["--hostfile", options.hostfile]
        if each is not None:
            command += ["--map-by", f"ppr:{each}:node:OVERSUBSCRIBE"]
        # Ranks on other machines do not inherit the environment.
        names = sorted(name for name in os.environ if name.startswith("EELLM_"))
        names += [name for name in ("OMP_NUM_THREADS", "PYTHONPATH") if name in os.environ]
        command += [word for name in names for word in ("-x", name)]
    return command


# -- The job ------------------------------------------------------------------------------------


class _Job:
    """One run of mpirun, in a process group of its own so that a signal reaches it once."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.stopped: int | None = None

    def _noise(self) -> tuple[bytes, ...]:
        """How frames of mpirun begin that say nothing new, such as of ranks that we ended."""
        return NOISE if self.stopped is None else (*NOISE, b"prterun noticed")

    def run(self) -> int:
        """Returns the exit status of the job."""
        terminal = sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL if terminal else None,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,
            preexec_fn=_end_with_parent(),
        )

        def forward(number: int, frame: Any) -> None:
            # mpirun kills the ranks where it gets one of these; it hands SIGUSR1 on to them, which
            # train takes for the wish to stop after a step and a checkpoint.
            again, self.stopped = self.stopped is not None, number
            if process.poll() is None:
                process.send_signal(number if again else signal.SIGUSR1)
            if not again:
                print("eellm: stopping; once more ends the ranks at once", file=sys.stderr)

        before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
        assert process.stderr is not None
        reader = threading.Thread(
            target=copy_messages, args=(process.stderr, _stderr_bytes(), self._noise), daemon=True
        )
        reader.start()
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(5)  # a process that outlives the job may hold the pipe
            if not reader.is_alive():
                process.stderr.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped is not None:
            return 128 + self.stopped
        return 128 - status if status < 0 else status


def _end_with_parent() -> Callable[[], None]:
    """For the new process: the kernel ends it when this one is killed."""
    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, int(signal.SIGTERM)) and None


def _stderr_bytes() -> IO[bytes]:
    stream = getattr(sys.stderr, "buffer", None)
    return stream if stream is not None else open(2, "wb", closefd=False)


_RULE = b"-" * 74 + b"\n"
# What mpirun says of a job that has told its reason itself.
NOISE = (
    b"prterun detected",
    b"prterun has exited due to",
    b"MPI_ABORT was invoked",
    # Of Open MPI 4.
    b"mpirun detected that",
    b"Primary job  terminated normally",
)


_SIGNAL = re.compile(rb"process rank (\d+) .*exited\s+on\s+signal (\d+) \(([^)]*)\)", re.DOTALL)


def _in_our_words(frame: bytes) -> bytes:
    """One line of a frame that says that a rank was killed; any other frame as it is."""
    found = _SIGNAL.search(frame)
    if not found:
        return frame
    rank, number, name = (each.decode() for each in found.groups())
    return (
        f"eellm: error: rank {rank} was ended by signal {number} ({name}), and the job with it; "
        "look for what ended it (memory?), or let --max-restarts start it again\n"
    ).encode()


def copy_messages(
    source: IO[bytes],
    target: IO[bytes],
    noise: Callable[[], tuple[bytes, ...]] = lambda: NOISE,
) -> None:
    """Copies standard error of a job, but for frames of mpirun that begin with `noise`, such as
    that a rank ended with a status: the rank has said why. Text is passed on as it comes, also
    within a line."""
    read = getattr(source, "read1", source.read)
    held = b""  # begins at a line that is, or may become, a rule
    at_start = True
    while chunk := read(65536):
        held += chunk
        while held:
            if at_start and _RULE.startswith(held[: len(_RULE)]):
                end = held.find(_RULE, len(_RULE)) if len(held) >= len(_RULE) else -1
                if end < 0:
                    if len(held) < 8192:
                        break  # the rest of the frame is to come
                    end = len(held) - len(_RULE)
                frame, held = held[: end + len(_RULE)], held[end + len(_RULE) :]
                if not frame[len(_RULE) :].startswith(noise()):
                    target.write(_in_our_words(frame))
                at_start = frame.endswith(b"\n")
            else:
                line, newline, held = held.partition(b"\n")
                target.write(line + newline)
                at_start = bool(newline)
        target.flush()
    target.write(held)
    target.flush()
