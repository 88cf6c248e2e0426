"""Small models spread over ranks that are threads: what every rank of a run has in the end."""

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eellm import _core
from eellm.pipeline import Schedule
from tests.parity.cases import base_config, exit_, gpt2_config

PATIENCE = 30.0  # seconds of waits that must not be the ones to end
NAMES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]
B, T = 2, 8  # of a microbatch

MIXED = [
    exit_(1, before=True, norm="none"),
    exit_(2, branch="block"),
    exit_(3, branch="mlp", output=-1),
    exit_(4, norm="final", output=-3),
    exit_(6, before=True, output=2),
    exit_(6, norm="final", output=0),
    exit_(8, branch="mlp"),
    exit_(8, output=2),
]
WITHOUT_MLP = [
    exit_(1, before=True),
    exit_(2, norm="final"),
    exit_(4, branch="block", output=-1),
    exit_(6, norm="none", output=-3),
    exit_(8, output=2),
]
APART = [exit_(2, output=-1), exit_(4, branch="block", output=-1), exit_(7, output=-1)]
DROPOUT = dict(embedding_dropout=0.1, attention_dropout=0.2, residual_dropout=0.1)
MODELS = {
    "gpt2": gpt2_config(num_layers=8, exits=MIXED, **DROPOUT),
    "llama": base_config(num_layers=8, exits=MIXED, residual_dropout=0.1),
    "apart": base_config(num_layers=8, exits=APART),
    "parallel": base_config(num_layers=8, exits=WITHOUT_MLP, parallel_residual=True, gated=False,
                            norm="layernorm", norm_bias=True, shared_norm=True,
                            tie_embeddings=True),
    "qk_norm": base_config(num_layers=8, exits=MIXED, qk_norm=True, bias_q=True, bias_kv=True,
                           bias_o=True, bias_up=True, bias_down=True, attention_softcap=5.0,
                           logit_softcap=3.0, window=[0, 5, 0, 3, 0, 0, 4, 0],
                           norm_offset=1.0, tie_embeddings=True),
}  # fmt: skip


def run_ranks(ranks, work, timeout=PATIENCE):
    """Runs work(rank, comm) on a thread for each rank; what each returned or raised.

    A rank that fails aborts the job, so that the others end as well.
    """
    comms = _core.comm_local(ranks, timeout)
    ended = [None] * ranks

    def body(rank):
        try:
            ended[rank] = work(rank, comms[rank])
        except Exception as error:
            ended[rank] = error
            comms[rank].abort(f"rank {rank} failed: {error}")

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
        assert not thread.is_alive(), "a rank hangs"
    return ended


def all_well(ended):
    """The results of ranks of which none failed; raises what failed first."""
    errors = [each for each in ended if isinstance(each, Exception)]
    first = [each for each in errors if "aborted" not in str(each)] or errors
    if first:
        raise first[0]
    return ended


def values_of(config, seed=0):
    """Parameters far from their symmetric initial values, by name."""
    model = _core.Model(config, 1)
    rng = np.random.default_rng(seed)
    values = {}
    for row in model.table:
        name, shape = row["name"], row["shape"]
        centre = 0.7 if "norm" in name and name.endswith("weight") else 0.0
        std = 0.3 if len(shape) == 1 else 1.2 / np.sqrt(shape[1])
        values[name] = (centre + std * rng.standard_normal(shape)).astype(np.float32)
    return values


def data_of(config, microbatches, seed=0, masked=0.2, rows=B * T):
    """Arrays of a step: masked targets, and several segments of random lengths."""
    rng = np.random.default_rng(seed)
    shape = (microbatches, rows)
    tokens = rng.integers(0, config["vocab_size"], shape, dtype=np.int32)
    targets = rng.integers(0, config["vocab_size"], shape, dtype=np.int32)
    targets[rng.random(shape) < masked] = -1
    targets[:, 0] = rng.integers(0, config["vocab_size"], microbatches)
    positions, segments, counts = np.empty(shape, np.int32), [], []
    for m in range(microbatches):
        bounds = np.unique([0, rows, *rng.integers(1, rows, 3)])
        segments += bounds.tolist()
        counts.append(len(bounds) - 1)
        for low, high in itertools.pairwise(bounds):
            positions[m, low:high] = np.arange(high - low)
    return dict(
        tokens=tokens,
        targets=targets,
        positions=positions,
        row_ids=np.arange(tokens.size, dtype=np.uint64).reshape(shape) + np.uint64(seed << 20),
        segments=np.array(segments, np.int32),
        segment_counts=np.array(counts, np.int32),
    )


def take(data, microbatches):
    """The microbatches of these numbers, in this order."""
    ends = np.cumsum(data["segment_counts"] + 1)
    parts = [data["segments"][ends[m] - data["segment_counts"][m] - 1 : ends[m]]
             for m in microbatches]  # fmt: skip
    picked = {name: np.ascontiguousarray(data[name][list(microbatches)])
              for name in ("tokens", "targets", "positions", "row_ids")}  # fmt: skip
    counts = np.array([len(part) - 1 for part in parts], np.int32)
    return dict(**picked, segments=np.concatenate(parts), segment_counts=counts)


@dataclass
class Layout:
    """How a model is spread, and what its ranks do."""

    ranks: int = 1
    chunks: int = 1
    schedule: Any = "1f1b"  # a name, or a Schedule
    bounds: Any = None
    earlier: bool = False
    exact: bool = True
    recompute: str = "none"
    defer: bool = False
    options: dict = field(default_factory=dict)  # of the trainer

    def schedule_of(self, microbatches):
        if isinstance(self.schedule, Schedule):
            return self.schedule
        return Schedule(self.schedule, self.ranks, microbatches, self.chunks)

    def model(self, config, rank, values):
        bounds = None if self.bounds is None else np.array(self.bounds, np.int32)
        part = (self.ranks, self.chunks, rank, bounds, self.earlier, self.exact)
        model = _core.Model(config, 1, part=part)
        for row in model.table:
            if row["held"]:
                np.asarray(model.parameter(row["name"]))[...] = values[row["name"]]
        return model

    def trainer(self, model, comm, microbatches, rows=B * T, rank=0, **options):
        schedule = self.schedule_of(microbatches)
        lists = [each.view(np.uint64) for each in schedule.lists] if schedule.custom else None
        return _core.Trainer(
            model, rows=rows, schedule=schedule.spec, lists=lists, comm=comm,
            recompute=self.recompute, defer_exits=self.defer, **{**self.options, **options},
        )  # fmt: skip


def layout_of(name, ranks=4, **options):
    return Layout(ranks, 2 if name == "interleaved" else 1, name, **options)


@dataclass
class Outcome:
    """What all ranks agree on, and the parameters and gradients of all."""

    results: list
    evaluation: dict
    parameters: dict
    gradients: dict
    moments: dict


def settings_of(config, **changes):
    weights = [0.3 + 0.1 * e for e in range(len(config["exits"]))]
    return {**dict(exit_weights=weights, learning_rate=1e-2, clip=1.0, dropout_seed=5), **changes}


def merge(found):
    """One mapping of those of all ranks, which agree on what several of them hold."""
    whole = {}
    for mine in found:
        for name, value in mine.items():
            assert np.array_equal(whole.setdefault(name, value), value), name
    return whole


def same(left, right):
    """Whether two results are equal to the bit."""
    assert left.keys() == right.keys()
    return all(np.array_equal(left[key], right[key]) for key in left)


def held(model, view):
    return {row["name"]: np.array(view(row["name"])) for row in model.table if row["held"]}


def train(config, values, layout, steps, *, evaluate=None, **changes):
    """Takes a step with each of `steps` on all ranks, then evaluates."""
    settings, microbatches = settings_of(config, **changes), len(steps[0]["tokens"])
    rows = steps[0]["tokens"].shape[1]

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, microbatches, rows)
        results = [trainer.step(*data.values(), **settings) for data in steps]
        found = {}
        if evaluate is not None:
            inputs = [evaluate[name] for name in evaluate if name != "row_ids"]
            found = trainer.evaluate(*inputs)
        views = (model.parameter, trainer.gradient, trainer.moment2)
        return results, found, *(held(model, view) for view in views)

    ended = all_well(run_ranks(layout.ranks, work))
    results, evaluation = ended[0][:2]
    for other, found, *_ in ended:
        assert all(same(a, b) for a, b in zip(other, results, strict=True))
        assert same(found, evaluation)
    return Outcome(results, evaluation, *(merge([each[i] for each in ended]) for i in (2, 3, 4)))


def check_same(found, wanted):
    """Losses, norms, evaluation, weights and moments, to the bit."""
    for i, (a, b) in enumerate(zip(found.results, wanted.results, strict=True)):
        for key in b:
            assert np.array_equal(a[key], b[key]), (f"step {i}", key, a[key], b[key])
    for key in wanted.evaluation:
        assert np.array_equal(found.evaluation[key], wanted.evaluation[key]), key
    for what in ("parameters", "gradients", "moments"):
        mine, theirs = getattr(found, what), getattr(wanted, what)
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert np.array_equal(mine[name], theirs[name]), (what, name)
