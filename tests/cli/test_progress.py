"""What a run shows: a bar on a terminal, lines elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from tests.cli.common import eellm, environment


def on_a_terminal(*arguments):
    """Runs the command on a terminal of 80 columns; what it shows."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    command = [sys.executable, "-m", "eellm", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, env=environment(TERM="xterm")
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            part = os.read(outer, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(outer)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_gets_a_bar_with_losses_and_speed(corpus, tmp_path):
    shown = on_a_terminal("train", corpus / "run.toml", "-o", tmp_path / "run")
    last = [part for part in shown.split("\r") if "100%" in part][-1]
    assert "8/8" in last and "tok/s" in last and "matrix rate" in last
    assert re.search(r"loss \d\.\d\d \(\d\.\d\d\)", last)
    assert max(len(part) for part in shown.split("\r") if "%|" in part) <= 80
    assert "validation loss" in shown and "step 3/8" not in shown


def test_a_file_gets_lines(corpus, tmp_path):
    result = eellm("train", corpus / "run.toml", "-o", tmp_path / "run",
                   "--set", "train.log_interval=3")  # fmt: skip
    lines = [line.split()[1] for line in result.stderr.splitlines() if "matrix rate" in line]
    assert lines == ["3/8", "6/8", "8/8"]
    quiet = eellm("train", corpus / "run.toml", "-o", tmp_path / "quiet",
                  "--set", "output.progress=none")  # fmt: skip
    assert "matrix rate" not in quiet.stderr
    warn = eellm("train", corpus / "run.toml", "-o", tmp_path / "warn", EELLM_LOG="warn")
    assert "step" not in warn.stderr


def test_generated_text_is_coloured_on_a_terminal(trained):
    shown = on_a_terminal("generate", trained, "--prompt", "def f", "--threshold", "0",
                          "--max-new-tokens", 5)  # fmt: skip
    assert "\x1b[" in shown and "after layer 1" in shown


def test_the_core_s_levels_are_python_s(caplog):
    import logging

    from eellm.cli.logs import forward

    with caplog.at_level("DEBUG", "eellm"):
        for level in range(4):
            forward(level, "100 % of it")
    wanted = [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG]
    assert [record.levelno for record in caplog.records] == wanted
    assert caplog.messages == ["100 % of it"] * 4
