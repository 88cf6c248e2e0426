"""Tensors go out without a copy, by the buffer protocol and DLPack, and keep their owner alive."""

import ctypes
import gc
import sys

import numpy as np
import pytest

from eellm import _core
from tests.python.common import make, make_model

MATRIX = "model.layers.0.mlp.down_proj.weight"
VECTOR = "model.norm.weight"


@pytest.fixture(scope="module")
def model():
    return make_model()


class Buffer(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


SIMPLE, WRITABLE, FORMAT, ND, STRIDES = 0, 1, 4, 8, 0x18
C_CONTIGUOUS, F_CONTIGUOUS, ANY_CONTIGUOUS = 0x38, 0x58, 0x98


def get_buffer(tensor, flags):
    """What a consumer gets that asks with these flags: (len, ndim, format, shape, strides)."""
    view = Buffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(tensor), ctypes.byref(view), flags)
    shape = view.shape[: view.ndim] if view.shape else None
    strides = view.strides[: view.ndim] if view.strides else None
    found = (view.len, view.ndim, view.format, shape, strides)
    api.PyBuffer_Release(ctypes.byref(view))
    return found


@pytest.mark.parametrize("name", [MATRIX, VECTOR])
def test_asarray_shares_memory(model, name):
    tensor = model.parameter(name)
    array, again = np.asarray(tensor), np.asarray(model.parameter(name))
    assert array.dtype == np.float32 and array.shape == tensor.shape and array.flags.writeable
    before = array.flat[0]
    again.flat[0] = 123.0
    assert array.flat[0] == 123.0
    again.flat[0] = before
    assert tensor.dtype == "float32" and repr(tensor).startswith("Tensor(float32[")


def test_a_copy_is_no_view(model):
    """The negative control of all that look for shared memory."""
    copy = np.array(model.parameter(VECTOR))
    assert not np.shares_memory(copy, np.asarray(model.parameter(VECTOR)))


@pytest.mark.parametrize("extra", [0, WRITABLE, FORMAT, WRITABLE | FORMAT])
def test_buffer_requests(model, extra):
    tensor = model.parameter(MATRIX)
    rows, cols = tensor.shape
    size, strides = 4 * rows * cols, [4 * cols, 4]
    text = b"f" if extra & FORMAT else None
    assert get_buffer(tensor, SIMPLE | extra) == (size, 2, text, None, None)
    assert get_buffer(tensor, ND | extra) == (size, 2, text, [rows, cols], None)
    for flags in (STRIDES, C_CONTIGUOUS, ANY_CONTIGUOUS):
        assert get_buffer(tensor, flags | extra) == (size, 2, text, [rows, cols], strides)
    with pytest.raises(BufferError, match="order"):
        get_buffer(tensor, F_CONTIGUOUS | extra)
    vector = model.parameter(VECTOR)
    assert get_buffer(vector, F_CONTIGUOUS | extra)[3:] == ([*vector.shape], [4])


def test_memoryview(model):
    view = memoryview(model.parameter(MATRIX))
    assert view.format == "f" and view.c_contiguous and not view.readonly
    assert view.tolist() == np.asarray(model.parameter(MATRIX)).tolist()


def names_of_capsules(tensor, **options):
    capsule = tensor.__dlpack__(**options)
    text = repr(capsule)
    return text.split('"')[1]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "dltensor"),
        ((0, 8), "dltensor"),
        ((0, 99), "dltensor"),
        ((1, 0), "dltensor_versioned"),
        ((1, 3), "dltensor_versioned"),
        ((2, 0), "dltensor_versioned"),
    ],
)
def test_max_version_chooses_the_capsule(model, version, expected):
    assert names_of_capsules(model.parameter(MATRIX), max_version=version) == expected


def test_dlpack_without_arguments_is_the_old_form(model):
    tensor = model.parameter(MATRIX)
    assert names_of_capsules(tensor) == "dltensor"
    assert tensor.__dlpack_device__() == (1, 0)
    assert names_of_capsules(tensor, dl_device=(1, 0), copy=False, stream=None) == "dltensor"
    assert names_of_capsules(tensor, dl_device=(np.int32(1), np.int64(0))) == "dltensor"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"stream": 1}, BufferError, "stream"),
        ({"stream": -1}, BufferError, "stream"),
        ({"copy": True}, BufferError, "copy"),
        ({"copy": 1}, BufferError, "copy"),
        ({"dl_device": (2, 0)}, BufferError, r"\(1, 0\), asked for \(2, 0\)"),
        ({"dl_device": (1, 3)}, BufferError, r"asked for \(1, 3\)"),
        ({"dl_device": [1, 0]}, TypeError, "dl_device must be None or a tuple"),
        ({"dl_device": (1,)}, TypeError, "dl_device"),
        ({"dl_device": 1}, TypeError, "dl_device"),
        ({"max_version": 1}, TypeError, "max_version must be None or a tuple"),
        ({"max_version": (1, "0")}, TypeError, "max_version"),
        ({"max_version": (1, 2, 3)}, TypeError, "max_version"),
        ({"max_version": (2**80, 0)}, OverflowError, "too large"),
        ({"device": (1, 0)}, TypeError, "device"),
    ],
)
def test_dlpack_errors(model, options, error, text):
    with pytest.raises(error, match=text):
        model.parameter(MATRIX).__dlpack__(**options)
    with pytest.raises(TypeError):
        model.parameter(MATRIX).__dlpack__(None)


class Old:
    """Offers the form before version 1, as older producers do."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("form", [lambda t: t, Old])
@pytest.mark.parametrize("name", [MATRIX, VECTOR])
def test_numpy_takes_dlpack(model, name, form):
    array = np.from_dlpack(form(model.parameter(name)))
    plain = np.asarray(model.parameter(name))
    assert np.shares_memory(array, plain)
    np.testing.assert_array_equal(array, plain)
    assert array.dtype == np.float32


@pytest.mark.parametrize("form", [lambda t: t, Old])
def test_torch_takes_dlpack(model, form):
    torch = pytest.importorskip("torch")
    plain = np.asarray(model.parameter(MATRIX))
    tensor = torch.from_dlpack(form(model.parameter(MATRIX)))
    assert tensor.dtype == torch.float32 and tensor.data_ptr() == plain.ctypes.data
    before = plain[0, 0].copy()
    tensor[0, 0] = 7.0
    assert plain[0, 0] == 7.0
    tensor[0, 0] = float(before)


def uses(model):
    """Every way out, each as a function that takes a tensor and drops what it makes."""
    ways = {
        "view": lambda t: t.shape,
        "asarray": np.asarray,
        "memoryview": memoryview,
        "unconsumed": lambda t: t.__dlpack__(),
        "unconsumed versioned": lambda t: t.__dlpack__(max_version=(1, 0)),
        "numpy": np.from_dlpack,
        "numpy old": lambda t: np.from_dlpack(Old(t)),
    }
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        ways |= {"torch": torch.from_dlpack, "torch old": lambda t: torch.from_dlpack(Old(t))}
    return ways


def test_references_return_to_start(model, collected):
    pytest.importorskip("torch")
    tensor = model.parameter(MATRIX)
    kept = lambda t: globals().__setitem__("_kept", t.__dlpack__())  # noqa: E731
    for name, use in {**uses(model), "kept": kept}.items():
        before = sys.getrefcount(model), sys.getrefcount(tensor), _core.alloc_stats()[1:]
        for _ in range(20):
            use(tensor)
            use(model.parameter(VECTOR))
        gc.collect()
        after = sys.getrefcount(model), sys.getrefcount(tensor), _core.alloc_stats()[1:]
        # The negative control keeps a capsule, which keeps its tensor.
        assert (before == after) == (name != "kept"), name
    del globals()["_kept"]


def test_views_keep_their_owner(model, collected):
    torch = pytest.importorskip("torch")
    base = _core.alloc_stats()[1]
    owner, trainer = make()
    live = _core.alloc_stats()[1]
    gradient = np.asarray(trainer.gradient(MATRIX))
    views = [form(owner.parameter(MATRIX)) for form in (np.asarray, np.from_dlpack)]
    views += [torch.from_dlpack(owner.parameter(MATRIX)), owner.parameter(MATRIX).__dlpack__()]
    expected = np.array(views[0])
    del owner, trainer
    gc.collect()
    assert _core.alloc_stats()[1] >= live
    gradient[...] = 3.0
    for view in views[:3]:
        np.testing.assert_array_equal(np.asarray(view), expected)
    del gradient, view
    while views:
        views.pop()
    gc.collect()
    assert _core.alloc_stats()[1] == base


def test_a_view_in_a_cycle_is_collected(collected):
    base = _core.alloc_stats()[1]
    model = make_model()
    ring = [model.parameter(MATRIX)]
    ring.append(ring)
    del model, ring
    gc.collect()
    assert _core.alloc_stats()[1] == base


def test_a_failed_export_is_a_memory_error(model):
    tensor = model.parameter(MATRIX)
    before = sys.getrefcount(tensor)
    for version in (None, (1, 0)):
        _core._alloc_fail_at(1)
        with pytest.raises(MemoryError, match="export"):
            tensor.__dlpack__(max_version=version)
    assert sys.getrefcount(tensor) == before


def test_tensors_are_made_by_the_core_alone():
    with pytest.raises(TypeError):
        _core.Tensor()
    with pytest.raises(TypeError):
        object.__new__(_core.Tensor)
    with pytest.raises(TypeError):
        type("Mine", (_core.Tensor,), {})
