"""Jobs of ranks that are threads, and messages that tell which one they are."""

import threading

import numpy as np

from eellm import _core

# Longer than anything here takes; a job that is still running then has hung.
LIMIT = 60.0


def run_ranks(size, body, timeout=LIMIT / 2):
    """Runs body(comm) on every rank, and returns what it returned or raised, by rank."""
    comms = _core.comm_local(size, timeout)
    results = [None] * size

    def run(rank, comm):
        try:
            results[rank] = body(comm)
        except Exception as error:
            results[rank] = error

    # Daemons, so that a hang fails one test and not the run.
    threads = [
        threading.Thread(target=run, args=(rank, comm), daemon=True)
        for rank, comm in enumerate(comms)
    ]
    del comms
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), f"a rank still runs after {LIMIT} s"
    return results


def succeed(size, body, timeout=LIMIT / 2):
    """The same; an exception of a rank is raised."""
    results = run_ranks(size, body, timeout)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def content(number, size):
    """The bytes of message `number`: no two messages that have any agree."""
    data = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    data[:4] = np.frombuffer(np.uint32(number + 1).tobytes(), np.uint8)[:size]
    return data


def exchange_plan(comm, plan):
    """Exchanges the messages (source, destination, tag, size) of a plan; the numbers of those that
    did not arrive as they were sent."""
    sends, receives, arrived = [], [], {}
    for number, (source, destination, tag, size) in enumerate(plan):
        if source == comm.rank:
            sends.append((destination, tag, content(number, size)))
        if destination == comm.rank:
            arrived[number] = np.zeros(size, np.uint8)
            receives.append((source, tag, arrived[number]))
    comm.exchange(sends, receives)
    return wrong_messages(plan, arrived)


def wrong_messages(plan, arrived):
    """The numbers of the messages whose data are not theirs."""
    return [
        number
        for number, data in arrived.items()
        if not np.array_equal(data, content(number, plan[number][3]))
    ]
