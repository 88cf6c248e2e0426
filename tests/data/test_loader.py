import threading
from itertools import chain

import numpy as np
import pytest

from eellm.data import (
    Batches,
    Blend,
    PackedDataset,
    TokenArray,
    TokenFile,
    load_tokenizer,
    prepare,
    validation_batches,
)

T = 6
EOD = 0


@pytest.fixture
def dataset():
    rng = np.random.default_rng(4)
    return PackedDataset(TokenArray(rng.integers(0, 7, 900), EOD), T, seed=2, eod_id=EOD)


def naive(dataset, samples, size, options):
    """The arrays of a batch token by token, from the windows and the separators in them."""
    tokens, targets, positions, row_ids, segments, counts = [], [], [], [], [], []
    for m in range(0, len(samples), size):
        rows = {"tokens": [], "targets": [], "positions": [], "row_ids": []}
        bounds = [0]
        for sample in samples[m : m + size]:
            window = dataset.sample(sample).tokens.tolist()
            position = 0
            for j in range(T):
                after = j > 0 and window[j - 1] == EOD
                position = 0 if after and options.get("reset_positions") else position
                if j > 0 and after and options.get("reset_attention"):
                    bounds.append(len(rows["tokens"]))
                masked = options.get("mask_separators") and window[j] == EOD
                rows["tokens"].append(window[j])
                rows["targets"].append(-1 if masked else window[j + 1])
                rows["positions"].append(position)
                rows["row_ids"].append(sample * 2**24 + j)
                position += 1
            bounds.append(len(rows["tokens"]))
        tokens.append(rows["tokens"])
        targets.append(rows["targets"])
        positions.append(rows["positions"])
        row_ids.append(rows["row_ids"])
        segments += bounds
        counts.append(len(bounds) - 1)
    return tokens, targets, positions, row_ids, segments, counts


FLAGS = ("reset_positions", "reset_attention", "mask_separators")


@pytest.mark.parametrize("flags", [(), *((flag,) for flag in FLAGS), FLAGS])
@pytest.mark.parametrize("size, microbatches", [(1, 1), (3, 2)])
def test_batches_against_naive(dataset, flags, size, microbatches):
    options = dict.fromkeys(flags, True)
    batches = Batches(dataset, size, microbatches, **options)
    for step in (0, 1, 100):
        batch = batches.batch(step)
        first = step * size * microbatches
        ids = list(range(first, first + size * microbatches))
        expected = naive(dataset, ids, size, options)
        got = batch.arguments()
        for value, (name, array) in zip(expected, got.items(), strict=True):
            assert array.tolist() == value, name
            assert array.flags.c_contiguous, name
            assert array.dtype == (np.uint64 if name == "row_ids" else np.int32), name
        assert batch.tokens.shape == (microbatches, size * T)
        assert batch.samples.reshape(-1).tolist() == ids
        flat = np.concatenate([batch.boundaries(m) for m in range(microbatches)])
        assert flat.tolist() == expected[4]
        assert batch.unmasked == sum(target >= 0 for row in expected[1] for target in row)


def test_naive_negative_control(dataset):
    """The separators of the data are such that every flag changes something."""
    plain = Batches(dataset, 3, 2).batch(0)
    names = ("positions", "segments", "targets")
    for flag, name in zip(FLAGS, names, strict=True):
        other = Batches(dataset, 3, 2, **{flag: True}).batch(0)
        for key, value in plain.arguments().items():
            changed = not np.array_equal(value, other.arguments()[key])
            assert changed == (key == name or (name, key) == ("segments", "segment_counts"))


def collect(world, microbatches, size, dataset, step):
    """The samples of a step over all ranks, with all that belongs to each."""
    found = {}
    for rank in range(world):
        batch = Batches(
            dataset, size, microbatches, rank=rank, world=world, reset_positions=True
        ).batch(step)
        shape = (microbatches * size, T)
        rows = [
            array.reshape(shape)
            for array in (batch.tokens, batch.targets, batch.positions, batch.row_ids)
        ]
        for i, sample in enumerate(batch.samples.reshape(-1).tolist()):
            assert sample not in found
            found[sample] = [row[i].tolist() for row in rows]
    return found


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_is_the_same_for_every_layout(dataset, step):
    expected = collect(1, 12, 1, dataset, step)
    assert sorted(expected) == list(range(12 * step, 12 * step + 12))
    for world, microbatches, size in [(1, 3, 4), (2, 3, 2), (3, 2, 2), (4, 3, 1), (12, 1, 1)]:
        assert collect(world, microbatches, size, dataset, step) == expected


def test_ranks_take_microbatches_in_turn(dataset):
    batch = Batches(dataset, 2, 3, rank=1, world=4).batch(1)
    assert batch.samples.tolist() == [[26, 27], [34, 35], [42, 43]]


def equal(one, other):
    pairs = zip(one.arguments().values(), other.arguments().values(), strict=True)
    return one.step == other.step and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_is_exact(dataset, prefetch):
    with Batches(dataset, 2, 2, prefetch=prefetch) as batches:
        run = [next(batches) for _ in range(20)]
    for stop in (0, 1, 7):
        with Batches(dataset, 2, 2, prefetch=prefetch) as first:
            for _ in range(stop):
                next(first)
            state = first.state_dict()
        assert state == {"step": stop}
        with Batches(dataset, 2, 2, prefetch=prefetch) as second:
            next(second)
            second.load_state_dict(state)
            assert all(equal(next(second), run[i]) for i in range(stop, 20))


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "3"}, {"step": True}])
def test_bad_state(dataset, state):
    with pytest.raises(ValueError, match="bad loader state"):
        Batches(dataset, 1).load_state_dict(state)


class Failing:
    seq_length = T
    window_count = 10

    def __init__(self, dataset, at):
        self.dataset, self.at = dataset, at

    def windows(self, samples):
        if self.at in samples:
            raise ValueError("damaged")
        return self.dataset.windows(samples)


def test_prefetch_raises_where_the_step_is_taken(dataset):
    with Batches(Failing(dataset, 2), 1, prefetch=True) as batches:
        assert [next(batches).step for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged"):
                next(batches)
        batches.load_state_dict({"step": 3})
        assert next(batches).step == 3


def test_prefetch_leaves_no_thread(dataset):
    before = threading.active_count()
    batches = Batches(dataset, 1, prefetch=True)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert next(batches).step == 1


def test_prefetch_is_ready(dataset):
    with Batches(dataset, 1, prefetch=True) as batches:
        for step in range(50):
            assert next(batches).step == step


@pytest.mark.parametrize("world, microbatches, size", [(1, 1, 1), (1, 2, 4), (3, 2, 2)])
def test_validation_covers_each_window_once_in_order(world, microbatches, size):
    source = TokenArray(np.arange(1, 104))
    dataset = PackedDataset(source, T, shuffle=False)
    assert dataset.window_count == 17
    targets, steps = {}, set()
    for rank in range(world):
        batches = validation_batches(dataset, size, microbatches, rank=rank, world=world)
        for batch in batches:
            steps.add(batch.step)
            assert batch.tokens.shape == (microbatches, size * T)
            rows = batch.targets.reshape(-1, T)
            for sample, row in zip(batch.samples.reshape(-1).tolist(), rows, strict=True):
                assert (row >= 0).all() or (row == -1).all()
                if row[0] >= 0:
                    assert sample not in targets
                    targets[sample] = row.tolist()
        assert batches.steps == len(steps)
    assert [targets[i] for i in range(17)] == np.arange(2, 104).reshape(17, 6).tolist()
    assert len(targets) == 17


def test_validation_of_some_windows(dataset):
    batches = list(validation_batches(dataset, 2, windows=5))
    assert [batch.unmasked for batch in batches] == [2 * T, 2 * T, T]
    for windows in (0, dataset.window_count + 1):
        with pytest.raises(ValueError, match="bad validation size"):
            validation_batches(dataset, 2, windows=windows)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"micro_batch_size": 0}, "bad micro_batch_size"),
        ({"microbatches": 0}, "bad microbatches"),
        ({"world": 0}, "bad world"),
        ({"rank": 2, "world": 2}, "bad rank"),
        ({"rank": -1}, "bad rank"),
        ({"windows": 0}, "bad windows"),
        ({"micro_batch_size": 2**30}, "microbatch is too large"),
    ],
)
def test_bad_options(dataset, options, fault):
    with pytest.raises(ValueError, match=fault):
        Batches(dataset, **{"micro_batch_size": 1, **options})


@pytest.mark.parametrize("step", [-1, 2**40, 2**80])
def test_step_out_of_range(dataset, step):
    with pytest.raises(ValueError, match="sample number out of range"):
        Batches(dataset, 1).batch(step)


def test_real_stories_end_to_end(real_data, tmp_path):
    """Files, tokens, windows and batches together: the text of an epoch comes back whole."""
    text = real_data("corpora/tinystories_valid.txt")
    tokenizer = load_tokenizer(real_data("tokenizers/gpt2/tokenizer.json"))
    separator = "<|endoftext|>"
    prepare([text], tmp_path / "stories", tokenizer, separator=separator)
    file = TokenFile(tmp_path / "stories")
    stories = [part.strip("\n") for part in text.read_text().split(separator)]
    stories = [story for story in stories if story.strip()]
    assert [tokenizer.decode(file.document(i)) for i in range(len(file))] == stories
    dataset = PackedDataset(file, 64, shuffle=False, eod_id=tokenizer.eod_id)
    batches = validation_batches(dataset, 4, reset_attention=True)
    tokens, segments = [], 0
    for batch in batches:
        tokens += batch.tokens.reshape(-1, 64)[batch.targets.reshape(-1, 64)[:, 0] >= 0].tolist()
        segments += int(batch.segment_counts.sum())
    count = dataset.window_count * 64
    assert list(chain(*tokens)) == file.tokens[:count].tolist()
    assert segments > len(tokens) + len(stories) - 5
    blend = Blend([dataset, PackedDataset(file, 64, seed=1)], [0.25, 0.75])
    assert Batches(blend, 2, 2).batch(3).tokens.shape == (2, 128)
