"""A model that was made before a fork works in the child too, to the same bits."""

import os
import signal
import time

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import base_config, exit_, randomise


def logits(model, config):
    tokens = np.arange(40, dtype=np.int32).reshape(1, 40) % config["vocab_size"]
    out = np.empty((2, 1, 40, config["vocab_size"]), np.float32)
    model.forward(tokens, out)
    return out


def wait_for(child, seconds=60):
    """The child's exit status; it is killed and None comes back when it does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_child_runs_and_destroys_the_model(threads):
    config = base_config(exits=[exit_(2)], hidden_size=128, intermediate_size=512)
    model = _core.Model(config, threads)
    randomise(model)
    expected = logits(model, config)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if np.array_equal(logits(model, config), expected) else 2
            del model
        finally:
            os._exit(status)
    assert wait_for(child) == 0
    assert np.array_equal(logits(model, config), expected)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_that_never_used_it_can_destroy_it():
    model = _core.Model(base_config(), 2)
    child = os.fork()
    if child == 0:
        del model
        os._exit(0)
    assert wait_for(child) == 0
