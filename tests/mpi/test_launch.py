"""`eellm launch`: what it starts, what it refuses, how it starts again and how it ends."""

import io
import json
import signal
import subprocess
import sys

import pytest

from eellm import distributed
from eellm.cli import launch, main
from tests.mpi.common import environment, run

# Notes how it was called, and ends with the next status of its plan.
FAKE = """\
#!{python}
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
number = len((folder / "calls").read_text().splitlines())
status = json.loads((folder / "plan").read_text())[number - 1]
if status == "sleep":
    print("ready", flush=True)
    time.sleep(60)
sys.stderr.write("-" * 74 + "\\nprterun detected a status\\n\\n" + "-" * 74 + "\\nlast words\\n")
sys.exit(status)
"""


class Fake:
    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "mpirun"
        self.path.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
        self.path.chmod(0o755)
        self.plan(0)

    def plan(self, *statuses):
        (self.folder / "plan").write_text(json.dumps(statuses))

    @property
    def calls(self):
        calls = self.folder / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Fake(tmp_path)
    monkeypatch.setattr(distributed, "find_program", lambda *_: str(fake.path))
    for name in launch.SCHEDULERS:
        monkeypatch.delenv(name, raising=False)
    return fake


def dry_run(capsys, *arguments):
    assert main(["launch", *arguments, "--dry-run", "--", "train", "run.toml"]) == 0
    return capsys.readouterr().out.split()


def refused(capsys, *arguments):
    with_command = arguments if "--" in arguments else (*arguments, "--", "train", "run.toml")
    assert main(["launch", *with_command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eellm: error: ")
    return line


def test_the_command(fake, capsys):
    words = dry_run(capsys, "-n", "4")
    assert words[:3] == [str(fake.path), "-n", "4"]
    assert words[-5:] == [sys.executable, "-m", "eellm", "train", "run.toml"]
    assert words[words.index("--bind-to") + 1] == "none"
    assert "slot:OVERSUBSCRIBE" in words
    words = dry_run(capsys, "--nproc-per-node", "3")
    assert words[1:3] == ["-n", "3"] and "ppr:3:node:OVERSUBSCRIBE" in words


def test_machines(fake, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EELLM_LOG", "info")
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\n\nnode1 slots=4\nnode2 slots=4  # the second\n")
    words = dry_run(capsys, "--nnodes", "2", "--nproc-per-node", "4", "--hostfile", str(hosts))
    assert words[1:3] == ["-n", "8"] and "ppr:4:node:OVERSUBSCRIBE" in words
    assert words[words.index("--hostfile") + 1] == str(hosts)
    handed_on = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert "EELLM_LOG" in handed_on
    words = dry_run(capsys, "-n", "8", "--nnodes", "2", "--hostfile", str(hosts))
    assert words[1:3] == ["-n", "8"] and "ppr:4:node:OVERSUBSCRIBE" in words
    assert "--map-by" not in dry_run(capsys, "-n", "6", "--hostfile", str(hosts))


CONTRADICTIONS = [
    (["-n", "0"], "-n must be at least 1, got 0"),
    (["-n", "-3"], "-n must be at least 1, got -3"),
    ([], "needs the number of ranks"),
    (["--nnodes", "2"], "needs the number of ranks"),
    (["-n", "6", "--nnodes", "2", "--nproc-per-node", "4"], "-n 6 is not --nnodes 2 x"),
    (["-n", "6", "--nproc-per-node", "4"], "no multiple of --nproc-per-node 4"),
    (["-n", "5", "--nnodes", "2"], "no multiple of --nnodes 2"),
    (["--nnodes", "0", "--nproc-per-node", "4"], "--nnodes must be at least 1"),
    (["--nnodes", "2", "--nproc-per-node", "4"], "2 machines need a --hostfile"),
    (["-n", "8", "--nproc-per-node", "4"], "2 machines need a --hostfile"),
    (["-n", "2", "--max-restarts", "-1"], "--max-restarts must be at least 0"),
    (["-n", "2", "--hostfile", "nobody"], "nobody names no machine"),
    (["-n", "2", "--hostfile", "absent"], "absent: No such file"),
    (["-n", "2", "--hostfile", "broken"], "slots must be a number"),
    (["-n", "9", "--hostfile", "two"], "two has 8 slots for 9 ranks"),
    (["--nnodes", "3", "--nproc-per-node", "1", "--hostfile", "two"], "names 2 machines, and 3"),
    (["-n", "2", "--"], "needs a command"),
    (["-n", "2", "--", "tran", "x"], "expected one of train, "),
    (["-n", "2", "--", "launch", "x"], "expected one of train, "),
]


@pytest.mark.parametrize(("arguments", "text"), CONTRADICTIONS)
def test_contradictions(fake, capsys, tmp_path, monkeypatch, arguments, text):
    (tmp_path / "nobody").write_text("# nobody\n\n   \n")
    (tmp_path / "broken").write_text("node1 slots=many\n")
    (tmp_path / "two").write_text("a slots=4\nb slots=4\n")
    monkeypatch.chdir(tmp_path)
    assert text in refused(capsys, *arguments)
    assert not (tmp_path / "calls").exists()


def test_a_number_that_is_none(fake, capsys):
    with pytest.raises(SystemExit) as error:
        main(["launch", "-n", "four", "--", "train", "x"])
    assert error.value.code == 2 and "invalid int value: 'four'" in capsys.readouterr().err


def test_without_mpirun(fake, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "find_program", lambda *_: None)
    assert "mpirun is missing; run: pip install 'eellm[mpi]'" in refused(capsys, "-n", "2")


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_the_status_is_that_of_the_job(fake, capfd, status):
    fake.plan(status)
    assert main(["launch", "-n", "2", "--", "train", "run.toml", "--set", "a=b"]) == status
    assert len(fake.calls) == 1 and fake.calls[0][-4:] == ["train", "run.toml", "--set", "a=b"]


def test_train_goes_on_from_its_checkpoint(fake, capfd):
    fake.plan(1, 137, 0)
    assert main(["launch", "-n", "2", "--max-restarts", "3", "--", "train", "run.toml"]) == 0
    first, second, third = (call[call.index("train") :] for call in fake.calls)
    assert first == ["train", "run.toml"]
    assert second == third == ["train", "run.toml", "--resume", "auto"]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("eellm")]
    assert told == [
        "eellm: the job failed with status 1; restart 1 of 3: train run.toml --resume auto",
        "eellm: the job failed with status 137; restart 2 of 3: train run.toml --resume auto",
    ]


def test_restarts_come_to_an_end(fake, capfd):
    fake.plan(1, 1, 1)
    command = ["train", "run.toml", "--resume", "none"]
    assert main(["launch", "-n", "2", "--max-restarts", "2", "--", *command]) == 1
    assert [call[-4:] for call in fake.calls] == [command] * 3


@pytest.mark.parametrize("status", [2, 130, 143])
def test_no_restart_after_a_wrong_call_or_a_signal(fake, capfd, status):
    fake.plan(status)
    assert main(["launch", "-n", "2", "--max-restarts", "2", "--", "train", "x"]) == status
    assert len(fake.calls) == 1


def test_other_commands_start_again_as_they_are(fake, capfd):
    fake.plan(1, 0)
    assert main(["launch", "-n", "2", "--max-restarts", "1", "--", "info"]) == 0
    assert fake.calls[1][-1] == "info"


def launcher(fake):
    """A program that launches with the fake mpirun."""
    return (
        "import sys; from eellm import distributed; from eellm.cli import main;"
        f"distributed.find_program = lambda *_: {str(fake.path)!r};"
        "sys.exit(main(['launch', '-n', '2', '--max-restarts', '1', '--', 'train', 'x']))"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_job(tmp_path, number, status):
    fake = Fake(tmp_path)
    fake.plan("sleep", 0)
    ended = run([sys.executable, "-c", launcher(fake)], 20, interrupt=("ready", number))
    assert ended.status == status and len(fake.calls) == 1 and ended.seconds < 15
    assert ended.err == "eellm: stopping; once more ends the ranks at once\n"


def test_a_second_signal_is_passed_on(tmp_path):
    """The first one is what ranks may take their time for."""
    fake = Fake(tmp_path)
    text = fake.path.read_text()
    late = "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('ready', flush=True))\n"
    fake.path.write_text(text.replace("status = json", late + "status = json", 1))
    fake.plan("sleep")
    program = launcher(fake)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment(), start_new_session=True, text=True,
    )  # fmt: skip
    try:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
        process.communicate()


def test_a_launcher_that_is_killed_takes_mpirun_along(tmp_path):
    fake = Fake(tmp_path)
    fake.plan("sleep")
    ended = run([sys.executable, "-c", launcher(fake)], 20, interrupt=("ready", signal.SIGKILL))
    # Standard output is at its end, which mpirun holds too: it has gone.
    assert ended.status == -signal.SIGKILL and ended.seconds < 15


# -- What mpirun says ---------------------------------------------------------------------------

RULE = "-" * 74 + "\n"


class Chunks(io.RawIOBase):
    """Standard error of a job that comes in pieces of a size."""

    def __init__(self, text, size):
        self.data, self.size = text.encode(), size

    def read1(self, limit):
        piece, self.data = self.data[: self.size], self.data[self.size :]
        return piece


def copied(text, size):
    target = io.BytesIO()
    launch.copy_messages(Chunks(text, size), target)
    return target.getvalue().decode()


@pytest.mark.parametrize("size", [1, 7, 75, 10000])
def test_frames_without_news_are_left_out(size):
    noise = RULE + "prterun detected that one or more processes exited\n  Exit code: 1\n" + RULE
    abort = RULE + "MPI_ABORT was invoked on rank 1\n" + RULE
    news = RULE + "prterun has lost communication with a remote daemon\n" + RULE
    killed = RULE + "prterun noticed that process rank 1 exited on\nsignal 9 (Killed).\n" + RULE
    four = RULE + "Primary job  terminated normally, but 1 process returned\n" + RULE
    four += RULE + "mpirun detected that one or more processes exited\n" + RULE
    assert copied(f"a\n{noise}b\n", size) == copied(f"a\n{four}b\n", size) == "a\nb\n"
    assert copied(f"step 1\rstep 2\r{noise}", size) == f"step 1\rstep 2\r{noise}"
    assert copied(f"a\n{news}{noise}{abort}b", size) == f"a\n{news}b"
    line = "eellm: error: rank 1 was ended by signal 9 (Killed), and the job with it"
    assert copied(f"a\n{killed}", size).startswith(f"a\n{line}")
    assert copied(f"a\n{killed}b", size).endswith("start it again\nb")
    assert copied(f"a\n{RULE}the end", size) == f"a\n{RULE}the end"
    assert copied("--help\n- a list\n" + "-" * 60 + "\n", size) == (
        "--help\n- a list\n" + "-" * 60 + "\n"
    )
    long = RULE + "x" * 20000 + "\n"
    assert copied(long, size) == long
