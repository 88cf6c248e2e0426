"""Messages and collectives against NumPy. Rank 0 prints a JSON object: check -> faults.

Usage: correct.py [LARGEST], the bytes above which a message is sent in blocks.
"""

import json
import sys

import numpy as np

from eellm import _core
from eellm.distributed import _load_mpi, threads_per_rank, world

TYPES = (np.float32, np.float64, np.int32, np.int64)
COUNTS = (0, 1, 3, 1000, 4097, 70001)
LARGE = 3000001  # more than the scratch of a collective holds
PERIOD = 4099  # data repeat after so many elements


def filled(rank, count, salt=0):
    """What a rank sends; every rank can make what another one has."""
    block = np.random.default_rng([rank, count, salt]).integers(0, 256, PERIOD, dtype=np.uint8)
    return np.resize(block, count)


def values(rank, count, kind):
    random = np.random.default_rng([rank, count])
    if np.issubdtype(kind, np.integer):
        block = random.integers(-(2**30), 2**30, PERIOD).astype(kind)
    else:
        scale = 10.0 ** random.integers(-3, 4, PERIOD)
        block = (random.normal(size=PERIOD) * scale).astype(kind)
    return np.resize(block, count)


def check_ring(comm):
    """Everyone sends first, whatever the size: 4 KB and more hang where sends are not started."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for count in (0, 1, 1000, 4096, 65535, 65537, 1 << 20, (16 << 20) - 3):
        got = np.zeros(count, np.uint8)
        comm.exchange([(to, 1, filled(comm.rank, count))], [(source, 1, got)])
        assert np.array_equal(got, filled(source, count)), f"{count} bytes from rank {source}"


def check_everyone_to_everyone(comm):
    peers = range(comm.size)
    size = [70000 + 1000 * rank for rank in peers]
    got = [np.zeros(size[peer], np.uint8) for peer in peers]
    sends = [(peer, 10 + peer, filled(comm.rank, size[comm.rank], peer)) for peer in peers]
    comm.exchange(sends, [(peer, 10 + comm.rank, got[peer]) for peer in peers])
    for peer in peers:
        assert np.array_equal(got[peer], filled(peer, size[peer], comm.rank)), f"from rank {peer}"


def check_order(comm):
    """Equal tags keep their order, other tags do not wait for them."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sizes = (100000, 8, 65537, 0, 300000)
    sends = [(to, 2, filled(comm.rank, count, i)) for i, count in enumerate(sizes)]
    got = [np.zeros(count, np.uint8) for count in sizes]
    last = np.zeros(5, np.uint8)
    receives = [(source, 3, last), *((source, 2, data) for data in got)]
    comm.exchange([*sends, (to, 3, filled(comm.rank, 5))], receives)
    assert all(np.array_equal(data, filled(source, data.size, i)) for i, data in enumerate(got))
    assert np.array_equal(last, filled(source, 5))


def check_all_reduce(comm):
    """The sum in rank order, to the bit; the maximum, NaN included."""
    for kind in TYPES:
        for count in (*COUNTS, *([LARGE] if kind is np.float32 else [])):
            parts = [values(rank, count, kind) for rank in range(comm.size)]
            total = parts[0].copy()
            for part in parts[1:]:
                total += part
            got = comm.all_reduce(parts[comm.rank].copy(), "sum")
            assert got.tobytes() == total.tobytes(), f"sum of {count} {kind.__name__}"
            got = comm.all_reduce(parts[comm.rank].copy(), "max")
            assert np.array_equal(got, np.max(parts, axis=0)), f"max of {count} {kind.__name__}"
    poisoned = np.full(3, np.nan if comm.rank == 1 else comm.rank, np.float32)
    assert np.isnan(comm.all_reduce(poisoned, "max")).all()


def check_all_gather(comm):
    for count in (0, 1, 70000, 1 << 20):
        got = comm.all_gather(filled(comm.rank, count).tobytes())
        assert got == [filled(rank, count).tobytes() for rank in range(comm.size)], count
    got = comm.all_gather(b"x" * comm.rank)
    assert got == [b"x" * rank for rank in range(comm.size)]


def check_broadcast(comm):
    for root in range(comm.size):
        for count in (0, 1, 70000, 5 << 20):
            data = filled(root, count).tobytes()
            got = comm.broadcast(data if comm.rank == root else None, root)
            assert got == data, f"{count} bytes of rank {root}"


def check_barrier(comm):
    """Nobody leaves before the last has come."""
    import time

    for late in range(comm.size):
        if comm.rank == late:
            time.sleep(0.02)
        came = time.monotonic()
        comm.barrier()
        left = time.monotonic()
        times = [tuple(map(float, each.split())) for each in
                 comm.all_gather(f"{came} {left}".encode())]  # fmt: skip
        assert min(left for _, left in times) >= max(came for came, _ in times)


def check_split(comm):
    odd = comm.split(comm.rank % 2, -comm.rank)
    members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2][::-1]
    assert odd.size == len(members) and members[odd.rank] == comm.rank
    assert odd.transport == "mpi" and odd.timeout == comm.timeout
    assert odd.polling == comm.polling
    assert odd.all_gather(bytes([comm.rank])) == [bytes([rank]) for rank in members]
    alone = comm.split(0 if comm.rank == 1 else -1, 0)
    assert (alone is None) == (comm.rank != 1)
    # The same tag in two communicators does not mix.
    to, source = (odd.rank + 1) % odd.size, (odd.rank - 1) % odd.size
    far, near = np.zeros(9, np.uint8), np.zeros(9, np.uint8)
    comm.exchange([((comm.rank + 1) % comm.size, 5, filled(comm.rank, 9))],
                  [((comm.rank - 1) % comm.size, 5, far)])  # fmt: skip
    odd.exchange([(to, 5, filled(comm.rank, 9, 1))], [(source, 5, near)])
    assert np.array_equal(far, filled((comm.rank - 1) % comm.size, 9))
    assert np.array_equal(near, filled(members[source], 9, 1))


def check_control(comm):
    """The negative control: one wrong byte, and a sum in another order, are noticed."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    data = filled(comm.rank, 70000)
    data[-1] ^= 1
    got = np.zeros(70000, np.uint8)
    comm.exchange([(to, 6, data)], [(source, 6, got)])
    assert not np.array_equal(got, filled(source, 70000))
    parts = [values(rank, 4097, np.float32) for rank in range(comm.size)]
    total = comm.all_reduce(parts[comm.rank].copy(), "sum")
    assert total.tobytes() != sum(parts[::-1], np.zeros(4097, np.float32)).tobytes()


def check_world(comm):
    assert world() is comm and world("mpi", 20.0) is comm and comm.transport == "mpi"
    assert world("self").size == 1
    assert threads_per_rank() >= 1


def main():
    if len(sys.argv) > 1:
        comm = _core.comm_adopt(_load_mpi().world(_core.host(), 20.0, int(sys.argv[1])))
    else:
        comm = world(timeout=20.0)
    found = {}
    for name, check in [*globals().items()]:
        if name.startswith("check_") and not (name == "check_world" and len(sys.argv) > 1):
            try:
                check(comm)
                fault = ""
            except AssertionError as error:
                fault = f"rank {comm.rank}: {error or 'failed'}"
            faults = [each.decode() for each in comm.all_gather(fault.encode()) if each]
            found[name] = faults
    if comm.rank == 0:
        print(json.dumps(found))


main()
