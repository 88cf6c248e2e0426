"""Tiny models of every kind, and ways to run them."""

import numpy as np

from eellm import _core
from eellm.config import ExitConfig, ModelConfig
from tests.infer import rules
from tests.infer.reference import Reference, softmax

SIZES = {
    "vocab_size": 43,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 160,
}
GPT2 = {
    "norm": "layernorm",
    "norm_bias": True,
    "gated": False,
    "hidden_act": "gelu_new",
    "positions": "learned",
    "tie_word_embeddings": True,
    **{f"bias_{part}": True for part in ("q", "kv", "o", "up", "down")},
}


FLOATS = ("confidence", "logprob")
# The settings of a request that bear on which token is chosen.
CHOICE = {
    "min_new_tokens", "stop_tokens", "logit_bias", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "temperature", "top_k", "top_p", "min_p", "seed", "sample",
}  # fmt: skip


def _exits(*heads):
    return [ExitConfig(**head) for head in heads]


_TWO = _exits({"layer": 1, "head": "norm"}, {"layer": 3, "head": "norm", "output": "own"})

# Every option of a config stands in one of them, every head kind in several.
CASES = {
    "gpt2": {**GPT2, "exits": _TWO},
    "gpt2_mlp": {
        **GPT2,
        "exits": _exits({"layer": 2, "head": "mlp"}, {"layer": 3, "head": "block"}),
    },
    "llama": {"exits": _TWO},
    "llama_heads": {
        "num_key_value_heads": 2,
        "exits": _exits(
            {"layer": 1, "head": "embedding", "position": "before"},
            {"layer": 2, "head": "mlp", "output": "own"},
            {"layer": 2, "head": "block", "norm": "final"},
            {"layer": 3, "head": "norm", "output": 1},
        ),
    },
    "grouped_odd": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "partial_rotary_factor": 0.6,
        "rope_interleaved": True,
        "bias_kv": True,
        "exits": _exits({"layer": 3, "head": "block", "position": "before"}),
    },
    "multi_query": {
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "bias_q": True,
        "norm_offset": 1.0,
        "embedding_scale": 4.9,
        "tie_word_embeddings": True,
        "exits": _exits({"layer": 2, "head": "embedding"}, {"layer": 4, "head": "norm"}),
    },
    "parallel": {
        "parallel_residual": True,
        "norm": "layernorm",
        "norm_bias": True,
        "gated": False,
        "hidden_act": "relu",
        "partial_rotary_factor": 0.34,
        "exits": _exits({"layer": 2, "head": "block"}, {"layer": 3, "head": "norm"}),
    },
    "parallel_shared": {
        "parallel_residual": True,
        "shared_norm": True,
        "norm": "layernorm",
        "exits": _exits({"layer": 1, "head": "norm"}, {"layer": 4, "head": "block"}),
    },
    "qk_norm": {
        "qk_norm": True,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "exits": _exits({"layer": 2, "head": "mlp"}, {"layer": 2, "head": "block"}),
    },
    "window": {
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "exits": _exits(
            {"layer": 1, "head": "block"},
            {"layer": 2, "head": "block"},
            {"layer": 3, "head": "mlp"},
        ),
    },
    "softcaps": {
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "attention_scale": 0.3,
        "exits": _TWO,
    },
    "no_positions": {
        "positions": "none",
        "bias_o": True,
        "bias_up": True,
        "bias_down": True,
        "exits": _exits(
            {"layer": 2, "position": "before", "branch": "block", "norm": None, "output": "own"},
            {"layer": 4, "head": "mlp"},
        ),
    },
    "no_exits": {"exits": []},
}


def make_config(case, **changes):
    """`case`: a name in CASES, or the seed of random options."""
    options = random_options(case) if isinstance(case, int) else CASES[case]
    return ModelConfig(**{**SIZES, **options, **changes})


def fill(core, seed, scale=0.35, offset=0.0):
    """Random values that make confident and doubtful tokens: nothing is zero or one."""
    rng = np.random.default_rng(seed)
    for row in core.table:
        view = np.asarray(core.parameter(row["name"]))
        spread = scale if len(row["shape"]) == 2 else 0.3
        mean = 0.0 if row["name"].endswith("bias") or len(row["shape"]) == 2 else 1.0 - offset
        view[...] = mean + spread * rng.standard_normal(view.shape)
    return core


def random_options(seed):
    """A config that mixes options at random, and early exits of any kind."""
    rng = np.random.default_rng(seed)

    def flip():
        return bool(rng.integers(2))

    heads = int(rng.choice([1, 2, 3, 4, 6]))
    norm = str(rng.choice(["layernorm", "rmsnorm"]))
    parallel = flip()
    layers = int(rng.integers(1, 5))
    options = {
        "hidden_size": int(rng.integers(3, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0])),
        "head_dim": int(rng.integers(4, 20)),
        "intermediate_size": int(rng.integers(1, 90)),
        "vocab_size": int(rng.integers(20, 150)),
        "hidden_act": str(rng.choice(["relu", "gelu", "gelu_new", "silu"])),
        "gated": flip(),
        "norm": norm,
        "norm_bias": norm == "layernorm" and flip(),
        "norm_offset": float(rng.choice([0.0, 1.0])),
        "positions": str(rng.choice(["none", "learned", "rope", "rope"])),
        "partial_rotary_factor": float(rng.choice([0.5, 1.0])),
        "rope_interleaved": flip(),
        "tie_word_embeddings": flip(),
        **{f"bias_{part}": flip() for part in ("q", "kv", "o", "up", "down")},
        "qk_norm": flip(),
        "parallel_residual": parallel,
        "shared_norm": parallel and flip(),
        "sliding_window": int(rng.integers(1, 20)),
        "layer_types": tuple(rng.choice(["full_attention", "sliding_attention"], layers).tolist()),
        "attn_logit_softcapping": 5.0 if flip() else None,
        "final_logit_softcapping": 8.0 if flip() else None,
        "embedding_scale": float(rng.choice([1.0, 3.0])),
    }
    if options["positions"] == "rope":
        dims = int(options["head_dim"] * options["partial_rotary_factor"])
        factor = (dims - dims % 2) / options["head_dim"] + 1e-9
        options["partial_rotary_factor"] = min(factor, 1.0)
    places = []
    for layer in range(1, layers + 1):
        for position, branch in (("before", None), ("after", "mlp"), ("after", None)):
            allowed = ["block", None] if branch is None else ["mlp"]
            if rng.random() < 0.35 and not (branch == "mlp" and parallel):
                places.append((layer, position, allowed[rng.integers(len(allowed))]))
    exits, deepest = [], -1
    for layer, position, branch in places:
        norm_of = (None, "own", "final")[rng.integers(3)]
        outputs = ["own", "embedding", "final", *range(len(exits))]
        output = outputs[rng.integers(len(outputs))]
        made = ExitConfig(layer, position, branch, norm_of, output)
        if made.depth > deepest:
            exits.append(made)
            deepest = made.depth
    return {**options, "exits": exits}


def make(case, seed=0, threads=1, isa="", **changes):
    """(core, Reference in float64, Reference in float32) of a case."""
    core_config = make_config(case, **changes).to_core()
    core = _core.Model(core_config, threads=threads, isa=isa)
    fill(core, seed, offset=core_config["norm_offset"])
    parameters = {row["name"]: np.asarray(core.parameter(row["name"])) for row in core.table}
    wide, narrow = (Reference(core_config, parameters, t) for t in (np.float64, np.float32))
    return core, wide, narrow


def random_tokens(seed, count, vocab=SIZES["vocab_size"]):
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def isas():
    """The instruction sets that this machine has."""
    found = []
    for isa in ("plain", "avx2", "avx512"):
        try:
            _core.Model(make_config("llama").to_core(), threads=1, isa=isa)
        except ValueError:
            continue
        found.append(isa)
    return found


def drain(engine, numbers, events=()):
    """Runs until nothing is in flight; the events of each sequence in order. `events`: those of
    earlier steps."""
    steps = [*events]
    while engine.active:
        steps.append(engine.step())
    found = np.concatenate(steps) if steps else engine.step()
    return [found[found["sequence"] == number] for number in numbers]


def run(core, prompt, count, *, dtype="float32", max_length=0, **settings):
    """The events of one prompt in an engine of its own."""
    engine = _core.Engine(core, dtype=dtype, max_length=max_length)
    prompt = np.asarray(prompt, np.int32)
    return drain(engine, [engine.add(prompt, max_new_tokens=count, **settings)])[0]


def score(core, text, *, dtype="float32"):
    """The events of a text that is scored in an engine of its own."""
    engine = _core.Engine(core, dtype=dtype)
    return drain(engine, [engine.score(np.asarray(text, np.int32))])[0]


def _same_bits(a, b):
    """Bit for bit, but any NaN is as good as another."""
    both = np.isnan(a) & np.isnan(b)
    return bool((both | (a.view(np.int32) == b.view(np.int32))).all())


def same(events, others):
    """Equal to the bit, sequence numbers aside."""
    if events.dtype != others.dtype or len(events) != len(others):
        return False
    integers = [f for f in ("kind", "position", "token", "exit", "done") if f in events.dtype.names]
    return (
        all(np.array_equal(events[name], others[name]) for name in integers)
        and all(_same_bits(events[name].copy(), others[name].copy()) for name in FLOATS)
        and np.array_equal(events["exits"]["token"], others["exits"]["token"])
        and all(
            _same_bits(events["exits"][name].copy(), others["exits"][name].copy())
            for name in FLOATS
        )
    )


class Scratch:
    """The view (see rules.py) of our own full-depth path: an engine of its own reads each text as a
    prompt, so nothing in it has ever been deferred, drafted or cached. With settings that change
    the choice of a token, the text after `prompt` is forced."""

    def __init__(self, core, prompt, *, dtype="float32", **settings):
        self.core, self.dtype, self.prompt = core, dtype, tuple(int(token) for token in prompt)
        self.choice = {name: settings[name] for name in settings if name in CHOICE}
        if not settings.get("min_new_tokens"):
            self.choice.pop("stop_tokens", None)
        self.limit = settings.get("max_new_tokens", 0)
        self.seen, self.scores = {}, {}
        self.exits = self._look(self.prompt).shape[0]

    def _look(self, text):
        if text not in self.seen:
            options = {"engine": "full", "all_confidences": True, "dtype": self.dtype}
            (event,) = run(self.core, text, 1, **options)
            self.seen[text] = event["exits"]
        return self.seen[text]

    def confidence(self, text, exit):
        return self._look(text)["confidence"][exit]

    def leaves(self, text, exit, threshold):
        return self.confidence(text, exit) >= threshold

    def largest(self, text, exit):
        return int(self._look(text)["token"][exit])

    def logprob(self, text, exit, token):
        text = (*text, token)
        if text not in self.scores:
            self.scores[text] = score(self.core, text, dtype=self.dtype)[-1]["exits"]
            # Two ways to the same numbers.
            for name in ("confidence", "token"):
                assert np.array_equal(self.scores[text][name], self._look(text[:-1])[name])
        return self.scores[text]["logprob"][exit]

    def choose(self, text, exit):
        if not self.choice:
            return self.largest(text, exit)
        written = np.array(text[len(self.prompt) :], np.int32)
        replay = np.array([self.exits - 1] * len(written) + [exit], np.int32)
        engine = _core.Engine(self.core, dtype=self.dtype)
        engine.add(
            np.array(self.prompt, np.int32),
            max_new_tokens=self.limit,
            forced=written,
            replay=replay,
            **self.choice,
        )
        events = []
        while len(events) < len(replay):
            events.extend(engine.step())
        assert events[-1]["exit"] == exit
        return int(events[-1]["token"])


def full_cache(core, text, layers, dtype="float32"):
    """Keys and values [T, K, D] of each layer after all of a text has run at full depth."""
    engine = _core.Engine(core, dtype=dtype)
    number = engine.add(np.array(text, np.int32), max_new_tokens=2, engine="full")
    while not len(engine.step()):
        pass
    return [engine._cache(number, layer) for layer in range(layers)]


def follow(core, config, view, prompt, settings, *, dtype="float32", max_length=0, cache=True):
    """Runs a request beside the rules, step for step: events, cache and work are equal, to the bit.
    Returns all events."""
    engine = _core.Engine(core, dtype=dtype, max_length=max_length)
    limit = max_length or config["max_positions"]
    shape = rules.Shape(config)
    decoder = rules.Decoder(view, shape, prompt, max_length=limit, **settings)
    number = engine.add(np.asarray(prompt, np.int32), **settings)
    for _ in range((len(prompt) - 2) // rules.PROMPT_ROWS):
        assert len(engine.step()) == 0
    found = []
    while decoder.done == rules.NOT_DONE:
        step = decoder.step()
        found.append(engine.step())
        check_step(found[-1], step.events, view.exits)
        if cache and decoder.done == rules.NOT_DONE:
            wanted = full_cache(core, decoder.text, len(step.fills), dtype)
            for layer, fill in enumerate(step.fills):
                for ours, full in zip(engine._cache(number, layer), wanted[layer], strict=True):
                    assert len(ours) == fill
                    assert ours.tobytes() == full[:fill].tobytes()
    assert engine.active == 0
    assert engine.stats["half_layers"] == decoder.half_layers
    assert engine.stats["head_rows"] == decoder.head_rows
    return np.concatenate(found)


def check_step(found, events, exits):
    """Events of one sequence in one step are those of the rules; `done` stands on the last one."""
    wanted = rules.as_array(events, exits)
    assert len(found) == len(wanted)
    if len(events):
        assert found["done"][-1] == wanted["done"][-1]
    assert not found["done"][:-1].any()
    found = found[np.argsort(found["kind"], kind="stable")]
    found["done"] = wanted["done"] = 0
    assert same(found, wanted), f"{found}\n{wanted}"


def thresholds_for(reference, tokens, share=0.4):
    """For each early exit a threshold that about `share` of the positions of a text reach, midway
    between two confidences."""
    found = []
    for row in softmax(reference.logits(tokens)).max(-1)[:-1]:
        values = np.unique(row)
        middle = (values[1:] + values[:-1]) / 2
        found.append(min(float(middle[int(len(middle) * (1 - share))]), 0.999))
    return found
