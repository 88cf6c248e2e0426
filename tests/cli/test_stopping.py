"""Runs that are stopped: by signals, and by kill -9 at random moments."""

import random
import signal
import time

import numpy as np
import pytest

import eellm as package
from eellm.train import read_metrics
from tests.cli.common import eellm, start


def wait_for_step(process, run, step, limit=60.0):
    """Waits until the run has reported a step."""
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    _, text = process.communicate(timeout=5)
    pytest.fail(f"the run never came to step {step}: {text}")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_saves_and_gives_its_status(corpus, tmp_path, number, status):
    run = tmp_path / "run"
    process = start("train", corpus / "run.toml", "-o", run, "--set", "train.steps=100000",
                    "--set", "train.checkpoint_interval=0")  # fmt: skip
    wait_for_step(process, run, 3)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == status, text
    assert "saved" in text and "Traceback" not in text
    (saved,) = (run / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    assert steps == len(read_metrics(run / "metrics.jsonl"))
    again = eellm("train", corpus / "run.toml", "-o", run, "--resume", "auto",
                  "--set", f"train.steps={steps + 2}")  # fmt: skip
    assert again.returncode == 0 and f"resuming after step {steps}" in again.stderr


def weights(run):
    model = package.Model.from_pretrained(run / "model")
    return {name: np.array(values) for name, values in model.parameters().items()}


def killed_run(corpus, run, kills, seed):
    """Starts the run again and again, each time killed at a random moment; then lets it end."""
    rng = random.Random(seed)
    arguments = ["train", corpus / "run.toml", "-o", run, "--resume", "auto",
                 "--set", "train.steps=60", "--set", "train.checkpoint_interval=1"]  # fmt: skip
    longest = 1.0
    for _ in range(kills):
        began = time.monotonic()
        process = start(*arguments)
        try:
            process.wait(timeout=rng.uniform(0.2, 1.2) * longest)
        except Exception:
            process.kill()
        # The first one may never come to a step; give each a little more time than the last.
        longest = min(longest * 1.1, 3.0)
        process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), time.monotonic() - began
    result = eellm(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def check_kills(corpus, tmp_path, kills, seed):
    straight = eellm("train", corpus / "run.toml", "-o", tmp_path / "straight",
                     "--set", "train.steps=60", "--set", "train.checkpoint_interval=1")  # fmt: skip
    assert straight.returncode == 0, straight.stderr
    killed_run(corpus, tmp_path / "killed", kills, seed)
    left, right = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    records = read_metrics(tmp_path / "killed/metrics.jsonl")
    steps = [record["step"] for record in records if record["kind"] == "step"]
    assert steps == list(range(1, 61))


def test_kill_9_loses_nothing(corpus, tmp_path):
    check_kills(corpus, tmp_path, kills=4, seed=1)


@pytest.mark.long
def test_kill_9_twenty_times_loses_nothing(corpus, tmp_path):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    check_kills(corpus, tmp_path, kills=20, seed=seed)
