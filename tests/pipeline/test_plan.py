"""Plans: memory as the trainer allocates it, time from the simulator, and the command."""

import json

import numpy as np
import pytest

from eellm import ModelConfig, _core
from eellm.cli import main
from eellm.parallel import run_local
from eellm.pipeline import Layout, Schedule
from eellm.pipeline.measure import Speeds, estimate, measure, ranks_at_a_time
from eellm.pipeline.memory import memory_of, places_of
from eellm.pipeline.plan import Planner, divisors
from tests.cli.common import eellm, error_line

MIXED = ({"layer": 2, "head": "norm"}, {"layer": 3, "head": "mlp"}, {"layer": 5, "head": "block"})
SHARED = ({"layer": 2, "head": "embedding"}, {"layer": 4, "norm": "final", "output": "final"})


def config_of(kind="gpt2", layers=8, width=128, vocab=3000, exits=(), **values):
    return ModelConfig.create(
        kind, vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=4 * width, max_position_embeddings=64,
        exits=list(exits), **values,
    )  # fmt: skip


def take_step(trainer, config, microbatches, sequences, length):
    rng = np.random.default_rng(0)
    shape = (microbatches, sequences * length)
    tokens = rng.integers(0, config.vocab_size, shape, dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (microbatches, sequences))
    ends = np.arange(0, sequences * length + 1, length, dtype=np.int32)
    trainer.step(
        tokens, tokens, positions, np.zeros(shape, np.uint64), np.tile(ends, microbatches),
        np.full(microbatches, sequences, np.int32), exit_weights=[0.3] * len(config.exits),
        learning_rate=1e-3, clip=1.0,
    )  # fmt: skip


LAYOUTS = [
    dict(ranks=1, name="1f1b"),
    dict(ranks=2, name="1f1b", exits=MIXED),
    dict(ranks=4, name="1f1b", exits=MIXED, exact_ties=True),
    dict(ranks=2, name="gpipe", recompute="full", exits=MIXED[:2]),
    dict(ranks=2, name="interleaved", chunks=2, recompute="attention", exits=MIXED),
    dict(ranks=4, name="zero_bubble", kind="llama", exits=MIXED),
    dict(ranks=2, name="zero_bubble", kind="llama", exit_w="deferred", exits=SHARED),
    dict(ranks=1, name="1f1b", kind="llama", exact_ties=True, exits=SHARED),
    dict(ranks=3, name="1f1b", split=[4, 3, 1], microbatches=2),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: f"{c['name']}-{c['ranks']}")
def test_memory(case):
    """Within 5 % of what the trainer has allocated, on every rank."""
    case = dict(case)
    ranks, name, chunks = case["ranks"], case["name"], case.get("chunks", 1)
    microbatches, length, sequences = case.get("microbatches", 6), 64, 2
    config = config_of(case.get("kind", "gpt2"), exits=case.get("exits", ()))
    layout = Layout.of(config, ranks, chunks, split=case.get("split"))
    schedule = Schedule(name, ranks, microbatches, chunks, exits=layout.exit_ranks)
    options = {key: case[key] for key in ("recompute", "exit_w", "exact_ties") if key in case}

    def work(group):
        bounds = np.array(layout.bounds, np.int32)
        part = (ranks, chunks, group.rank, bounds, False, case.get("exact_ties", False))
        model = _core.Model(config.to_core(), threads=1, part=part)
        model.initialize(0.02, 1)
        trainer = _core.Trainer(
            model, rows=sequences * length, schedule=schedule.spec, comm=group.comm,
            recompute=case.get("recompute", "none"),
            defer_exits=case.get("exit_w") == "deferred",
        )  # fmt: skip
        take_step(trainer, config, microbatches, sequences, length)
        return trainer.memory

    wanted = run_local(ranks, work)
    found = memory_of(
        config, layout, schedule, seq_length=length, micro_batch_size=sequences, **options
    )
    for rank, (mine, real) in enumerate(zip(found, wanted, strict=True)):
        assert mine.total == pytest.approx(sum(real.values()), rel=0.05), (rank, mine, real)
        for kind in ("parameters", "gradients", "moments"):
            assert getattr(mine, kind) == pytest.approx(real[kind], rel=0.01), (rank, kind)
    # Another schedule, split or mode is told apart.
    other = memory_of(config, layout, Schedule("gpipe", ranks, 24), seq_length=length)
    assert other[0].activations != found[0].activations


def test_places():
    """As many as are in use at a time."""
    for name, slots in (("gpipe", 6), ("1f1b", 4), ("zero_bubble", 4)):
        assert places_of(Schedule(name, 4, 6).actions(0))[0] == slots
    assert places_of(Schedule("1f1b", 4, 6).actions(0))[1] == 0
    slots, queues = places_of(Schedule("zero_bubble", 4, 6).actions(3))
    assert slots == 1 and queues >= 1
    filled = Schedule("1f1b", 4, 6, fill=(0, 1), exits=(1,))
    assert places_of(filled.actions(0))[0] == 5  # one forward keeps nothing


SPEEDS = Speeds(
    micro_batch_size=1, seq_length=64, forward=1.0, backward=2.0, backward_input=1.25,
    backward_weight=1.0, head=6.0, embedding=(0.5, 0.25), parameter=1e-6, latency=0.125,
    bandwidth=1e6,
)  # fmt: skip


def test_costs_of_speeds():
    config = config_of(exits=MIXED[:1])
    layout = Layout.of(config, 2)
    costs = SPEEDS.costs(config, layout)
    assert costs.forward.tolist() == [4.5, 4.0]
    assert costs.backward.tolist() == [8.0 + 6.0 + 0.25, 8.0 + 6.0]
    assert costs.backward_input.tolist() == [5.0 + 6.0 + 0.25, 5.0 + 6.0]
    assert costs.backward_weight.tolist() == [4.0, 4.0]
    assert costs.exit_time.tolist() == [6.0, 0.0]
    assert costs.message == 0.125 + 4 * 64 * 128 / 1e6
    deferred = SPEEDS.costs(config, layout, exit_w="deferred")
    assert deferred.backward_input[1] == pytest.approx(5.0 + 4.0)
    assert deferred.backward_weight[1] == pytest.approx(4.0 + 4.0)
    full = SPEEDS.costs(config, layout, recompute="full")
    # All of a layer's forward but the down projection, whose output is not kept.
    assert 4 * 0.6 < full.backward[0] - costs.backward[0] < 4.0
    block = SPEEDS.costs(config_of(exits=MIXED[2:]), layout)
    assert layout.exits[1] == () and block.layout is layout


def test_update():
    config = config_of()
    one, two = (SPEEDS.update(config, Layout.of(config, n)) for n in (1, 2))
    matrix = 3000 * 128
    layers = 12 * 128 * 128 * 8
    assert one == pytest.approx(1e-6 * (matrix + layers), rel=0.02)
    # Half the layers a rank; the matrix of tied embeddings goes there and back.
    there_and_back = 2 * (0.125 + 4 * matrix / 1e6)
    assert two == pytest.approx(1e-6 * (matrix + layers / 2) + there_and_back, rel=0.02)


def planner(ranks=4, batch=16, **values):
    config = config_of(exits=MIXED[:2])

    def speeds(size):
        return estimate(config, seq_length=64, micro_batch_size=size)

    return Planner(config, ranks, seq_length=64, global_batch_size=batch, speeds=speeds, **values)


def test_plans():
    made = planner()
    plans = made.plans()
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    chosen = {(p.choice.schedule, p.choice.chunks) for p in plans}
    assert chosen == {("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("interleaved", 2)}
    assert {p.choice.micro_batch_size for p in plans} == {1, 2, 4, 8, 16}
    assert {p.choice.recompute for p in plans} == {"none", "attention", "full"}
    for plan in plans:
        assert plan.choice.micro_batch_size * plan.choice.microbatches == 16
        assert sum(plan.choice.split) == 8 and len(plan.memory) == 4 and plan.fits


def find(plans, **wanted):
    found = [p for p in plans if all(getattr(p.choice, k) == v for k, v in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_what_plans_say():
    """Recomputation takes time and saves memory; a split by cost evens out the last rank's head."""
    plans = planner().plans(micro_batches=[1])
    common = dict(schedule="1f1b", balance="layers")
    plain, full = (find(plans, recompute=mode, **common) for mode in ("none", "full"))
    assert full.seconds > plain.seconds and full.peak < plain.peak
    gpipe = find(plans, schedule="gpipe", balance="layers", recompute="none")
    assert gpipe.peak > plain.peak
    even = find(plans, schedule="1f1b", balance="cost", recompute="none")
    assert even.seconds < plain.seconds and min(even.choice.split) == 1
    settings = even.choice.settings()
    assert settings["parallel"]["split"] == list(even.choice.split)


def test_limit():
    free = planner().plans(micro_batches=[1])
    limit = float(np.median([p.peak for p in free]))
    plans = planner(limit=limit).plans(micro_batches=[1])
    fits = [p.fits for p in plans]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    assert all(p.fits == (p.peak <= limit) for p in plans)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6]
    assert divisors(7) == [1, 7]


def test_many_ranks():
    """The most promising plans alone are simulated."""
    config = config_of(layers=256, width=64, vocab=500)
    made = Planner(
        config, 256, seq_length=64, global_batch_size=4096,
        speeds=lambda size: estimate(config, seq_length=64, micro_batch_size=size),
    )  # fmt: skip
    plans = made.plans(recompute=["none"])
    assert 4 <= len(plans) <= 40


@pytest.mark.parametrize(
    "call,named",
    [
        (lambda: planner(ranks=9), "layers"),
        (lambda: planner(ranks=0), "ranks"),
        (lambda: planner(batch=0), "global_batch_size"),
        (lambda: planner(limit=-1), "memory"),
        (lambda: planner().plans(micro_batches=[3]), "divisor of 16"),
    ],
)
def test_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_measure():
    config = config_of(width=64, vocab=400, exits=MIXED)
    found = measure(config, seq_length=32, micro_batch_size=2, together=2, steps=2)
    assert found.measured and found.rows == 64
    for name in ("forward", "backward", "backward_input", "backward_weight", "head", "parameter",
                 "latency", "bandwidth"):  # fmt: skip
        assert 0 < getattr(found, name) < np.inf, name
    alone = measure(config, seq_length=32, micro_batch_size=2, comm=_core.comm_self(), steps=1)
    assert alone.measured


def test_ranks_at_a_time():
    assert ranks_at_a_time(1, 1) == 1
    assert ranks_at_a_time(64, 1 << 20) == 1


# -- The command --------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nmodel_type = "gpt2"\nvocab_size = 1000\nhidden_size = 64\nnum_hidden_layers = 4\n'
        "num_attention_heads = 4\nmax_position_embeddings = 64\n"
        '[[model.exits]]\nlayer = 2\nhead = "norm"\n'
        "[train]\nseq_length = 32\nmicro_batch_size = 2\nglobal_batch_size = 8\n"
    )
    return path


def test_command(run_file, tmp_path, capsys):
    png = tmp_path / "plan.png"
    call = ["plan", str(run_file), "--ranks", "2", "--memory", "0.004", "--png", str(png)]
    assert main([*call, "--top", "100"]) == 0
    text = capsys.readouterr().out
    assert "too large" in text and "zero_bubble" in text and "estimated" in text
    assert "[parallel]" in text and png.read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--json", "--micro-batches", "2", "--recompute", "none,full"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 2
    assert {p["micro_batch_size"] for p in found["plans"]} == {2}
    assert {p["recompute"] for p in found["plans"]} == {"none", "full"}
    assert all(len(p["bytes"]) == 2 and p["seconds"] > 0 for p in found["plans"])


def test_command_measures(run_file, capsys):
    call = ["plan", str(run_file), "--ranks", "2", "--measure", "--micro-batches", "1"]
    assert main(call) == 0
    shown = capsys.readouterr()
    assert "measured here" in shown.out and "measuring" in shown.err


def test_wrong_calls(run_file, tmp_path):
    call = ("plan", run_file, "--ranks", "2")
    for option, value in (("--memory", "0"), ("--top", "0"), ("--threads", "0"),
                          ("--gflops", "0"), ("--recompute", "half"), ("--micro-batches", "a"),
                          ("--png", "a.svg")):  # fmt: skip
        assert option in error_line(eellm(*call, option, value), 2)
    assert "layers" in error_line(eellm("plan", run_file, "--ranks", "5"), 2)
    assert "none.toml" in error_line(eellm("plan", "none.toml", "--ranks", "2"), 2)
