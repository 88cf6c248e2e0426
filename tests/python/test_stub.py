"""eellm/_core.pyi says what the module has: names, parameters, kinds and defaults."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import eellm
from eellm import _core
from tests.python.common import CONFIG, batch, make, run_step

STUB = Path(eellm.__file__).with_name("_core.pyi")
# What Python adds to every class or module, and what a stub need not name.
COMMON = {*dir(object), *dir(Exception), "__module__", "__weakref__", "__dict__"}
# The stub's name of a protocol that a type written in C has by slots alone before Python 3.12.
BY_SLOT = {"__buffer__", "__release_buffer__"}
TYPED_DICTS = {"ParameterRow"}
# Whose functions have no signature in their texts: test_keywords_of_an_engine tries them.


def stub_names(body):
    """{name: node} of the functions and classes of a stub; setters are left out."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, node)
    return found


def is_property(node):
    return any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)


def stub_parameters(node):
    """[(name, kind, default)] as inspect has them, without self; a default of ... is any."""
    kinds = inspect.Parameter
    positional = [(each, kinds.POSITIONAL_ONLY) for each in node.args.posonlyargs]
    positional += [(each, kinds.POSITIONAL_OR_KEYWORD) for each in node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    rows = [(each.arg, kind, d) for (each, kind), d in zip(positional, defaults, strict=True)]
    keyword = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    rows += [(each.arg, kinds.KEYWORD_ONLY, default) for each, default in keyword]
    rows = [row for row in rows if row[0] != "self"]
    return [(n, k, kinds.empty if d is None else ast.literal_eval(d)) for n, k, d in rows]


def module_parameters(function):
    """The same of the module's function, from the signature in its text; None without one."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return None
    rows = [(each.name, each.kind, each.default) for each in signature.parameters.values()]
    return [row for row in rows if row[0] != "self"]


def compare_parameters(name, stub, function):
    found = module_parameters(function)
    if found is None:
        return [f"{name}: no signature in the module"]
    expected = stub_parameters(stub)
    if [row[:2] for row in expected] != [row[:2] for row in found]:
        return [f"{name}: the stub has {expected}, the module {found}"]
    return [
        f"{name}: default of {row[0]} is {row[2]!r} in the stub, {other[2]!r} in the module"
        for row, other in zip(expected, found, strict=True)
        if row[2] is not ... and row[2] != other[2]
    ]


def compare_class(name, stub, kind):
    names = stub_names(stub.body)
    public = set(dir(kind)) - COMMON
    wrong = [f"{name}.{each}: not in the module" for each in set(names) - set(dir(kind)) - BY_SLOT]
    wrong += [f"{name}.{each}: not in the stub" for each in public - set(names) - BY_SLOT]
    for each, node in names.items():
        member = getattr(kind, each, None)
        if each == "__init__":
            wrong += compare_parameters(name, node, kind)
        elif member is not None and is_property(node) != inspect.isgetsetdescriptor(member):
            wrong.append(f"{name}.{each}: a property in one of the two only")
        elif member is not None and not is_property(node):
            wrong += compare_parameters(f"{name}.{each}", node, member)
    return wrong


def differences(text, module=_core):
    """What the stub and the module disagree on, one line each."""
    names = stub_names(ast.parse(text).body)
    public = {each for each in dir(module) if not each.startswith("__")}
    wrong = [f"{each}: not in the stub" for each in public - set(names)]
    for name, node in names.items():
        if name in TYPED_DICTS:
            continue
        member = getattr(module, name, None)
        if member is None:
            wrong.append(f"{name}: not in the module")
        elif isinstance(node, ast.ClassDef):
            wrong += compare_class(name, node, member)
        else:
            wrong += compare_parameters(name, node, member)
    return sorted(wrong)


def test_stub_and_module_agree():
    assert differences(STUB.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("def forward(", "def backward(", "Model.forward: not in the stub"),
        ("def alloc_stats(", "def memory_stats(", "memory_stats: not in the module"),
        ("    def steps(self) -> int:\n", "    def paces(self) -> int:\n", "Trainer.paces"),
        ("threads: int = 0", "threads: int = 1", "default of threads"),
        ("dynamic_weights: bool", "dynamic: bool", "Trainer: the stub has"),
        ("seed: int, /) -> None", "seed: int) -> None", "Model.initialize: the stub has"),
        ("    @property\n    def flops", "    def flops", "Trainer.flops: a property"),
    ],
)
def test_comparison_sees_a_fault(old, new, named):
    text = STUB.read_text()
    assert old in text
    assert any(
        line.startswith(named) or named in line for line in differences(text.replace(old, new))
    )


def test_signatures_are_what_the_functions_take():
    """The texts that inspect reads are written by hand: every keyword in them is known, and a
    foreign one is not."""
    model, trainer = make()
    functions = {_core.Model: {}, _core.Trainer: {"model": model}}
    for function, given in functions.items():
        for name, kind, _ in module_parameters(function):
            if kind is not inspect.Parameter.POSITIONAL_ONLY and name not in given:
                with pytest.raises((TypeError, ValueError)) as error:
                    function(**given, **{name: object()})
                assert "keyword argument" not in str(error.value), name
    arrays = [each[0] for each in module_parameters(trainer.evaluate)]
    with pytest.raises(TypeError, match="must be a NumPy array"):
        trainer.evaluate(**dict.fromkeys(arrays))
    names = [each[0] for each in module_parameters(trainer.step)]
    scalars = dict.fromkeys(names[7:], 0.5) | {"dropout_seed": 1, "update": True, "signal": 0}
    with pytest.raises(TypeError, match="tokens must be a NumPy array"):
        trainer.step(**dict.fromkeys(names[:6]), exit_weights=[], **scalars)
    del scalars["clip"]
    with pytest.raises(TypeError, match="budget"):
        trainer.step(**dict.fromkeys(names[:6]), exit_weights=[], **scalars, budget=1)


class _Unusable:
    """No number, no sequence, and neither true nor false."""

    def __bool__(self):
        raise TypeError("neither true nor false")


def test_keywords_of_an_engine():
    stub = stub_names(stub_names(ast.parse(STUB.read_text()).body)["Engine"].body)
    model, _ = make()
    engine = _core.Engine(model)
    tokens = np.array([1, 2], np.int32)
    calls = {
        "__init__": lambda **given: _core.Engine(model, **given),
        "add": lambda **given: engine.add(tokens, **given),
    }
    for name, call in calls.items():
        keywords = [n for n, kind, _ in stub_parameters(stub[name]) if n not in ("model", "tokens")]
        assert len(keywords) >= 4
        for keyword in keywords:
            with pytest.raises((TypeError, ValueError)) as error:
                call(**{keyword: _Unusable()})
            assert "keyword argument" not in str(error.value), keyword
        with pytest.raises(TypeError, match="foreign"):
            call(foreign=1)


def test_rows_of_the_table_have_the_keys_of_the_stub():
    tree = stub_names(ast.parse(STUB.read_text()).body)["ParameterRow"]
    keys = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    model, _ = make()
    assert all(set(row) == keys for row in model.table)


def test_results_have_the_keys_of_the_stub():
    _, trainer = make()
    step = run_step(trainer)
    assert set(step) == {
        "losses",
        "confidence",
        "tokens",
        "grad_norm",
        "finite",
        "updated",
        "signal",
    }
    data = batch(CONFIG)
    del data["row_ids"]
    result = trainer.evaluate(**data)
    assert set(result) == {"loss_sum", "agreement", "tokens", "confidence", "correct"}
    purposes = {"parameters", "gradients", "moments", "activations", "scratch"}
    assert set(trainer.memory) == purposes
    text = STUB.read_text()
    assert all(key in text for key in {*step, *result, *purposes})
    assert isinstance(trainer.flops, float | int) and trainer.flops > 0
