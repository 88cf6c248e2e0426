"""Checkpoints survive every failing write, fsync and rename, and a process that dies there."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import eellm
from eellm.config import ModelConfig
from eellm.files import checkpoint
from eellm.files.disk import reset_faults
from eellm.files.safetensors import SafetensorsFile
from tests.files import fuzz
from tests.files.fake import FakeModel, FakeTrainer, gpt2_rows

CONFIG = ModelConfig.gpt2(vocab_size=6, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
ROOT = Path(eellm.__file__).parents[1]


def parts(step):
    model = FakeModel(gpt2_rows(), seed=step)
    trainer = FakeTrainer(model, seed=1000 + step)
    trainer.steps = step - 1
    return model, trainer


def save(root, step, keep=0, **options):
    model, trainer = parts(step)
    state = {"data": {"position": step * 10}, "random": [1, 2**63, step]}
    return checkpoint.save_training(root, step, CONFIG, model, trainer, state, keep, **options)


def load(path):
    """The step of a checkpoint, after everything in it has been compared."""
    model, trainer = FakeModel(gpt2_rows(), seed=-1 % 99), FakeTrainer(FakeModel(gpt2_rows()))
    state = checkpoint.load_training(path, CONFIG, model, trainer)
    step = state["step"]
    expected, moments = parts(step)
    for got, wanted in (
        (model.arrays, expected.arrays),
        (trainer.first, moments.first),
        (trainer.second, moments.second),
    ):
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert trainer.steps == step - 1
    assert state["data"] == {"position": step * 10} and state["random"] == [1, 2**63, step]
    return step


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_holds_everything(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step-00000007" and load(path) == 7
    assert names(path) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    moments = SafetensorsFile(path / "optimizer.safetensors")
    assert {info.dtype for info in moments.tensors.values()} == {"F32"}
    assert "moment2.model.layers.0.self_attn.q_proj.weight" in moments
    for file in path.iterdir():
        state = json.loads(file.read_text()) if file.suffix == ".json" else {}
        assert file.name == "config.json" or state.get("format_version", 1) == 1


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    assert checkpoint.latest(tmp_path / "missing") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 30, 4):
        save(tmp_path, step)
    assert load(checkpoint.latest(tmp_path)) == 30
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000030"]
    save(tmp_path, 31, keep=1)
    assert names(tmp_path) == ["step-00000031"]


def test_a_step_may_be_written_again(tmp_path):
    save(tmp_path, 3)
    first = (tmp_path / "step-00000003/state.json").stat().st_ino
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000003"]
    assert (tmp_path / "step-00000003/state.json").stat().st_ino != first
    assert load(checkpoint.latest(tmp_path)) == 3


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: damage_byte(path / "optimizer.safetensors"),
        lambda path: damage_byte(path / "state.json"),
        lambda path: (path / "config.json").unlink(),
        lambda path: os.truncate(path / "model.safetensors", 100),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{}"),
        lambda path: (path / "manifest.json").write_text('{"format_version": 1, "step": 2}'),
    ],
)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    checkpoint.verify(path)
    damage(path)
    with pytest.raises((ValueError, OSError)):
        checkpoint.verify(path)
    with caplog.at_level(logging.WARNING, "eellm"):
        assert load(checkpoint.latest(tmp_path)) == 1
    assert "step-00000002 is passed over" in caplog.text


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2) / "model.safetensors", 100)
    save(tmp_path, 3, keep=2)
    assert "step-00000001" in names(tmp_path)


def test_a_checkpoint_by_another_name_is_refused(tmp_path):
    save(tmp_path, 1)
    os.rename(tmp_path / "step-00000001", tmp_path / "step-00000009")
    assert checkpoint.latest(tmp_path) is None


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, 1)
    rows = gpt2_rows()
    model = FakeModel([*rows, {"name": "exits.0.norm.weight", "shape": (4,), "exit": 0}])
    with pytest.raises(ValueError, match=r"exits\.0\.norm\.weight"):
        checkpoint.load_training(path, CONFIG, model, FakeTrainer(model))
    frozen = FakeModel([*rows[:-1], {**rows[-1], "frozen": True}])
    with pytest.raises(ValueError, match=r"optimizer\.safetensors does not fit"):
        checkpoint.load_training(path, CONFIG, frozen, FakeTrainer(frozen))


def test_wrong_arguments(tmp_path):
    for step, keep in ((-1, 0), (1.5, 0), (1, -1)):
        with pytest.raises(ValueError, match="is invalid"):
            checkpoint.write_checkpoint(tmp_path, step, lambda folder: None, keep)


def operations(root, steps, monkeypatch):
    """How many writes, fsyncs and renames the steps take."""
    monkeypatch.setenv("EELLM_FAIL_AT", "1000000")
    reset_faults()
    for step, keep in steps:
        save(root, step, keep)
    monkeypatch.delenv("EELLM_FAIL_AT")
    return reset_faults()


STEPS = ((1, 2), (2, 2), (2, 2), (3, 2), (4, 2))


def test_every_failing_operation_leaves_a_whole_checkpoint(memory_path, monkeypatch):
    total = operations(memory_path / "count", STEPS, monkeypatch)
    assert total > 100
    for n in range(1, total + 1):
        root = memory_path / str(n)
        reset_faults()
        monkeypatch.setenv("EELLM_FAIL_AT", str(n))
        done, failed = 0, False
        for step, keep in STEPS:
            try:
                save(root, step, keep)
                done = step
            except OSError as error:
                failed = True
                assert error.errno == errno.ENOSPC and "free some space" in str(error)
                assert str(root) in str(error)
                newest = checkpoint.latest(root)
                assert (load(newest) if newest else 0) in (done, step)
                assert not list(root.glob(".new-*"))
        monkeypatch.delenv("EELLM_FAIL_AT")
        assert reset_faults() >= n
        # A failing removal of an old checkpoint is only told, and made up for by the next save.
        newest = checkpoint.latest(root)
        assert load(newest) >= done, f"operation {n}, failed {failed}"
        save(root, 9, keep=2)
        assert load(checkpoint.latest(root)) == 9 and len(names(root)) <= 3


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.files.test_checkpoint import STEPS, save
root = Path(sys.argv[1])
import os
for n in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        os.environ["EELLM_FAIL_AT"] = n + ":die"
        for step, keep in STEPS:
            save(root / n, step, keep)
            with open(root / (n + ".done"), "w") as file:
                file.write(str(step))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_process_that_dies_anywhere_leaves_a_whole_checkpoint(memory_path, monkeypatch):
    total = operations(memory_path / "count", STEPS, monkeypatch)
    points = [str(n) for n in range(1, total + 1)]
    script = SCRIPT.format(root=str(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", script, str(memory_path), *points],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert run.stdout.split() == [str(-signal.SIGKILL)] * total
    for n in points:
        done_file = memory_path / f"{n}.done"
        done = int(done_file.read_text() or 0) if done_file.exists() else 0
        root = memory_path / n
        newest = checkpoint.latest(root)
        found = load(newest) if newest else 0
        assert done <= found <= done + 1, f"died at operation {n}"
        save(root, 9, keep=1)
        assert names(root) == ["step-00000009"] and load(checkpoint.latest(root)) == 9


def test_the_fault_test_sees_a_missing_precaution(memory_path, monkeypatch):
    """Negative control: a checkpoint written in place is found broken."""

    def in_place(root, step, write, keep=0, peers=None):
        folder = checkpoint.Folder(Path(root) / f"step-{step:08d}", hashed=True)
        write(folder)
        checkpoint._write_manifest(folder, step)
        return folder.path

    monkeypatch.setattr(checkpoint, "write_checkpoint", in_place)
    broken = 0
    for n in range(1, 20):
        save(memory_path, 1)
        reset_faults()
        monkeypatch.setenv("EELLM_FAIL_AT", str(n))
        with suppress(OSError):
            save(memory_path, 1)
        monkeypatch.delenv("EELLM_FAIL_AT")
        broken += checkpoint.latest(memory_path) is None
    assert broken > 3


def test_wrong_plan(tmp_path, monkeypatch):
    for plan in ("x", "3:now", "-1"):
        monkeypatch.setenv("EELLM_FAIL_AT", plan)
        with pytest.raises(ValueError, match="EELLM_FAIL_AT"):
            save(tmp_path, 1)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_json_raises_clean_errors(memory_path, name, count):
    path = save(memory_path, 1)
    value = json.loads((path / name).read_text())
    read = checkpoint.verify if name == "manifest.json" else checkpoint.read_state

    def make(rng):
        if rng.integers(0, 2):
            return fuzz.damage_bytes(json.dumps(value).encode(), rng)
        return fuzz.encode(fuzz.damage_json(value, rng))

    def attempt(data):
        (path / name).write_bytes(data)
        read(path)

    fuzz.run(count, 20260104, make, attempt, (ValueError, OSError))


def test_faults_are_counted_from_anew(monkeypatch, tmp_path):
    first, second = (operations(tmp_path / str(i), STEPS, monkeypatch) for i in range(2))
    assert first == second > 0
