"""Runs of several ranks: checkpoints in any layout, files, stops, and what is refused."""

import json

import numpy as np
import pytest

import eellm
from eellm.files import checkpoint
from eellm.pipeline import Schedule
from tests.parallel.common import make_config, random_tokens, run, train_config

EXACT = {"exact_ties": True}


def whole(family="gpt2", steps=6, **options):
    return run(1, make_config(family), train_config(steps), random_tokens(), parallel=EXACT,
               **options)[0]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((4, {"schedule": "zero_bubble"}), (2, {"schedule": "gpipe"})),
        ((2, {"schedule": "interleaved", "chunks": 2}), (1, {})),
        ((1, {}), (4, {"rank_edge": "earlier"})),
    ],
)
def test_resume_in_another_layout(first, then, tmp_path):
    config, tokens = make_config("gpt2"), random_tokens()
    wanted = whole()[0]
    curves = []
    for steps, resume, (ranks, parallel) in [(3, "none", first), (6, "auto", then)]:
        found = run(ranks, config, train_config(steps), tokens, output=tmp_path, resume=resume,
                    parallel=EXACT | parallel)  # fmt: skip
        assert all(curve == found[0][0] for curve, _ in found)
        curves += found[0][0]
    assert curves == wanted


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_comes_out_whole(family, tmp_path):
    """Four ranks write a directory that holds what one rank writes, in shards with an index."""
    config, tokens = make_config(family), random_tokens()
    for name, ranks in (("one", 1), ("four", 4)):
        run(ranks, config, train_config(2), tokens, output=tmp_path / name, parallel=EXACT)
    one = eellm.Model.from_pretrained(tmp_path / "one/model", threads=1).parameters()
    four = eellm.Model.from_pretrained(tmp_path / "four/model", threads=1).parameters()
    assert one.keys() == four.keys()
    assert all(np.array_equal(values, four[name]) for name, values in one.items())
    names = {path.name for path in (tmp_path / "four/model").iterdir()}
    assert "model.safetensors.index.json" in names
    assert "model-00004-of-00004.safetensors" in names and "model.safetensors" not in names


def test_each_rank_holds_its_part(tmp_path):
    def held(trainer):
        return set(trainer.model.parameters()), trainer.core.memory["parameters"]

    config = make_config("llama")
    found = [each for _, each in run(4, config, train_config(1), random_tokens(), inspect=held)]
    everything = whole("llama", 1, inspect=held)[1]
    assert set().union(*(names for names, _ in found)) == everything[0]
    layers = [{name for name in names if name.startswith("model.layers.")} for names, _ in found]
    assert all(not a & b for i, a in enumerate(layers) for b in layers[:i])
    assert max(size for _, size in found) < everything[1] / 2


def test_one_rank_writes(tmp_path):
    valid = random_tokens()[:400]
    run(4, make_config("gpt2"), train_config(4, valid_interval=2), random_tokens(), valid=valid,
        output=tmp_path)  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["step", "step", "valid", "step", "step", "valid"]


def test_validation_is_that_of_one_rank(tmp_path):
    """Losses and agreement of every exit, wherever it lies."""
    config, valid = make_config("gpt2"), random_tokens()[:700]

    def evaluate(trainer):
        result = trainer.evaluate(valid, collect=True)
        return result.losses, result.agreement, result.confidence.tobytes()

    wanted = whole(steps=2, inspect=evaluate)[1]
    for ranks, parallel in [(4, {}), (2, {"schedule": "interleaved", "chunks": 2})]:
        found = run(ranks, config, train_config(2), random_tokens(), inspect=evaluate,
                    parallel=EXACT | parallel)  # fmt: skip
        assert all(each == wanted for _, each in found)


def test_a_schedule_of_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    Schedule("gpipe", 2, 6).save(path)
    found = run(2, make_config("gpt2"), train_config(3), random_tokens(),
                parallel=EXACT | {"schedule_file": str(path)})  # fmt: skip
    assert found[0][0] == whole(steps=3)[0]
    with pytest.raises(ValueError, match=r"does not fit .*4 ranks, 1 chunks and 6"):
        run(4, make_config("gpt2"), train_config(3), random_tokens(),
            parallel={"schedule_file": str(path)})  # fmt: skip


def test_a_trace_of_three_steps(tmp_path):
    path = tmp_path / "trace.json"
    run(2, make_config("gpt2"), train_config(6), random_tokens(), trace=path)
    events = json.loads(path.read_text())["traceEvents"]
    names = [each["name"] for each in events if each["ph"] == "X"]
    assert sum(name.startswith("forward") for name in names) == 2 * 3 * 6
    assert sum(name.startswith("backward") for name in names) == 2 * 3 * 6
    assert {each["pid"] for each in events} == {0, 1}


def test_a_callback_stops_all_ranks():
    config, tokens = make_config("gpt2"), random_tokens()

    def work(group):
        model = eellm.Model.from_config(config, threads=1, group=group)

        def stop(trainer, record):
            if record["step"] == 2:
                trainer.stop()

        trainer = eellm.Trainer(model, train_config(50), tokens, callbacks=[stop], progress="none")
        return len(trainer.train())

    assert eellm.run_local(3, work) == [3, 3, 3]


@pytest.mark.parametrize("kind", ["extra", "replaced"])
def test_bubbles_are_filled(kind):
    """Extra microbatches come on top of the global batch, replaced ones out of it."""
    config = make_config("gpt2")

    def sizes(trainer):
        return trainer.schedule.microbatches, trainer.schedule.fill, trainer._batches.microbatches

    found = run(4, config, train_config(3, global_batch_size=16), random_tokens(), inspect=sizes,
                parallel={"bubble_fill": kind})  # fmt: skip
    full, fill, total = found[0][1]
    assert fill == (2, 2)
    assert (full, total) == ((8, 12) if kind == "extra" else (4, 8))
    assert all(curve == found[0][0] for curve, _ in found)
    assert all(np.isfinite(losses).all() for _, _, losses, _ in found[0][0])


def test_nonfinite_is_decided_alike():
    """A rank computes NaN: no rank updates, and all go on."""
    config, tokens = make_config("gpt2"), random_tokens()

    def work(group):
        model = eellm.Model.from_config(config, seed=3, threads=1, group=group)
        fault = ("corrupt", 1, 2, 0.0) if group.rank == 1 else None
        train = train_config(3, on_nonfinite="skip")
        trainer = eellm.Trainer(model, train, tokens, progress="none", fault=fault)
        return [each["skipped"] for each in trainer.train()], trainer.core.steps

    assert eellm.run_local(2, work) == [([None, "nonfinite", None], 2)] * 2


def test_a_rank_that_fails_fails_all(tmp_path):
    config, tokens = make_config("gpt2"), random_tokens()

    def work(group):
        model = eellm.Model.from_config(config, threads=1, group=group)
        trainer = eellm.Trainer(model, train_config(3), tokens, progress="none", output=tmp_path)
        if group.rank == 2:
            raise RuntimeError("out of order")
        trainer.train()

    with pytest.raises(RuntimeError, match="out of order"):
        eellm.run_local(4, work)


def test_different_data_is_refused():
    config = make_config("gpt2")

    def work(group):
        model = eellm.Model.from_config(config, threads=1, group=group)
        tokens = random_tokens() if group.rank else random_tokens()[::-1]
        eellm.Trainer(model, train_config(3), tokens, progress="none").train()

    with pytest.raises(ValueError, match="different data or settings for step 1"):
        eellm.run_local(2, work)


def test_different_settings_are_refused():
    def work(group):
        model = eellm.Model.from_config(make_config("gpt2"), threads=1, group=group)
        train = train_config(3, learning_rate=1e-3 * (1 + group.rank))
        eellm.Trainer(model, train, random_tokens(), progress="none")

    with pytest.raises(ValueError, match="different training settings"):
        eellm.run_local(2, work)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_part_is_passed_over(damage, tmp_path, caplog):
    config, tokens = make_config("gpt2"), random_tokens()
    options = {"output": tmp_path, "parallel": EXACT}
    run(4, config, train_config(3, checkpoint_interval=1), tokens, **options)
    last = checkpoint.latest(tmp_path / "checkpoints")
    part = last / "optimizer-00003-of-00004.safetensors"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-8])
    found = run(2, config, train_config(4), tokens, resume="auto", **options)
    assert found[0][0] == whole(steps=4)[0][2:]
    assert "passed over" in caplog.text and part.name in caplog.text


def test_a_failed_write_of_a_rank_loses_nothing(tmp_path):
    config, tokens = make_config("gpt2"), random_tokens()
    root = tmp_path / "checkpoints"

    def save(fault):
        def work(group):
            model = eellm.Model.from_config(config, threads=1, group=group)
            trainer = eellm.Trainer(model, train_config(1), tokens, progress="none")
            state, peers = {"skipped": 0}, group.peers
            broken = trainer.core if not (fault and group.rank == 1) else Broken(trainer.core)
            return checkpoint.save_training(root, int(fault), config, model.core, broken, state,
                                            peers=peers)  # fmt: skip

        return eellm.run_local(2, work)

    save(False)
    with pytest.raises(OSError, match="no moments"):
        save(True)
    assert [path.name for path in root.iterdir()] == ["step-00000000"]
    checkpoint.verify(root / "step-00000000")


class Broken:
    """Moments that cannot be read."""

    steps = 0

    def __init__(self, core):
        self.core = core

    def moment1(self, name):
        raise OSError("no moments")

    moment2 = moment1


@pytest.mark.parametrize(
    ("ranks", "options", "text"),
    [
        (3, {"data": 2}, "data = 2 times tensor = 1 times pipeline = 1 must be .* got 3"),
        (2, {"pipeline": 4}, "pipeline = 4 must be the number of ranks, got 2"),
        (2, {"split": (8, 1)}, "split is invalid"),
        (2, {"chunks": 8, "schedule": "interleaved"}, "8 layers cannot be split"),
        (4, {"bubble_fill": "replaced", "bubble_fill_counts": (3, 3)}, "global batch is too small"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit(ranks, options, text):
    with pytest.raises(ValueError, match=text):
        run(ranks, make_config("gpt2"), train_config(1), random_tokens(), parallel=options)


def test_grids_that_are_not_built():
    with pytest.raises(NotImplementedError, match="only pipeline parallelism"):
        run(2, make_config("gpt2"), train_config(1), random_tokens(), parallel={"data": 2})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"chunks": 2}, "chunks .*1 with 1f1b"),
        ({"schedule": "2f2b"}, "schedule"),
        ({"bubble_fill": "extra", "schedule": "gpipe"}, "1f1b has bubbles to fill"),
        ({"split": (1, 2), "balance": "cost"}, "remove one of the two"),
        ({"timeout": 0.0}, "timeout"),
        ({"bubble_fill_counts": (1,)}, "two numbers"),
    ],
)
def test_wrong_settings(values, text):
    with pytest.raises(ValueError, match=text):
        eellm.ParallelConfig(**values)


def test_new_exits_of_a_pretrained_model(tmp_path):
    """What a new exit is a copy of may lie on another rank."""
    config = make_config("llama", exits=[])
    eellm.Model.from_config(config, seed=1, threads=1).save_pretrained(tmp_path)
    exits = [{"layer": 2, "position": "after", "head": "norm", "output": "own"}]
    alone = eellm.Model.from_pretrained(tmp_path, exits=exits, threads=1).parameters()

    def load(group):
        model = eellm.Model.from_pretrained(tmp_path, exits=exits, threads=1, group=group)
        return {name: np.array(values) for name, values in model.parameters().items()}

    for part in eellm.run_local(4, load):
        assert all(np.array_equal(values, alone[name]) for name, values in part.items())
