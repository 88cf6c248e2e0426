"""The table of operations: each has tests, kernels at every level, and refuses wrong arguments.

The operations, their arguments and which of them may be NULL are read from csrc/ops/ops.h, so that
a new operation fails here until it is tested.
"""

import ctypes as ct
import re
from pathlib import Path

import numpy as np
import pytest

from tests.ops.harness import (
    INVALID,
    ISAS,
    AdamwParams,
    AttentionParams,
    Dropout,
    Kv,
    LossParams,
    NormParams,
    OpError,
    Ops,
    Rope,
    pointer,
    tensor,
    weight_rows,
)

HERE = Path(__file__).resolve().parent
HEADER = (HERE.parents[1] / "csrc/ops/ops.h").read_text()
N, C, F, H, K, D, V, P = 5, 8, 6, 4, 2, 8, 11, 64


def operations(header):
    """The names in the list EE_OPS."""
    table = re.search(r"#define EE_OPS\(X\)((?:.*\\\n)+.*)", header).group(1)
    return re.findall(r"\bX\((\w+)\)", table)


def arguments(header, op):
    """(type, name) of each argument of ee_<op> but the context."""
    text = re.search(rf"enum ee_status\s+ee_{op}\((.*?)\);", header, re.S).group(1)
    pairs = [re.fullmatch(r"(.*\W)(\w+)", part.strip(), re.S) for part in text.split(",")]
    return [(re.sub(r"\s+", " ", pair[1]).strip(), pair[2]) for pair in pairs][1:]


OPERATIONS = operations(HEADER)
# A weight is packed through Ops.packed.
SPELLINGS = {"weight_pack": ("weight_pack", "packed")}


def untested(names, texts):
    """The operations that no text calls."""
    return [
        name
        for name in names
        if not any(
            re.search(rf"\.{spelling}\(", text)
            for text in texts
            for spelling in SPELLINGS.get(name, (name,))
        )
    ]


def test_every_operation_is_tested():
    files = [path for path in HERE.glob("test_*.py") if path != Path(__file__).resolve()]
    assert untested(OPERATIONS, [path.read_text() for path in files]) == []


def test_an_untested_operation_is_found():
    assert untested(["norm", "add", "weight_pack"], ["ops.norm_backward(x)", "ops.packed(w)"]) == [
        "norm",
        "add",
    ]
    made_up = "#define EE_OPS(X)  \\\n    X(norm)  \\\n    X(add)\n"
    assert operations(made_up) == ["norm", "add"]
    assert len(OPERATIONS) >= 24 and "attention_rows" in OPERATIONS


def table(isa):
    """The entries of the struct ee_ops of a level: the name, then the pointers."""
    # A context begins with the pointer to the table, and making one runs no kernel.
    with Ops(isa) as ops:
        address = ct.c_void_p.from_address(ops._context.value).value
        return (ct.c_void_p * (1 + len(OPERATIONS))).from_address(address)[:]


def exists(isa):
    """Whether the library has kernels of a level at all: only the plain one on other CPUs."""
    import platform

    return isa == "plain" or platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if exists(isa)])
def test_no_entry_is_missing(isa):
    name, *entries = table(isa)
    assert isa in ct.string_at(name).decode()
    assert [op for op, entry in zip(OPERATIONS, entries, strict=True) if not entry] == []


def test_levels_have_kernels_of_their_own():
    entries = [entry for isa in ISAS if exists(isa) for entry in table(isa)[1:]]
    assert len(set(entries)) == len(entries)


def array(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def indices(n=N, below=P):
    return pointer((np.arange(n) % below).astype(np.int32))


def keep(struct, *owners):
    """A structure that keeps alive what it points to."""
    struct.keep = owners
    return struct


def baseline(op):
    """Arguments of an operation that are right, every optional one given, in the order of ops.h."""
    x, y, vec = array(N, C), array(N, C), array(C)
    w = weight_rows(array(F, C))
    norm = NormParams(0, 1e-5, 0)
    rows = np.arange(N, dtype=np.uint64)
    dropout = keep(Dropout(0.1, 3, rows.ctypes.data), rows)
    q, k = array(N, H, D), array(N, K, D)
    attention = AttentionParams(0.3, 0.0, 0, None)
    segment = pointer(np.array([0, 2, N], np.int32))
    angles = array(P, D // 2)
    cache, pages = array(2, 4 * 64 * K * D), np.arange(4, dtype=np.int32)
    kv = keep(Kv(*(a.ctypes.data for a in (*cache, pages)), 2, 2, 4, 64, K, D), cache, pages)
    sequence, position = indices(below=2), indices()
    panels = np.zeros(64 * C + 16, np.float32)
    start = panels.ctypes.data + -panels.ctypes.data % 64
    packed = keep(weight_rows(array(F, C)), panels)
    packed.data, packed.layout = start, 1
    lse = array(N, H)
    total = pointer(np.zeros(1))
    return {
        "linear": (array(N, F), x, w, array(F), array(N, F)),
        "linear_backward_input": (y, array(N, F), w, True),
        "linear_backward_weight": (array(F, C), array(F), array(N, F), x),
        "weight_pack": (packed, array(F, C), 0),
        "norm": (y, array(N), array(N), x, vec, array(C), norm),
        "norm_backward": (
            *(y, vec, array(C), array(N, C), x, array(C), array(N), array(N), norm),
            True,
        ),
        "activation": (array(N, F), array(N, 2 * F), 3, True),
        "activation_backward": (
            *(array(N, 2 * F), array(N, F), array(N, F), array(N, 2 * F)),
            *(3, True),
        ),
        "softcap": (x, 5.0),
        "add": (y, x),
        "rotate": (q, position, keep(Rope(*[angles.ctypes.data] * 2, P, D, True), angles), False),
        "embed": (x, weight_rows(array(V, C)), array(P, C), indices(below=V), position, 1.0),
        "embed_backward": (array(V, C), array(P, C), x, indices(below=V), position, 1.0),
        "dropout": (y, x, array(N, C), dropout),
        "attention": (array(N, H, D), lse, q, k, array(N, K, D), segment, 2, attention),
        "attention_backward": (
            *(array(N, H, D), array(N, K, D), array(N, K, D), array(N, H, D), array(N, H, D)),
            *(lse, q, k, array(N, K, D), segment, 2, attention),
        ),
        "kv_write": (kv, k, array(N, K, D), sequence, position),
        "attention_rows": (array(N, H, D), q, kv, sequence, position, attention),
        "cross_entropy": (
            *(array(N), array(N), array(N, V), indices(below=V), array(N)),
            LossParams(0, 1, False, True),
        ),
        "confidence": (indices(), array(N), array(N), array(N, V)),
        "sum_squares": (total, x),
        "adamw": (x, y, np.abs(array(N, C)), array(N, C), AdamwParams(*[0.1] * 6, 1)),
        "normal": (x, 0.0, 1.0, 7),
        "convert": (np.zeros((N, C), np.uint16), x),
    }[op]


# Arguments that may be NULL, as ops.h says.
OPTIONAL = {
    "linear": {"bias", "residual"},
    "linear_backward_weight": {"acc_db"},
    "norm": {"bias"},
    "norm_backward": {"acc_dbias"},
    "activation_backward": {"y"},
    "embed": {"wpe"},
    "embed_backward": {"acc_dwpe"},
    "dropout": {"residual"},
}


# Operations whose tensors have any rank.
ANY_RANK = {"sum_squares", "adamw", "normal", "convert"}


def wrong(op, kind, value):
    """Wrong forms of an argument of a C type, as (what is wrong, value)."""
    if "ee_tensor" in kind:
        whole = np.zeros((*value.shape, 2), np.float32)
        yield "strided", whole[..., 0]
        yield "integer", value.astype(np.int32)
        if op not in ANY_RANK:
            yield "deep", value.reshape(1, 1, 1, -1)


def refused():
    """(operation, argument, what is wrong, all arguments) of every single fault."""
    for op in OPERATIONS:
        values = baseline(op)
        signature = arguments(HEADER, op)
        assert len(signature) == len(values), op
        for i, (kind, name) in enumerate(signature):
            if "*" not in kind:
                continue
            faults = dict(wrong(op, kind, values[i]))
            if name not in OPTIONAL.get(op, ()):
                faults["NULL"] = None
            for what, value in faults.items():
                yield op, name, what, (*values[:i], value, *values[i + 1 :])


def test_right_arguments_pass():
    with Ops("plain") as ops:
        for op in OPERATIONS:
            getattr(ops, op)(*baseline(op))


@pytest.mark.parametrize("op", sorted(OPTIONAL))
def test_optional_arguments(op):
    names = [name for _, name in arguments(HEADER, op)]
    for optional in OPTIONAL[op]:
        values = list(baseline(op))
        values[names.index(optional)] = None
        with Ops("plain") as ops:
            getattr(ops, op)(*values)


def test_every_fault_is_refused_and_named():
    with Ops("plain") as ops:
        count = 0
        for op, name, what, values in refused():
            with pytest.raises(OpError) as caught:
                getattr(ops, op)(*values)
            case = f"{op}, {name} {what}: {caught.value}"
            assert caught.value.status == INVALID, case
            assert re.match(rf"{op}: {name}\b|{op}: mean and rstd", str(caught.value)), case
            count += 1
        assert count > 200


def test_the_message_says_what_is_expected_and_what_came():
    y, _, _, x, weight, bias, params = baseline("norm")
    with Ops("plain") as ops, pytest.raises(OpError) as caught:
        ops.norm(y, None, None, x, array(C - 1), bias, params)
    assert str(caught.value) == "norm: weight must have C = 8 elements, got float32[7]"
    with Ops("plain") as ops, pytest.raises(OpError) as caught:
        ops.norm(y, None, None, tensor(x.view(np.int32)), weight, bias, params)
    assert str(caught.value) == "norm: x must be float32, got int32[5, 8]"


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_rows_are_no_work(op):
    """Tensors of N rows cut to none are legal, and accumulated results stay as they are."""
    values, signature = list(baseline(op)), arguments(HEADER, op)
    gradients = {}
    for i, (kind, name) in enumerate(signature):
        of_rows = "ee_tensor" in kind and len(values[i]) == N
        if name == "rows" or (of_rows and name not in ("weight", "acc_dweight")):
            values[i] = values[i][:0]
        if name.startswith("acc_"):
            gradients[i] = values[i].copy()
        if name == "segments":
            values[i - 1 : i + 1] = None, 0
    with Ops("plain") as ops:
        getattr(ops, op)(*values)
    for i, before in gradients.items():
        assert (values[i] == before).all()
