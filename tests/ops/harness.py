"""Calls the operations of the native core one by one, with NumPy arrays.

The functions are those of the module that users run: `eellm._core` tells their addresses
(EELLM_OPS_LIBRARY names another shared library to take them from). A call checks nothing by itself:
what ops.c checks is what is tested.
"""

import ctypes as ct
import os

import numpy as np

ISAS = ("plain", "avx2", "avx512")
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int32": 4, "int64": 5}
OK, NOMEM, INVALID, IO, UNSUPPORTED = range(5)


class Tensor(ct.Structure):
    _fields_ = (
        ("data", ct.c_void_p),
        ("dtype", ct.c_int),
        ("ndim", ct.c_int32),
        ("shape", ct.c_int64 * 4),
        ("stride", ct.c_int64 * 4),
    )


class Weight(ct.Structure):
    _fields_ = (
        ("data", ct.c_void_p),
        ("dtype", ct.c_int),
        ("layout", ct.c_int),
        ("rows", ct.c_int64),
        ("cols", ct.c_int64),
    )


class NormParams(ct.Structure):
    _fields_ = (("kind", ct.c_int), ("eps", ct.c_float), ("weight_offset", ct.c_float))


class Rope(ct.Structure):
    _fields_ = (
        ("cos", ct.c_void_p),
        ("sin", ct.c_void_p),
        ("positions", ct.c_int64),
        ("dims", ct.c_int32),
        ("interleaved", ct.c_bool),
    )


class Dropout(ct.Structure):
    _fields_ = (("p", ct.c_float), ("key", ct.c_uint64), ("row", ct.c_void_p))


class AttentionParams(ct.Structure):
    _fields_ = (
        ("scale", ct.c_float),
        ("softcap", ct.c_float),
        ("window", ct.c_int32),
        ("dropout", ct.c_void_p),
    )


class Kv(ct.Structure):
    _fields_ = (
        ("k", ct.c_void_p),
        ("v", ct.c_void_p),
        ("table", ct.c_void_p),
        ("sequences", ct.c_int64),
        ("pages_per_sequence", ct.c_int64),
        ("pages", ct.c_int64),
        ("page", ct.c_int32),
        ("heads", ct.c_int32),
        ("width", ct.c_int32),
    )


class LossParams(ct.Structure):
    _fields_ = (
        ("softcap", ct.c_float),
        ("temperature", ct.c_float),
        ("dynamic", ct.c_bool),
        ("gradient", ct.c_bool),
    )


class AdamwParams(ct.Structure):
    _fields_ = (
        ("learning_rate", ct.c_double),
        ("beta1", ct.c_double),
        ("beta2", ct.c_double),
        ("eps", ct.c_double),
        ("weight_decay", ct.c_double),
        ("gradient_scale", ct.c_float),
        ("step", ct.c_int64),
    )


class OpError(Exception):
    """A status other than EE_OK, with the message of the core."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def tensor(array, dtype=None):
    """A view of an array (rank 1 to 4, contiguous last dimension). uint16 arrays are bfloat16
    unless `dtype` says otherwise."""
    name = dtype or {"uint16": "bfloat16"}.get(array.dtype.name, array.dtype.name)
    view = Tensor(array.ctypes.data, DTYPES[name], array.ndim)
    for i in range(array.ndim):
        view.shape[i] = array.shape[i]
        view.stride[i] = array.strides[i] // array.itemsize
    view.keep = array
    return view


def weight_rows(array):
    """A float32 weight of plain rows."""
    view = Weight(array.ctypes.data, DTYPES["float32"], 0, *array.shape)
    view.keep = array
    return view


def pointer(array):
    """The address of a contiguous array (int32 positions and the like)."""
    assert array.flags.c_contiguous
    address = ct.c_void_p(array.ctypes.data)
    address.keep = array
    return address


def _functions():
    path = os.environ.get("EELLM_OPS_LIBRARY")
    if path:
        library = ct.CDLL(path)
        return lambda name: ct.cast(getattr(library, name), ct.c_void_p).value
    from eellm import _core

    return _core._symbols().__getitem__


def function(name, result, *arguments):
    """The C function `name` of the core."""
    return ct.CFUNCTYPE(result, *arguments)(_functions()(name))


def available_isas():
    """The instruction-set levels that this CPU runs."""
    best = function("ee_isa_best", ct.c_int)()
    return ISAS[: best + 1]


class Ops:
    """A context of one instruction-set level and number of threads; `ops.norm(y, ...)` calls
    ee_norm. Arrays become tensors, None NULL, structures pointers; other values pass as they are.
    """

    def __init__(self, isa, threads=1):
        self.isa, self.threads = isa, threads
        self._context = ct.c_void_p()
        create = function("ee_ctx_create", ct.c_int, ct.c_void_p, ct.c_int, ct.c_int)
        self._check(create(ct.byref(self._context), ISAS.index(isa), threads))

    def close(self):
        function("ee_ctx_destroy", None, ct.c_void_p)(self._context)
        self._context = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"Ops({self.isa}, threads={self.threads})"

    @staticmethod
    def _check(status):
        if status != OK:
            raise OpError(status, function("ee_last_error", ct.c_char_p)().decode())

    @staticmethod
    def _argument(value):
        if isinstance(value, np.ndarray):
            value = tensor(value)
        if isinstance(value, ct.Structure):
            return ct.c_void_p, ct.cast(ct.pointer(value), ct.c_void_p), value
        if value is None:
            return ct.c_void_p, None, None
        for kind, type_ in ((bool, ct.c_bool), (float, ct.c_float), (int, ct.c_int64)):
            if isinstance(value, kind):
                return type_, type_(value), None
        return ct.c_void_p, value, value  # a pointer

    def __getattr__(self, op):
        def call(*values):
            arguments = [self._argument(value) for value in values]
            types = [ct.c_void_p, *(kind for kind, _, _ in arguments)]
            run = function(f"ee_{op}", ct.c_int, *types)
            self._check(run(self._context, *(value for _, value, _ in arguments)))

        return call

    @staticmethod
    def panels(shape, dtype="float32"):
        """A weight of column panels of a shape [M, K]; NaN until it is packed."""
        size = function("ee_weight_bytes", ct.c_size_t, ct.c_int, ct.c_int, ct.c_int64, ct.c_int64)
        data = np.full(size(DTYPES[dtype], 1, *shape) + 64, 0xFF, np.uint8)
        start = -data.ctypes.data % 64
        view = Weight(data.ctypes.data + start, DTYPES[dtype], 1, *shape)
        view.keep = data
        return view

    def packed(self, rows, dtype="float32"):
        """Packs rows[M, K] into a weight of column panels."""
        view = self.panels(rows.shape, dtype)
        self.weight_pack(view, rows, 0)
        return view
