"""The object Comm: properties, arguments, threads, capsules."""

import ctypes
import threading

import numpy as np
import pytest

import eellm
from eellm import _core

python = ctypes.pythonapi
python.PyCapsule_New.restype = ctypes.py_object
python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
python.PyCapsule_GetPointer.restype = ctypes.c_void_p
python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
# PyCapsule_New keeps the pointer to the name.
COMM_NAME, OTHER_NAME = b"eellm.comm", b"eellm.other"


class Head(ctypes.Structure):
    """How struct ee_comm and struct ee_host begin."""

    _fields_ = [("abi", ctypes.c_int), ("struct_size", ctypes.c_size_t)]


def test_self():
    comm = _core.comm_self()
    assert (comm.rank, comm.size, comm.transport, comm.timeout) == (0, 1, "self", 300.0)
    assert repr(comm) == "Comm(rank 0 of 1, self)"
    comm.barrier()
    assert comm.all_gather(b"abc") == [b"abc"] and comm.broadcast(b"d") == b"d"
    array = np.arange(4.0)
    assert comm.all_reduce(array) is array and array.tolist() == [0, 1, 2, 3]
    out = np.zeros(3, np.float32)
    comm.exchange([(0, 1, np.ones(3, np.float32))], [(0, 1, out)])
    assert out.tolist() == [1, 1, 1]
    assert comm.split(0, 0).size == 1 and comm.split(-1, 0) is None
    with pytest.raises(eellm.CommError, match=r"no matching send \(tag 3\)"):
        comm.exchange([], [(0, 3, out)])


def test_polling():
    first, second = _core.comm_local(2)
    assert first.polling == second.polling == 50e-6
    first.polling = 0.25
    assert first.polling == 0.25 and second.polling == 50e-6
    first.polling = 0
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="polling must be at least 0"):
            first.polling = bad
    with pytest.raises(TypeError):
        first.polling = "long"
    with pytest.raises(AttributeError):
        del first.polling
    assert first.polling == 0


def test_timeout():
    first, second = _core.comm_local(2, timeout=2.5)
    assert first.timeout == second.timeout == 2.5
    first.timeout = 7
    assert first.timeout == 7 and second.timeout == 2.5
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="timeout must be more than 0"):
            first.timeout = bad
        with pytest.raises(ValueError, match="timeout must be more than 0"):
            _core.comm_local(2, bad)
    with pytest.raises(TypeError):
        first.timeout = "long"
    with pytest.raises(AttributeError):
        del first.timeout
    assert first.timeout == 7


BAD_CALLS = {
    "broadcast without data": (lambda c: c.broadcast(None), TypeError, "bytes on the root"),
    "foreign root": (lambda c: c.broadcast(None, 3), ValueError, "between 0 and 0, got 3"),
    "text for bytes": (lambda c: c.all_gather("abc"), TypeError, "data must be bytes, got str"),
    "unknown reduction": (lambda c: c.all_reduce(np.zeros(2), "min"), ValueError, "'sum' or 'max'"),
    "list": (lambda c: c.all_reduce([1.0]), TypeError, "array must be a NumPy array, got list"),
    "float16": (lambda c: c.all_reduce(np.zeros(2, np.float16)), ValueError, "got format 'e'"),
    "uint64": (lambda c: c.all_reduce(np.zeros(2, np.uint64)), ValueError, "float32, float64"),
    "other byte order": (lambda c: c.all_reduce(np.zeros(2, ">f4")), ValueError, "format '>f'"),
    "strided": (lambda c: c.all_reduce(np.zeros(9)[::2]), ValueError, "C-contiguous"),
    "read-only": (lambda c: c.all_reduce(np.broadcast_to(1.0, ())), ValueError, "writable"),
    "unaligned": (
        lambda c: c.all_reduce(np.zeros(17, np.uint8)[1:].view(np.float64)),
        ValueError,
        "aligned",
    ),
    "no list": (lambda c: c.exchange((), []), TypeError, "sends must be a list, got tuple"),
    "no message": (lambda c: c.exchange([], [3]), TypeError, r"\(peer, tag, array\), got int"),
    "foreign peer": (
        lambda c: c.exchange([(1, 0, np.zeros(1))], []),
        ValueError,
        "cannot send to rank 1",
    ),
    "bad tag": (lambda c: c.exchange([(0, -1, np.zeros(1))], []), ValueError, "got -1"),
    "received into bytes": (lambda c: c.exchange([], [(0, 0, b"abc")]), ValueError, "writable"),
    "too many": (
        lambda c: c.exchange([(0, 0, np.zeros(1))] * 257, []),
        ValueError,
        "at most 256 messages",
    ),
    "ranks": (lambda c: _core.comm_local(0), ValueError, "1 to 4096 ranks, got 0"),
    "too many ranks": (lambda c: _core.comm_local(5000), ValueError, "got 5000"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, text = BAD_CALLS[name]
    comm = _core.comm_self()
    with pytest.raises(error, match=text):
        call(comm)
    comm.barrier()


def test_no_instances_and_no_subclasses():
    with pytest.raises(TypeError):
        _core.Comm()
    with pytest.raises(TypeError):
        type("Mine", (_core.Comm,), {})


def test_two_threads_in_one_communicator():
    first, second = _core.comm_local(2, 30.0)
    waits = threading.Thread(target=first.barrier, daemon=True)
    waits.start()
    while True:
        # Until the thread is within its call, this one gets through.
        try:
            first.timeout = 30.0
        except eellm.BusyError as error:
            assert "rank 0 is in use by another thread" in str(error)
            break
    with pytest.raises(eellm.Error, match="in use"):
        first.exchange([], [])
    with pytest.raises(eellm.BusyError):
        first.abort("no")
    second.barrier()
    waits.join(30)
    assert not waits.is_alive()
    first.exchange([], [])


def make_self():
    """A communicator of the core as its transports hand it over: (capsule, its head)."""
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
    pointer = ctypes.c_void_p()
    assert function(_core._symbols()["ee_comm_self"])(ctypes.byref(pointer)) == 0
    return python.PyCapsule_New(pointer, COMM_NAME, None), Head.from_address(pointer.value)


def test_adopt(collected):
    before = _core.alloc_stats()[1]
    capsule, _ = make_self()
    comm = _core.comm_adopt(capsule)
    assert comm.all_gather(b"x") == [b"x"]
    with pytest.raises(ValueError, match="not been adopted"):
        _core.comm_adopt(capsule)
    del comm
    assert _core.alloc_stats()[1] == before


def test_adopt_refuses_another_version(collected):
    before = _core.alloc_stats()[1]
    capsule, head = make_self()
    for field in ("abi", "struct_size"):
        right = getattr(head, field)
        setattr(head, field, right + 1)
        with pytest.raises(NotImplementedError, match=f"version .*{right + 1}.*{right}"):
            _core.comm_adopt(capsule)
        setattr(head, field, right)
    _core.comm_adopt(capsule)
    assert _core.alloc_stats()[1] == before


def test_adopt_refuses_what_is_no_communicator():
    with pytest.raises(TypeError, match="capsule must be a capsule of a communicator, got int"):
        _core.comm_adopt(3)
    head = Head()
    with pytest.raises(ValueError, match="must hold a communicator"):
        _core.comm_adopt(python.PyCapsule_New(ctypes.addressof(head), OTHER_NAME, None))


def test_host():
    pointer = python.PyCapsule_GetPointer(_core.host(), b"eellm.host")
    head = Head.from_address(pointer)
    # Two numbers and five functions.
    assert head.abi == 1 and head.struct_size == 16 + 5 * ctypes.sizeof(ctypes.c_void_p)


def test_failed_allocations(collected):
    """The first, second, third ... allocation fails: an exception, and nothing is kept."""
    calls = (
        lambda: _core.comm_local(3),
        lambda: _core.comm_self().all_gather(b"abc"),
        lambda: _core.comm_self().split(0, 0),
    )
    for call in calls:
        before = _core.alloc_stats()[1]
        for n in range(1, 20):
            _core._alloc_fail_at(n)
            try:
                call()
                break
            except MemoryError:
                assert _core.alloc_stats()[1] == before
            finally:
                _core._alloc_fail_at(0)
        assert 1 < n < 19 and _core.alloc_stats()[1] == before
