"""Jobs that fail: failing.py CASE. Every rank reports as the command line does."""

import os
import signal
import sys
import time

import numpy as np

from eellm.distributed import world


def asleep(comm):
    """Rank 0 hangs; rank 1 waits for it, and the others for rank 1."""
    if comm.rank == 0:
        time.sleep(60)
    comm.exchange([], [(comm.rank - 1, 2, np.zeros(4, np.float32))])


def asleep_in_collective(comm):
    if comm.rank == 0:
        time.sleep(60)
    comm.all_reduce(np.zeros(100000, np.float32))


def not_received(comm):
    """A large message that nobody takes, in a split communicator."""
    part = comm.split(0, -comm.rank)
    if part.rank == 0:
        time.sleep(60)
    part.exchange([(0, 7, np.zeros(1 << 20, np.uint8))], [])


def killed(comm):
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.exchange([], [((comm.rank + 1) % comm.size, 2, np.zeros(4, np.float32))])


def wrong_size(comm):
    data = np.zeros(10 + comm.rank, np.uint8)
    peer = 1 - comm.rank
    comm.exchange([(peer, 4, data)], [(peer, 4, data.copy())])


def uncaught(comm):
    """A script that fails on one rank, without a word to the others."""
    if comm.rank == 1:
        raise RuntimeError("out of ideas")
    comm.barrier()


def aborted(comm):
    if comm.rank == 1:
        comm.abort("the disk of rank 1 is full")
    comm.barrier()


def main():
    case = sys.argv[1]
    if case == "never_comes" and os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        time.sleep(60)
    from eellm._core import CommError
    from eellm.distributed import report_failure

    try:
        comm = world(timeout=3.0 if case == "never_comes" else 30.0)
        comm.timeout = 1.0
        globals()[case](comm)
    except CommError as error:
        report_failure(f"eellm: error: {error}", 1)


main()
