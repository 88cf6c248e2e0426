"""Jobs on two machines: network namespaces with names, addresses and a wire of their own, between
which messages go over TCP."""

import os
import shutil
import subprocess
import sys
from itertools import count

import numpy as np
import pytest

from eellm.data import TokenFileWriter
from tests.mpi.common import needs_mpi, run
from tests.mpi.test_training import SETTINGS, records, settings, train

NAMES = ("first", "second")
NUMBERS = count()
# What mpirun calls in place of ssh: options, then a machine's address, then a command.
AGENT = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
case $1 in {first_address}) space={first} name=first ;; *) space={second} name=second ;; esac
shift
exec ip netns exec $space unshare --uts bash -c "hostname $name; $*"
"""


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _obstacle():
    """Why there can be no namespaces; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "ip or unshare is missing"
    try:
        _ip("netns", "add", "eellm-try")
        _ip("netns", "delete", "eellm-try")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


OBSTACLE = _obstacle()
pytestmark = [needs_mpi, pytest.mark.skipif(OBSTACLE != "", reason=OBSTACLE)]


class Machines:
    """Two machines; `launch` runs a command of eellm on both, from the first."""

    def __init__(self, folder):
        self.spaces = [f"eellm-{os.getpid()}-{name}" for name in NAMES]
        self.addresses = ["10.213.77.1", "10.213.77.2"]
        self.hostfile, self.agent = folder / "hosts", folder / "agent"
        self.hostfile.write_text("".join(f"{each} slots=1\n" for each in self.addresses))
        names = dict(zip(NAMES, self.spaces, strict=True), first_address=self.addresses[0])
        text = AGENT
        for name, value in names.items():
            text = text.replace("{" + name + "}", value)
        self.agent.write_text(text)
        self.agent.chmod(0o700)

    def __enter__(self):
        first, second = self.spaces
        for space in self.spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "wire", "netns", first, "type", "veth",
            "peer", "name", "wire", "netns", second)  # fmt: skip
        for space, address in zip(self.spaces, self.addresses, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _ip("-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, *_):
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def command(self, start):
        """`start`, a command of one machine, as the shell of the first one runs it."""
        line = " ".join(f"'{part}'" for part in map(str, start))
        shell = ["bash", "-c", f"hostname first; exec {line}"]
        return ["ip", "netns", "exec", self.spaces[0], "unshare", "--uts", *shell]

    def launch(self, python, *arguments, **more):
        start = [python, "-m", "eellm", "launch", "--nnodes", 2, "--nproc-per-node", 1]
        start += ["--hostfile", self.hostfile, *arguments]
        return run(self.command(start), PRTE_MCA_plm_ssh_agent=str(self.agent), **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("machines")
    (path / "run.toml").write_text(SETTINGS.replace('"corpus"', f'"{path / "corpus"}"'))
    with TokenFileWriter(path / "corpus", 61) as writer:
        writer.add(np.random.default_rng(5).integers(0, 61, 30_000))
    return path


@pytest.fixture(scope="module")
def machines(folder):
    with Machines(folder) as made:
        yield made


@pytest.fixture
def on_both(machines, folder):
    """Trains on both machines, into a new folder."""

    def start(*arguments, **more):
        output = folder / f"run-{next(NUMBERS)}"
        command = ["train", folder / "run.toml", "-o", output, *arguments]
        return output.name, machines.launch(sys.executable, "--", *command, **more)

    return start


def test_the_losses_are_those_of_one_process(folder, on_both):
    ended = train(folder, "alone", 1)
    assert ended.status == 0, ended.err
    output, ended = on_both(*settings(schedule="zero_bubble"))
    assert ended.status == 0 and not ended.errors, ended.err
    assert records(folder, output) == records(folder, "alone")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_in_one_line(rank, on_both):
    _, ended = on_both(EELLM_FAULT=f"{rank}:kill:1:3")
    assert ended.status == 137
    assert ended.errors == ended.err.splitlines()
    assert len(ended.errors) == 1
    assert f"rank {rank} was ended by signal 9 (Killed)" in ended.errors[0]


def test_a_rank_that_sleeps_is_waited_for_until_the_deadline(on_both):
    _, ended = on_both(*settings(timeout=2), EELLM_FAULT="1:delay:1:1:60")
    assert ended.status == 1
    assert ended.errors == ended.err.splitlines()
    assert len(ended.errors) == 1
    assert "rank 0: no message from rank 1 within 2 s" in ended.errors[0]


def test_a_config_that_is_wrong_on_all_is_told_once_for_each_machine(on_both):
    _, ended = on_both("--set=parallel.split=[1, 1]")
    assert ended.status == 2
    assert 1 <= len(ended.errors) <= 2 and "split is invalid" in ended.errors[0]
