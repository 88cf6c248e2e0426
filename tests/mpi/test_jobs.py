"""Real jobs of mpirun: what arrives, and how they fail."""

import json

import pytest

from tests.mpi.common import eellm, mpirun, needs_mpi

pytestmark = needs_mpi

CHECKS = (
    "ring everyone_to_everyone order all_reduce all_gather broadcast barrier split control world"
).split()


@pytest.fixture(scope="module")
def four_ranks():
    ended = mpirun(4, "correct.py")
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(four_ranks, check):
    assert four_ranks[f"check_{check}"] == []


def test_all_checks_are_looked_at(four_ranks):
    assert sorted(four_ranks) == sorted(f"check_{check}" for check in CHECKS)


def test_messages_in_blocks_on_three_ranks():
    """What is sent like messages of more than 2 GiB."""
    ended = mpirun(3, "correct.py", "1000")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert len(found) == len(CHECKS) - 1 and not any(found.values()), found


FAILURES = {
    "asleep": (3, ["rank 1: no message from rank 0 within 1 s (tag 2",
                   "rank 2: no message from rank 1 within 1 s (tag 2"]),
    "asleep_in_collective": (2, ["rank 1: no message from rank 0 within 1 s (all-reduce"]),
    "not_received": (2, ["rank 1: the message to rank 0 was not received within 1 s (tag 7"]),
    "wrong_size": (2, ["rank 1: rank 0 sent 10 bytes where 11 are received (tag 4",
                       "rank 0: 10 bytes from rank 1: MPI_ERR_TRUNCATE: message truncated (tag 4",
                       "rank 0: 10 bytes from rank 1:"]),
    "never_comes": (2, ["rank 1: the start of MPI did not end within 3 s; a rank of the job"]),
    "aborted": (2, ["the disk of rank 1 is full"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_one_message_ends_the_job(case):
    ranks, texts = FAILURES[case]
    ended = mpirun(ranks, "failing.py", case)
    assert ended.status == 1 and ended.seconds < 15
    (line,) = ended.errors
    assert any(text in line for text in texts), line
    assert "Traceback" not in ended.err


def test_a_killed_rank_ends_the_job():
    ended = mpirun(3, "failing.py", "killed", timeout=20)
    assert ended.status == 137 and "signal 9" in ended.err
    assert "Traceback" not in ended.err


def test_a_script_that_fails_on_one_rank_ends_the_job():
    ended = mpirun(3, "failing.py", "uncaught", timeout=20)
    assert ended.status == 1 and ended.err.count("RuntimeError: out of ideas") == 1


def test_ranks_that_fail_alike_print_one_line():
    ended = eellm("launch", "-n", "4", "--max-restarts", "2", "--", "train", "missing.toml")
    assert ended.status == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("eellm: error: there is no settings file missing.toml")
