"""Loss curves on real text have the same bits in every layout and schedule."""

import lzma

import numpy as np
import pytest

from tests.parallel.common import make_config, run, train_config

STEPS = 50
LAYOUTS = [
    (2, {"schedule": "1f1b"}),
    (4, {"schedule": "1f1b"}),
    (2, {"schedule": "gpipe"}),
    (4, {"schedule": "gpipe", "rank_edge": "earlier"}),
    (2, {"schedule": "interleaved", "chunks": 2}),
    (4, {"schedule": "interleaved", "chunks": 2}),
    (2, {"schedule": "zero_bubble", "split": (3, 5)}),
    (4, {"schedule": "zero_bubble", "exit_w": "deferred"}),
]


@pytest.fixture(scope="module")
def text(data):
    """Bytes of real text as tokens."""
    for name in ("tinyshakespeare.txt", "novels_valid.txt.xz"):
        path = data / "corpora" / name
        if path.is_file():
            raw = path.read_bytes()
            raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
            return np.minimum(np.frombuffer(raw[:40_000], np.uint8), 127).astype(np.int32)
    pytest.skip("no corpus in the test data")


@pytest.fixture(scope="module")
def curves(text):
    """The curve of one rank alone, by family."""
    found = {}

    def of(family):
        if family not in found:
            config = make_config(family, 128)
            exact = {"exact_ties": True}
            found[family] = run(1, config, train_config(STEPS), text, parallel=exact)[0][0]
        return found[family]

    return of


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_fifty_steps(family, ranks, parallel, curves, text):
    config = make_config(family, 128)
    options = {"exact_ties": True, **parallel}
    for curve, _ in run(ranks, config, train_config(STEPS), text, parallel=options):
        assert curve == curves(family)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_curves_learn_and_another_seed_differs(family, curves, text):
    """What is compared is a training that works, and a comparison that can fail."""
    curve = curves(family)
    assert len(curve) == STEPS and curve[-1][2][-1] < 0.8 * curve[0][2][-1]
    other = run(2, make_config(family, 128), train_config(2, seed=1), text)[0][0]
    assert other[0] != curve[0]
