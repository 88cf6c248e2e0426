"""The training loop: learning, files, resuming, guards, signals."""

import json
import math
import os
import signal
import sys

import numpy as np
import pytest

import eellm
from eellm.train import read_metrics
from tests.train.common import (
    VOCAB,
    parameters_of,
    same_parameters,
    small_config,
    text_tokens,
)


def test_losses_of_all_exits_fall_below_the_unigram_entropy(make):
    trainer = make(steps=80)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    counts = np.bincount(text_tokens(), minlength=VOCAB) / 4000
    entropy = -sum(p * math.log(p) for p in counts if p)
    assert all(abs(loss - math.log(VOCAB)) < 0.5 for loss in before.losses)
    assert all(loss < entropy - 1 for loss in after.losses), (after, entropy)


def test_evaluation_agrees_with_the_model_s_own_loss(make):
    trainer = make(steps=3)
    trainer.train()
    tokens = text_tokens(600, seed=9)
    windows = np.stack([tokens[i * 16 : i * 16 + 17] for i in range(599 // 16)])
    wanted = trainer.model.loss(windows[:, :-1], windows[:, 1:])
    result = trainer.evaluate(collect=True)
    np.testing.assert_allclose(result.losses, wanted, rtol=1e-5)
    logits = trainer.model.forward(windows[:, :-1]).astype(np.float64)
    best = logits.argmax(-1).reshape(2, -1)
    assert result.tokens == windows[:, 1:].size == result.correct.shape[1]
    assert (result.correct == (best == best[-1])).mean() > 0.999
    top = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = (1 / top.sum(-1)).reshape(2, -1)
    np.testing.assert_allclose(result.confidence, wanted, rtol=2e-5)
    assert result.perplexities == [math.exp(loss) for loss in result.losses]
    assert result.agreement == [float(row.mean()) for row in result.correct]


def test_a_run_leaves_its_files(make, tmp_path):
    trainer = make("run", steps=6, valid_interval=3, checkpoint_interval=2, keep_checkpoints=2)
    history = trainer.train()
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "valid"] == [3, 6]
    assert [r["losses"] for r in records] == [r["losses"] for r in history]
    assert all(r["matrix_share"] > 0 for r in records if r["kind"] == "step")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    loaded = eellm.Model.from_pretrained(tmp_path / "run/model")
    assert same_parameters(parameters_of(loaded), parameters_of(trainer.model))


def test_accumulation_does_not_change_the_step(make):
    """One microbatch of four samples and four of one give the same loss and nearly same update."""
    whole = make(steps=1, micro_batch_size=4)
    parts = make(steps=1, micro_batch_size=1)
    whole.train(), parts.train()
    np.testing.assert_allclose(whole.history[0]["losses"], parts.history[0]["losses"], rtol=1e-6)
    assert math.isclose(whole.history[0]["grad_norm"], parts.history[0]["grad_norm"], rel_tol=1e-5)


@pytest.mark.parametrize("stop", [1, 4, 11])
def test_resuming_changes_no_bit(make, stop):
    straight = make("straight", steps=12, spike_threshold=8.0, exit_ramp="linear",
                    exit_ramp_steps=8, config=small_config(resid_pdrop=0.1))  # fmt: skip
    straight.train()
    first = make("cut", steps=12, spike_threshold=8.0, exit_ramp="linear", exit_ramp_steps=8,
                 config=small_config(resid_pdrop=0.1))  # fmt: skip
    for _ in range(stop):
        first.step()
    first.save_checkpoint()
    first.step()
    again = make("cut", resume="auto", steps=12, spike_threshold=8.0, exit_ramp="linear",
                 exit_ramp_steps=8, config=small_config(resid_pdrop=0.1))  # fmt: skip
    assert again.done == stop
    again.train()
    assert same_parameters(parameters_of(again.model), parameters_of(straight.model))
    losses = [r["losses"] for r in straight.history if r["kind"] == "step"][stop:]
    assert [r["losses"] for r in again.history if r["kind"] == "step"] == losses


def test_resuming_elsewhere_is_seen(make):
    """The comparison above can fail: another step gives other weights."""
    left, right = make(steps=5), make(steps=6)
    left.train(), right.train()
    assert not same_parameters(parameters_of(left.model), parameters_of(right.model))


def test_resuming_a_finished_run_does_nothing(make):
    first = make("run", steps=4)
    first.train()
    again = make("run", resume="auto", steps=4)
    assert again.done == 4 and again.train() == []
    assert same_parameters(parameters_of(again.model), parameters_of(first.model))


def test_metrics_after_the_checkpoint_are_dropped_on_resume(make, tmp_path):
    first = make("run", steps=8, checkpoint_interval=3)
    first._callbacks.append(lambda trainer, record: 1 / 0 if trainer.done == 5 else None)
    with pytest.raises(ZeroDivisionError):
        first.train()
    with open(tmp_path / "run/metrics.jsonl", "a") as stream:
        stream.write('{"kind":"step","st')
    make("run", resume="auto", steps=8, checkpoint_interval=3).train()
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_folder_with_files_is_refused_with_advice(make, tmp_path):
    make("run", steps=1).train()
    with pytest.raises(ValueError, match=r"not empty .*resume auto"):
        make("run", steps=1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    for resume in ("none", "auto"):
        with pytest.raises(ValueError, match=r"not empty .*letter.txt.*choose another"):
            make("home", resume=resume, steps=1)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a folder"):
        make("file", steps=1)


def test_changed_settings_are_told_on_resume(make, caplog):
    make("run", steps=2).train()
    with caplog.at_level("WARNING", "eellm"):
        make("run", resume="auto", steps=4, learning_rate=5e-3)
    assert "train.learning_rate: 0.01 -> 0.005" in caplog.text


def poison(trainer, step, value=np.nan):
    """Makes the parameters of exit 0 bad after a number of steps, until the returned undo runs."""

    def callback(_, record):
        if record["kind"] == "step" and record["step"] == step:
            view = trainer.model.parameter("exits.0.norm.weight")
            saved.append(view.copy())
            view[...] = value

    saved = []
    trainer._callbacks.append(callback)
    return saved


def test_nan_stops_and_names_step_exit_and_checkpoint(make, tmp_path):
    trainer = make("run", steps=9, checkpoint_interval=2)
    poison(trainer, 5)
    with pytest.raises(eellm.NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert "step 6" in text and "exit 0 (after layer 1)" in text
    assert str(tmp_path / "run/checkpoints/step-00000004") in text
    again = make("run", resume="auto", steps=9)
    assert again.done == 4 and np.isfinite(again.model.parameter("exits.0.norm.weight")).all()


def test_nan_is_skipped_on_request_without_an_update(make):
    trainer = make(steps=6, on_nonfinite="skip")
    trainer.step()
    view = trainer.model.parameter("exits.0.norm.weight")
    saved, before = view.copy(), None
    view[...] = np.nan
    before = parameters_of(trainer.model)
    record = trainer.step()
    after = parameters_of(trainer.model)
    assert record["skipped"] == "nonfinite" and trainer.core.steps == 1
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    view[...] = saved
    assert trainer.step()["skipped"] is None and trainer.core.steps == 2


def test_too_many_skips_stop(make):
    trainer = make(steps=20, on_nonfinite="skip", max_skipped=3)
    trainer.model.parameter("exits.0.norm.weight")[...] = np.nan
    with pytest.raises(eellm.NonFiniteError, match=r"step 4: .*after 3 skipped steps"):
        trainer.train()


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_spike_is_skipped_or_stops(make, action):
    trainer = make(steps=30, spike_threshold=6.0, spike_window=16, on_spike=action,
                   learning_rate=1e-5)  # fmt: skip
    for _ in range(18):
        assert trainer.step()["skipped"] is None
    view = trainer.model.parameter("exits.0.norm.weight")
    view *= 30
    before = parameters_of(trainer.model)
    if action == "stop":
        with pytest.raises(eellm.Error, match=r"step 19: the loss of exit 0 .* is bad"):
            trainer.step()
        return
    assert trainer.step()["skipped"] == "spike"
    assert same_parameters(before, parameters_of(trainer.model))
    view /= 30
    assert trainer.step()["skipped"] is None


def test_callbacks_see_records_and_can_stop(make):
    trainer = make(steps=10)
    seen = []

    def callback(owner, record):
        seen.append(record["step"])
        if record["step"] == 3:
            owner.stop()

    trainer._callbacks.append(callback)
    trainer.train()
    assert seen[:3] == [1, 2, 3] and trainer.done == 3


@pytest.mark.parametrize(
    ("number", "kind", "code"), [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, None, None)]
)
def test_signals_save_and_leave(make, tmp_path, number, kind, code):
    trainer = make("run", steps=50)
    trainer._callbacks.append(
        lambda owner, record: os.kill(os.getpid(), number) if owner.done == 4 else None
    )
    before = signal.getsignal(number)
    with pytest.raises(kind or KeyboardInterrupt) as error:
        trainer.train()
    if code is not None:
        assert error.value.code == code
    assert signal.getsignal(number) is before
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()
    assert not (tmp_path / "run/model").exists()
    again = make("run", resume="auto", steps=6)
    assert again.done == 4


def test_a_second_ctrl_c_aborts_at_once(make, tmp_path):
    trainer = make("run", steps=50)

    def callback(owner, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer._callbacks.append(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "run/checkpoints").exists()


def test_data_of_any_form_gives_the_same_run(make, tmp_path):
    from eellm.data import Batches, PackedDataset, TokenArray, TokenFile, TokenFileWriter

    tokens = text_tokens()
    with TokenFileWriter(tmp_path / "tokens", VOCAB) as writer:
        writer.add(tokens)
    forms = [
        tokens,
        TokenArray(tokens),
        TokenFile(tmp_path / "tokens"),
        PackedDataset(TokenArray(tokens), 16),
        Batches(PackedDataset(TokenArray(tokens), 16), 2, 2),
    ]
    losses = []
    for form in forms:
        trainer = make(steps=3, data=form)
        trainer.train()
        losses.append([record["losses"] for record in trainer.history])
    assert all(each == losses[0] for each in losses)


def test_data_that_does_not_fit_is_refused(make):
    from eellm.data import Batches, PackedDataset, TokenArray

    source = TokenArray(text_tokens())
    with pytest.raises(ValueError, match="seq_length"):
        make(data=PackedDataset(source, 8))
    with pytest.raises(ValueError, match="micro_batch_size"):
        make(data=Batches(PackedDataset(source, 16), 4, 1))
    with pytest.raises(ValueError, match="positions"):
        make(seq_length=65, micro_batch_size=2)
    with pytest.raises(ValueError, match="exit_weights"):
        make(exit_weights=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"vocab|token"):
        make(data=np.full(4000, VOCAB, np.int32)).step()


def test_metrics_file_is_json_even_with_nan(make, tmp_path):
    trainer = make("run", steps=4, on_nonfinite="skip")
    poison(trainer, 2)
    trainer.train()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert records[2]["losses"][0] is None and records[2]["skipped"] == "nonfinite"


def test_tensorboard_gets_every_number(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make("run", steps=3, valid_interval=3, tensorboard=True)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    got = [event.value for event in events.Scalars("step/losses/exit1")]
    wanted = [record["losses"][1] for record in trainer.history if record["kind"] == "step"]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert [event.step for event in events.Scalars("valid/perplexities/exit0")] == [3]


def test_a_missing_tensorboard_says_how_to_get_it(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "eellm\[tensorboard\]"'):
        make("run", tensorboard=True)
    assert not (tmp_path / "run").exists()
