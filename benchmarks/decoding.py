"""Decoding as the benchmarks measure it: models with random weights, streams of tokens that are
timed in slices, and the sides that more than one benchmark runs.

The bandwidth of this kind of machine wanders within seconds. So what is compared takes turns in
short slices inside one process, and a figure is the median over slices of the ratio within a slice.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from benchmarks.common import in_turns, median, record

GPT2 = dict(layers=12, width=768, heads=12, vocab=50257, context=1024)
WIDE = dict(layers=24, width=1024, heads=16, vocab=32000, context=1024)
PROMPT = 4  # tokens; short, so that attention takes little
BUSY = 0.08  # of a CPU, from which on others disturb a measurement
LENGTH = 36  # new tokens, after which a stream begins again
SLICE = 16  # steps timed together: what a cap of 15 deferred rows takes to come round


def make_model(case, threads):
    """GPT-2's architecture in the sizes of `case`, early exits after the layers case["exits"]."""
    from eellm import Model
    from eellm.config import ModelConfig
    from eellm.exits import ExitConfig

    config = ModelConfig(
        vocab_size=case["vocab"], hidden_size=case["width"], num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"], intermediate_size=4 * case["width"],
        max_position_embeddings=case["context"], norm="layernorm", norm_bias=True, gated=False,
        hidden_act="gelu_new", positions="learned", tie_word_embeddings=True,
        bias_q=True, bias_kv=True, bias_o=True, bias_up=True, bias_down=True,
        exits=tuple(ExitConfig(layer=n) for n in case.get("exits", ())),
    )  # fmt: skip
    return Model.from_config(config, threads=threads)


def weight_counts(case):
    """Elements of one layer's matrices, and of the output matrix."""
    return 12 * case["width"] ** 2, case["vocab"] * case["width"]


class Stream:
    """Sequences that are decoded on and on; when they end, all begin again. `replay` is passed on
    piece by piece, in a circle."""

    def __init__(self, model, sequences=1, dtype="float32", replay=None, **request):
        from eellm import _core

        self.engine = _core.Engine(
            model.core, dtype=dtype, max_sequences=sequences, max_length=PROMPT + LENGTH
        )
        self.sequences, self.request, self.replay = sequences, request, replay
        self.rng = np.random.default_rng(0)
        self.vocab = model.config.vocab_size
        self.left = 0  # new tokens until the sequences end

    def begin(self):
        """New prompts, read up to their first token."""
        while self.engine.active:
            self.engine.step()
        if self.replay is not None:
            self.request["replay"] = self.replay[:LENGTH]
            self.replay = np.roll(self.replay, -LENGTH)
        for _ in range(self.sequences):
            prompt = self.rng.integers(0, self.vocab, PROMPT).astype(np.int32)
            self.engine.add(prompt, max_new_tokens=LENGTH, **self.request)
        events = self.engine.step()
        self.left = self.sequences * LENGTH - len(events)

    def slice(self, steps=SLICE):
        """Times some steps: seconds of all and of the median one, tokens, bytes of weights read."""
        if self.left < self.sequences * 2 * steps:
            self.begin()
        before = self.engine.stats["bytes_read"]
        tokens, times = 0, []
        while len(times) < steps and tokens < self.left:
            start = time.perf_counter()
            tokens += len(self.engine.step())
            times.append(time.perf_counter() - start)
        self.left -= tokens
        return dict(seconds=sum(times), step=median(times), tokens=tokens, steps=len(times),
                    bytes=self.engine.stats["bytes_read"] - before)  # fmt: skip


class Others:
    """CPU time that other processes take, as a share of one CPU. Call it to begin, and again."""

    def __init__(self):
        self.last = None

    def __call__(self):
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        mine = time.process_time()
        now = (busy - mine, time.perf_counter())
        last, self.last = self.last, now
        return max(0.0, (now[0] - last[0]) / (now[1] - last[1])) if last else 0.0


def one_round(streams, measure):
    """A slice of each stream. A slice's `limit` is the mean of what `measure` gave before and after
    it."""
    out = {}
    before = measure() if measure else None
    for name, stream in streams.items():
        out[name] = stream.slice()
        if measure:
            after = measure()
            out[name]["limit"] = (before + after) / 2
            before = after
    return out


def take_turns(streams, slices, measure=None):
    """{name: [slice, ...]}, the streams one after the other. Rounds in which other processes took
    CPU time are repeated, as long as that makes sense."""
    for stream in streams.values():
        stream.slice()
    others = Others()
    quiet, busy = [], []
    while len(quiet) < slices and len(quiet) + len(busy) < 4 * slices:
        others()
        result = one_round(streams, measure)
        load = others()
        (quiet if load < BUSY else busy).append((load, result))
    busy.sort(key=lambda r: r[0])
    rounds = [result for _, result in (quiet + busy)[:slices]]
    return {name: [r[name] for r in rounds] for name in streams}


# -- Depths and acceptance that are replayed ------------------------------------------------------


def replay_draws(count, chance, seed=0):
    """`count` numbers, 1 with the given chance and else 0."""
    rng = np.random.default_rng(seed)
    return (rng.random(count) < chance).astype(np.int32)


def draft_cost(case, drafts, chance):
    """Weights read a token when `drafts` tokens at a time are drafted at 1/4 depth and each is
    accepted with this chance, in elements: the lower layers once a draft and once for the row that
    verifies, the output matrix once a draft and once to verify."""
    layer, head = weight_counts(case)
    lower = case["layers"] // 4 * layer
    upper = case["layers"] * layer - lower
    tokens = sum(chance**i for i in range(drafts + 1))
    return ((drafts + 1) * lower + drafts * head + upper + head) / tokens


def side_speculative(case, threads):
    """Full depth and speculation in turns; acceptance is replayed, the number of drafts is that
    which reads least."""
    drafts = min(range(1, 9), key=lambda n: draft_cost(case, n, case["chance"]))
    model = make_model(dict(case, exits=[case["layers"] // 4]), threads)
    replay = replay_draws(50 * LENGTH, case["chance"])
    streams = {
        "full": Stream(model, engine="full"),
        "ours": Stream(model, engine="speculative", max_deferred=drafts, thresholds=[0.0],
                       replay=replay),
    }  # fmt: skip
    out = take_turns(streams, case["slices"])
    return dict(out, drafts=drafts)


def rate(result):
    """Bytes of weights read a second in a slice."""
    return result["bytes"] / result["seconds"]


def step_rate(result):
    """The same in the median step of a slice whose steps all do the same."""
    return result["bytes"] / result["steps"] / result["step"]


def bytes_a_token(slices):
    return sum(s["bytes"] for s in slices) / sum(s["tokens"] for s in slices)


def ideal_record(metric, results, **fields):
    """How `ours` compares with full depth, which is as fast as the bytes allow where both read at
    the same rate: value is the speed-up, limit that which the bytes allow."""
    shares, limits = [], []
    for r in results:
        shares.append(
            median([rate(a) / rate(b) for a, b in zip(r["ours"], r["full"], strict=True)])
        )
        limits.append(bytes_a_token(r["full"]) / bytes_a_token(r["ours"]))
    gains = [share * limit for share, limit in zip(shares, limits, strict=True)]
    return record(metric, median(gains), "x full", gains, limit=median(limits),
                  limit_share=median(shares), **fields)  # fmt: skip


def speculative_replayed(script, metric, options, turns=5):
    """The metric of that name: the worse of two shapes."""
    records = []
    for shape in (GPT2, WIDE):
        case = dict(shape, chance=0.7, slices=8)
        results = in_turns(script, ["speculative"], case, options.turns or turns, options.threads)
        drafts = results["speculative"][0]["drafts"]
        config = json.dumps(dict(case, drafts=drafts))
        records.append(ideal_record(metric, results["speculative"], config=config))
    return min(records, key=lambda r: r["limit_share"])
