"""Schedules in Python and in files: what they refuse, and that nothing is lost on the way."""

import json

import numpy as np
import pytest

from eellm.pipeline import Costs, Schedule

EXAMPLES = [
    Schedule("gpipe", 1, 1),
    Schedule("gpipe", 3, 2),
    Schedule("1f1b", 4, 6, exits=(1, 2)),
    Schedule("1f1b", 4, 6, fill="auto", exits=(0, 1)),
    Schedule("1f1b", 5, 3, fill=(1, 4), ratio=1.0, exits=(2,)),
    Schedule("interleaved", 3, 7, 2, exits=(1,)),
    Schedule("zero_bubble", 4, 5),
]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_saved_and_loaded(schedule, tmp_path):
    schedule.save(tmp_path / "a.json")
    loaded = Schedule.load(tmp_path / "a.json")
    assert loaded == schedule and not loaded.custom
    costs = Costs.uniform(schedule.ranks, schedule.chunks)
    assert loaded.simulate(costs).as_dict() == schedule.simulate(costs).as_dict()
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert len(lines) == 13 + schedule.ranks  # a line a rank


def test_an_edited_file_that_can_run_is_taken(tmp_path):
    path = tmp_path / "a.json"
    Schedule("1f1b", 2, 3).save(path)
    text = path.read_text()
    # The first rank sends its last input earlier than the name says.
    path.write_text(text.replace("F1:sk B0:r F2:sk B1:r", "F1:sk F2:sk B0:r B1:r"))
    loaded = Schedule.load(path)
    assert loaded.custom and loaded != Schedule("1f1b", 2, 3)
    result = loaded.simulate(Costs.uniform(2))
    assert result.slots.tolist() == [3, 1]


def test_an_edited_file_that_deadlocks_is_refused(tmp_path):
    path = tmp_path / "a.json"
    Schedule("1f1b", 2, 3).save(path)
    text = path.read_text()
    text = text.replace("F0:sk F1:sk B0:r F2:sk", "F0:sk B0:r F1:sk F2:sk")
    text = text.replace("F0:rk B0:s F1:rk B1:s", "F0:rk F1:rk B0:s B1:s")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: rank \d, action 1 .*wait for each other"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"format_version": 1', '"format_version": 2', ["format_version", "got 2"]),
        ('"name": "1f1b"', '"name": "1f2b"', ["name of the schedule", "1f2b"]),
        ('"ranks": 2', '"ranks": 3', ["lists is invalid", "3 ranks"]),
        ('"ranks": 2', '"ranks": "2"', ["ranks is invalid", "an integer"]),
        ('"ranks": 2', '"ranks": -1', ["ranks is invalid", "-1"]),
        ('"microbatches": 3', '"microbatches": 4', ["rank 0", "the list ends after 3"]),
        ('"microbatches": 3', '"microbatches": 99999999999', ["microbatches is invalid"]),
        ('"fill": [0, 0]', '"fill": [0]', ["fill is invalid"]),
        ('"fill": [0, 0]', '"fill": [0, 7]', ["Part 2 of fill is invalid", "7"]),
        ('"ratio": 2.0', '"ratio": true', ["ratio is invalid"]),
        ('"ratio": 2.0', '"ratio": -2.0', ["ratio is invalid"]),
        ('"exits": []', '"exits": [5]', ["early exit", "5"]),
        ('"exits": []', '"exit": []', ["unknown key", "'exit'"]),
        ("F2:sk", "X2:sk", ["rank 0, action 3 is no action", "X2:sk"]),
        ("F2:sk", "F2:sq", ["rank 0, action 3 is no action"]),
        ("F2:sk", "F-2:sk", ["rank 0, action 3 is no action"]),
        ("F2:sk", "F9:sk", ["rank 0, action 3", "microbatch"]),
        ("F2:sk", "F2.1:sk", ["rank 0, action 3", "1 chunks"]),
        ("F2:sk", "F2:s", ["rank 0, action 3", "flags"]),
        ('  "lists": [', '  "lists": 7, "x": [', ["unknown key"]),
        ("{", "", ["is no schedule", "JSON"]),
        ("{", "[" * 100_000, ["is no schedule"]),
    ],
)
def test_files_that_are_refused(old, new, parts, tmp_path):
    path = tmp_path / "a.json"
    Schedule("1f1b", 2, 3).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        Schedule.load(path)
    for part in ["a.json", *parts]:
        assert part in str(caught.value), caught.value


def test_files_that_hold_something_else(tmp_path):
    for text in ("[]", "7", "null", '{"lists": []}', '"F0"'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            Schedule.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no schedule"):
        Schedule.load(tmp_path / "a.json")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    Schedule("1f1b", 2, 3).save(path)
    before = path.read_bytes()
    monkeypatch.setenv("EELLM_FAIL_AT", "1")
    from eellm.files.disk import reset_faults

    reset_faults()
    with pytest.raises(OSError):
        Schedule("gpipe", 3, 3).save(path)
    monkeypatch.delenv("EELLM_FAIL_AT")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "options", "parts"),
    [
        (("zb", 2, 2), {}, ["name of the schedule", "zero_bubble", "zb"]),
        (("1f1b", 0, 2), {}, ["ranks", "got 0"]),
        (("1f1b", 2.0, 2), {}, ["ranks", "2.0"]),
        (("1f1b", 70_000, 2), {}, ["ranks", "65536"]),
        (("1f1b", 2, 0), {}, ["microbatches", "got 0"]),
        (("1f1b", 2, 2, 2), {}, ["chunks", "interleaved"]),
        (("interleaved", 2, 2, 0), {}, ["chunks", "got 0"]),
        (("1f1b", 2, 2), {"fill": (1, 2)}, ["Part 2 of fill", "got 2"]),
        (("1f1b", 2, 2), {"fill": "all"}, ["fill is invalid", "auto", "'all'"]),
        (("gpipe", 2, 2), {"fill": (1, 0)}, ["fill is invalid", "1f1b"]),
        (("zero_bubble", 2, 2), {"fill": "auto"}, ["fill is invalid", "1f1b"]),
        (("1f1b", 2, 2), {"ratio": 0}, ["ratio", "above 0"]),
        (("1f1b", 2, 2), {"ratio": float("nan")}, ["ratio", "nan"]),
        (("1f1b", 2, 2), {"exits": (2,)}, ["early exit", "0 to 1", "got 2"]),
        (("1f1b", 2, 2), {"exits": "12"}, ["exits is invalid"]),
        (("1f1b", 2, 2), {"lists": [np.zeros(2)] * 2}, ["the list of rank 0", "float64"]),
        (("1f1b", 2, 2), {"lists": []}, ["lists is invalid", "2 ranks", "got 0"]),
    ],
)
def test_wrong_arguments(arguments, options, parts):
    with pytest.raises(ValueError) as caught:
        Schedule(*arguments, **options)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_costs_for_another_pipeline_are_refused():
    with pytest.raises(ValueError, match=r"costs do not fit .*expected 4 ranks .*got 2"):
        Schedule("1f1b", 4, 6).simulate(Costs.uniform(2))
    with pytest.raises(ValueError, match="rank is invalid"):
        Schedule("1f1b", 4, 6).actions(4)


def test_equality():
    assert Schedule("1f1b", 1, 3) == Schedule("1f1b", 1, 3)
    assert Schedule("1f1b", 4, 6) != Schedule("1f1b", 4, 7)
    assert Schedule("1f1b", 4, 6) != Schedule("gpipe", 4, 6)
    assert Schedule("1f1b", 4, 1) == Schedule("gpipe", 4, 1)  # the same lists
    assert Schedule("1f1b", 4, 6, exits=(1,)) != Schedule("1f1b", 4, 6)
    assert Schedule("1f1b", 4, 6) != 7


def test_repr_and_result():
    schedule = Schedule("1f1b", 4, 6, fill="auto", exits=(2, 1, 1))
    shown = "Schedule('1f1b', ranks=4, microbatches=6, fill=(2, 2), exits=(1, 2))"
    assert repr(schedule) == shown
    assert schedule.total == 10 and [schedule.part_of(m) for m in (5, 6, 8)] == [0, 1, 2]
    result = schedule.simulate(Costs.uniform(4))
    assert json.loads(json.dumps(result.as_dict()))["time"] == result.time == 27
    assert "27" in repr(result)
    busy = result.grid(4, 27)
    assert busy.sum(1) == pytest.approx(result.busy)
    for rank in range(4):
        spans = result.times(rank)
        clipped = [
            sum(max(0.0, min(end, i + 1) - max(start, i)) for start, end in spans)
            for i in range(27)
        ]
        assert busy[rank] == pytest.approx(clipped)
