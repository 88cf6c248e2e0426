"""Damaged schedule files: refused with a message, or valid by the graph of their actions too."""

import json

import pytest

from eellm.pipeline import Schedule
from eellm.pipeline.files import parse
from tests.files import fuzz
from tests.pipeline import reference

SMALL = [
    Schedule("gpipe", 1, 2),
    Schedule("1f1b", 3, 3, fill=(1, 2), exits=(0, 1)),
    Schedule("interleaved", 2, 3, 2),
    Schedule("zero_bubble", 2, 3),
]


def damaged(rng, files):
    """A damaged file: its bytes, its JSON, or two actions of a list."""
    data = files[int(rng.integers(0, len(files)))]
    kind = int(rng.integers(0, 3))
    if kind == 0:
        return fuzz.damage_bytes(data, rng)
    values = json.loads(data)
    if kind == 1:
        return fuzz.encode(fuzz.damage_json(values, rng))
    rank = int(rng.integers(0, len(values["lists"])))
    actions = values["lists"][rank].split()
    i, j = (int(x) for x in rng.integers(0, len(actions), 2))
    actions[i], actions[j] = actions[j], actions[i]
    values["lists"][rank] = " ".join(actions)
    return fuzz.encode(values)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_files_raise_clean_errors(count, tmp_path):
    files = []
    for i, schedule in enumerate(SMALL):
        schedule.save(tmp_path / f"{i}.json")
        files.append((tmp_path / f"{i}.json").read_bytes())

    def read(data):
        found = parse(data, "input")
        reference.times(reference.Lists(found))

    accepted = fuzz.run(count, 20260103, lambda rng: damaged(rng, files), read, (ValueError,))
    assert 0 < accepted < count


def test_the_fuzzer_sees_a_missing_check(tmp_path, monkeypatch):
    """Negative control: without the walk, damage goes through."""
    monkeypatch.setattr(Schedule, "validate", lambda self: self)
    with pytest.raises(reference.RefusedError):
        test_damaged_files_raise_clean_errors(10_000, tmp_path)
