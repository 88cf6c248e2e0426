"""4,096 ranks x 16,384 microbatches: generated, proved and priced, in a process of its own."""

import subprocess
import sys

import pytest

from tests.cli.common import environment

PROGRAM = """
import resource, sys, time
from eellm.pipeline import Costs, Schedule

name, chunks, ranks, microbatches = sys.argv[1], *map(int, sys.argv[2:])
began = time.perf_counter()
schedule = Schedule(name, ranks, microbatches, chunks)
result = schedule.simulate(Costs.uniform(ranks, chunks, chunks, 2 * chunks))
taken = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(int(result.action_counts.sum()), result.time, taken, peak)
"""


def run(name, chunks, ranks, microbatches):
    arguments = [sys.executable, "-c", PROGRAM, name, str(chunks), str(ranks), str(microbatches)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment())
    return [float(each) for each in done.stdout.split()]


def step(name, chunks, p, m):
    """The closed forms of test_closed_forms.py, forward chunks and backward 2 chunks a rank."""
    if name == "interleaved":
        return 3 * (m * chunks + p - 1)
    return 3 * m + (p - 1) * (1 if name == "zero_bubble" else 3)


CASES = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)]


@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_hundreds_of_ranks(name, chunks):
    actions, time, _, _ = run(name, chunks, 256, 1024)
    assert actions == 256 * 1024 * (3 if name == "zero_bubble" else 2) * chunks
    assert time == step(name, chunks, 256, 1024)


@pytest.mark.long
@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_thousands_of_ranks(name, chunks, capsys):
    actions, time, taken, peak = run(name, chunks, 4096, 16384)
    with capsys.disabled():
        print(f"\n{name}: {actions:.0f} actions in {taken:.1f} s, {peak:.2f} GiB at most")
    assert time == step(name, chunks, 4096, 16384)
    assert peak < 4
