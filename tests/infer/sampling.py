"""The sampler of the core on NumPy arrays, and what its choices should look like."""

import ctypes as ct
import math
from functools import cache

import numpy as np

from tests.infer.reference import softmax
from tests.ops import harness

TOKEN, DRAFT, ACCEPT, RESIDUAL = range(4)  # enum ee_random_purpose


function = cache(harness.function)


class Bias(ct.Structure):
    _fields_ = (("token", ct.c_int32), ("bias", ct.c_float))


class Sampling(ct.Structure):
    _fields_ = (
        ("bias", ct.c_void_p),
        ("bias_count", ct.c_int64),
        ("repetition_penalty", ct.c_float),
        ("presence_penalty", ct.c_float),
        ("frequency_penalty", ct.c_float),
        ("temperature", ct.c_float),
        ("top_k", ct.c_int32),
        ("top_p", ct.c_float),
        ("min_p", ct.c_float),
        ("seed", ct.c_uint64),
        ("sample", ct.c_uint64),
    )


class History(ct.Structure):
    _fields_ = (
        ("tokens", ct.c_void_p),
        ("count", ct.c_int64),
        ("prompt_count", ct.c_int64),
        ("banned", ct.c_void_p),
        ("banned_count", ct.c_int64),
    )


class SamplerMemory(ct.Structure):
    _fields_ = (
        ("arena", ct.c_size_t * 5),
        ("vocab", ct.c_int32),
        ("logits", ct.c_void_p),
        ("weights", ct.c_void_p),
        ("draft_weights", ct.c_void_p),
        ("order", ct.c_void_p),
        ("seen", ct.c_void_p),
        ("count", ct.c_void_p),
    )


def sampling(bias=(), **fields):
    """Settings that change nothing, but for what is named; bias: pairs."""
    found = Sampling(**{"repetition_penalty": 1, "temperature": 1, "top_p": 1, **fields})
    found.keep = (Bias * len(bias))(*bias)
    found.bias, found.bias_count = ct.addressof(found.keep), len(bias)
    return found


def history(tokens=(), prompt=None, banned=()):
    """A text; `prompt` tokens of it (all) are the prompt."""
    keep = np.array(tokens, np.int32), np.array(banned, np.int32)
    prompt = len(keep[0]) if prompt is None else prompt
    found = History(keep[0].ctypes.data, len(keep[0]), prompt, keep[1].ctypes.data, len(keep[1]))
    found.keep = keep
    return found


class Sampler:
    """The functions of the core, on NumPy arrays."""

    def __init__(self, vocab):
        self.memory = SamplerMemory()
        self.vocab = vocab
        self._itself = ct.byref(self.memory)
        p, i = ct.c_void_p, ct.c_int
        create = function("ee_sampler_create", i, p, ct.c_int32)
        self.status = create(self._itself, vocab)
        self.free = function("ee_sampler_free", None, p)
        self._adjust = function("ee_sampler_adjust", p, p, p, p, p)
        self._weigh = function("ee_sampler_weigh", ct.c_double, p, p, p, p)
        self._choose = function("ee_sampler_choose", ct.c_int32, p, p, p, p, i)
        self._verify = function("ee_sampler_verify", ct.c_bool, p, p, p, p, ct.c_int32, p, p)

    def __enter__(self):
        assert self.status == harness.OK
        return self

    def __exit__(self, *_):
        self.free(self._itself)

    def adjust(self, settings, logits, text):
        address = self._adjust(self._itself, ct.byref(settings), logits.ctypes.data, ct.byref(text))
        if address == logits.ctypes.data:
            return logits
        assert address == self.memory.logits
        return np.array((ct.c_float * self.vocab).from_address(address))

    def weigh(self, settings, logits):
        weights = np.full(self.vocab, np.nan)
        total = self._weigh(
            self._itself, ct.byref(settings), logits.ctypes.data, weights.ctypes.data
        )
        return weights, total

    def choose(self, settings, logits, text, purpose=TOKEN):
        """logits and text may be addresses, which is faster."""
        text, logits = _reference(text), _address(logits)
        return self._choose(self._itself, ct.byref(settings), logits, text, purpose)

    def verify(self, settings, logits, draft_logits, draft, text):
        """(whether the draft was accepted, the token)"""
        token = ct.c_int32(-1)
        addresses = _address(logits), _address(draft_logits)
        accepted = self._verify(
            self._itself, ct.byref(settings), *addresses, draft, _reference(text), ct.byref(token)
        )
        return accepted, token.value


def _address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array


def _reference(structure):
    return ct.byref(structure) if isinstance(structure, ct.Structure) else structure


def choices(sampler, settings, logits, text, count, purpose=TOKEN):
    """How often each token is chosen by samples 0, 1, ..."""
    address, text = ct.c_void_p(logits.ctypes.data), ct.byref(text)
    found = np.zeros(len(logits), np.int64)
    for settings.sample in range(count):
        found[sampler.choose(settings, address, text, purpose)] += 1
    return found


def draw(weights, total, u):
    call = function(
        "ee_sampler_draw", ct.c_int32, ct.c_void_p, ct.c_int32, ct.c_double, ct.c_double
    )
    return call(weights.ctypes.data, len(weights), total, u)


def uniform(settings, position, purpose):
    call = function("ee_sampling_uniform", ct.c_double, ct.c_void_p, ct.c_int64, ct.c_int)
    return call(ct.byref(settings), position, purpose)


def chi_square_tail(x, freedom):
    """The probability of more than x, in closed form."""
    half = x / 2
    if freedom % 2:
        terms = [half ** (i + 0.5) / math.gamma(i + 1.5) for i in range(freedom // 2)]
        return math.erfc(math.sqrt(half)) + math.exp(-half) * sum(terms)
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(freedom // 2))


def g_test(counts, p):
    """The probability that draws from p differ from it at least so much. What is expected less than
    5 times is taken together; what cannot be must not have come."""
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    seen = counts > 0
    statistic = 2 * (counts[seen] * np.log(counts[seen] / expected[seen])).sum()
    return chi_square_tail(max(statistic, 0.0), len(counts) - 1) if len(counts) > 1 else 1.0


def expected_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """After temperature, then top-k, then top-p, then min-p, in float64; of equal logits the
    smaller token comes first."""
    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    p = softmax(scaled[kept])
    if top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    kept = kept[softmax(scaled[kept]) >= min_p * softmax(scaled[kept]).max()]
    result = np.zeros(len(order))
    result[kept] = softmax(scaled[kept])
    return result


def transformers_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same, after the processors of Transformers, which keep all of equal logits."""
    import torch
    import transformers as hf

    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    scores = torch.tensor(np.asarray(logits, np.float64))[None]
    warpers = [hf.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, -1)[0].numpy()
