"""Costs of models: operations, bytes, layouts, and the paper's Table 1."""

import re

import pytest

from benchmarks.table1 import ROWS, simulated
from eellm import Model, ModelConfig, _core
from eellm.pipeline import Costs, Layout, operations
from eellm.pipeline.costs import Rates
from tests.cli.common import ROOT


def llama(layers=8, exits=(), **values):
    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_attention_heads": 4}
    return ModelConfig.llama(**{**sizes, "num_hidden_layers": layers, "exits": exits, **values})


# -- Layouts --


def test_equal_shares():
    assert Layout.of(llama(8), 4).split == (2, 2, 2, 2)
    assert Layout.of(llama(10), 4).split == (3, 2, 3, 2)
    assert Layout.of(llama(8), 2, 2).bounds == (0, 2, 4, 6, 8)
    assert Layout.of(llama(7), 3, split=[1, 2, 4]).split == (1, 2, 4)


@pytest.mark.parametrize(
    ("exit", "later", "earlier"),
    [
        ({"layer": 2}, 1, 0),  # between the first two chunks
        ({"layer": 3, "position": "before"}, 1, 0),  # the same depth
        ({"layer": 1}, 0, 0),
        ({"layer": 3}, 1, 1),
        ({"layer": 1, "position": "before"}, 0, 0),
        ({"layer": 8}, 3, 3),
        ({"layer": 2, "branch": "mlp"}, 0, 0),  # it needs its own layer
        ({"layer": 2, "branch": "block"}, 1, 0),
    ],
)
def test_whose_an_exit_is(exit, later, earlier):
    for edge, wanted in (("later", later), ("earlier", earlier)):
        layout = Layout.of(llama(8, [exit]), 4, rank_edge=edge)
        assert [g for g, found in enumerate(layout.exits) if found] == [wanted]
        assert layout.exit_ranks == (wanted,)


def test_every_exit_is_placed_once():
    exits = [{"layer": i} for i in range(1, 9)]
    for ranks in range(1, 9):
        for edge in ("later", "earlier"):
            layout = Layout.of(llama(8, exits), ranks, rank_edge=edge)
            assert sorted(i for each in layout.exits for i in each) == list(range(8))


def test_wrong_layouts():
    for options, parts in [
        ({"ranks": 9}, ["8 layers cannot be split", "at least 9", "fewer ranks"]),
        ({"ranks": 2, "chunks": 5}, ["cannot be split", "10"]),
        ({"ranks": 2, "split": [3, 4]}, ["split is invalid", "8 layers", "add up to 7"]),
        ({"ranks": 2, "split": [2, 2, 4]}, ["split is invalid", "2 numbers"]),
        ({"ranks": 2, "split": [0, 8]}, ["layers of a chunk", "got 0"]),
        ({"ranks": 2, "rank_edge": "first"}, ["rank_edge", "later, earlier"]),
    ]:
        with pytest.raises(ValueError) as caught:
            Layout.of(llama(8), **options)
        for part in parts:
            assert part in str(caught.value), caught.value


def test_shares_of_equal_time():
    """No other split has a cheaper largest rank: all of them are tried."""
    import itertools

    config = llama(9, [{"layer": 3, "head": "mlp"}, {"layer": 6}], vocab_size=4000)
    found = Costs.of_model(config, 3, seq_length=32, split="cost")
    largest = {}
    for first, second in itertools.combinations(range(1, 9), 2):
        split = [first, second - first, 9 - second]
        costs = Costs.of_model(config, 3, seq_length=32, split=split)
        largest[tuple(split)] = float((costs.forward + costs.backward).max())
    mine = float((found.forward + found.backward).max())
    assert mine == pytest.approx(min(largest.values()), rel=1e-12)
    assert found.layout.split != (3, 3, 3) and found.layout.split in largest


# -- Operations and bytes --


def test_operations_of_a_layer_and_a_head():
    """6 operations a parameter and token, attention and what an exit does besides counted apart."""
    config = llama(4, [{"layer": 2, "head": "embedding", "output": "own"}])
    rows, width, wide, length = 96, 64, config.intermediate_size, 32
    costs = Costs.of_model(config, 4, seq_length=32, micro_batch_size=3, rates=Rates(flops=1.0))
    size = 4 * width * width + 3 * width * wide
    scores = 4 * width * (length + 1) / 2 * rows
    head = 2 * rows * width * 1000
    assert costs.forward == pytest.approx([2 * rows * size + scores] * 4)
    layer = 4 * rows * size + 2.5 * scores
    assert costs.backward == pytest.approx([layer, layer, layer + 3 * head, layer + 3 * head])
    assert costs.exit_time == pytest.approx([0, 0, 3 * head, 0])
    later = Costs.of_model(
        config, 4, seq_length=32, micro_batch_size=3, exit_w="deferred", rates=Rates(flops=1.0)
    )
    assert later.backward_input - costs.backward_input == pytest.approx([0, 0, -head, -head])
    assert later.backward_weight - costs.backward_weight == pytest.approx(
        [0, 0, 2 * head, 2 * head]
    )


def test_a_window_costs_less_attention():
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    work = []
    for window in (None, 8):
        config = ModelConfig(**sizes, sliding_window=window)
        work.append(Costs.of_model(config, 2, seq_length=32, rates=Rates(flops=1.0)).forward[0])
    # Keys in sight: 1 to 32, against 1 to 8 and then 8 each.
    assert work[0] - work[1] == pytest.approx(4 * 64 * (32 * 33 / 2 - (8 * 9 / 2 + 24 * 8)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("head", ["embedding", "norm", "mlp", "block"])
@pytest.mark.parametrize("output", ["own", "final", "embedding"])
def test_parameters_are_those_of_the_model(family, head, output):
    """One rank has what the model has; several have shared matrices in each place."""
    exits = [{"layer": 1, "head": head, "output": output}, {"layer": 3, "output": 0}]
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 40, "exits": exits,
    }  # fmt: skip
    config = ModelConfig.create(family, **sizes)
    count = Model.from_config(config, threads=1).num_parameters
    costs = Costs.of_model(config, 1, seq_length=16, rates=Rates(parameter_bytes=1.0))
    assert costs.static_bytes.tolist() == [count]
    split = Costs.of_model(config, 4, seq_length=16, rates=Rates(parameter_bytes=1.0))
    assert split.static_bytes.sum() >= count


def test_recomputation_keeps_less_and_computes_more():
    kept, time = [], []
    for mode in ("none", "attention", "full"):
        costs = Costs.of_model(llama(4), 2, seq_length=32, recompute=mode)
        kept.append(costs.kept_bytes[0])
        time.append(costs.backward[0])
    assert kept[0] > kept[1] > kept[2] and time[0] < time[1] < time[2]
    assert kept[2] == 4 * 32 * 64 * (2 + 1)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_bytes_are_those_of_a_trainer(family, recompute):
    """gpipe keeps all microbatches: what six more of them take is six times what one keeps."""
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    config = ModelConfig.create(family, **sizes)
    model = Model.from_config(config, threads=1)
    taken = []
    for microbatches in (2, 8):
        before = _core.alloc_stats()[2]
        trainer = _core.Trainer(
            model.core, rows=64, microbatches=microbatches, recompute=recompute, schedule="gpipe"
        )
        taken.append(_core.alloc_stats()[2] - before)
        del trainer
    costs = Costs.of_model(config, 1, seq_length=64, recompute=recompute)
    # The rest is for lists and pointers.
    assert 0 <= (taken[1] - taken[0]) / 6 - costs.kept_bytes[0] <= 1024


def test_logits_are_cut_as_in_the_core():
    header = (ROOT / "csrc" / "model" / "exit.h").read_text()
    count = re.search(r"#define EE_LOGIT_BYTES \(\(int64_t\)(\d+) << 20\)", header)
    assert operations._LOGIT_CHUNK_BYTES == int(count.group(1)) << 20


def test_messages_take_time():
    rates = Rates(bandwidth=1e9, latency=1e-6)
    costs = Costs.of_model(llama(4), 2, seq_length=32, micro_batch_size=2, rates=rates)
    assert costs.message == pytest.approx(1e-6 + 4 * 64 * 64 / 1e9)


def test_wrong_costs():
    for options, parts in [
        ({"forward": -1.0}, ["forward is invalid", "-1"]),
        ({"forward": float("nan")}, ["forward is invalid", "nan"]),
        ({"backward_weight": 3.0}, ["backward_weight", "0 to backward = 2"]),
        ({"message": -1.0}, ["message is invalid"]),
        ({"exits": [4]}, ["chunk of an exit", "got 4"]),
    ]:
        with pytest.raises(ValueError) as caught:
            Costs.uniform(4, **options)
        for part in parts:
            assert part in str(caught.value), caught.value
    for options in ({"seq_length": 0}, {"recompute": "some"}, {"exit_w": 1}, {"split": "even"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Costs.of_model(llama(4), 2, **{"seq_length": 8, **options})
    with pytest.raises(ValueError, match=r"forward has the wrong length \(expected 2, got 3\)"):
        Costs(
            ranks=2, chunks=1, forward=[1, 2, 3], backward=1, backward_input=1, backward_weight=1,
            kept_bytes=1, transient_bytes=1, static_bytes=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="flops"):
        Rates(flops=0)


@pytest.mark.parametrize("size", [0, 1], ids=["1.3B", "7B"])
def test_table_1(size, capsys):
    base_time, base_bytes, _ = simulated(size, "standard")
    lines = []
    for row, cells in ROWS.items():
        time, peak, bound = simulated(size, row)
        standard = ROWS["standard"][size]
        mine = 100 * (time / base_time - 1), 100 * (peak / base_bytes - 1)
        paper = 100 * (cells[size][0] / standard[0] - 1), 100 * (cells[size][1] / standard[1] - 1)
        assert time <= bound * (1 + 1e-12)
        assert abs(mine[1] - paper[1]) <= 3
        if row.endswith("(1 and 2)"):
            assert abs(mine[0] - paper[0]) <= 0.4
        lines.append(
            f"{row:22} time {mine[0]:+5.2f} % (paper {paper[0]:+5.2f} %), "
            f"peak {mine[1]:+5.1f} % (paper {paper[1]:+5.1f} %)"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
