"""set_log hands the lines of the core to a callable, whatever that does, on whatever thread."""

import ctypes
import sys
import threading

import pytest

from eellm import _core

ERROR, WARN, INFO = 0, 1, 2
# Releases the GIL, as every call of the core does.
log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)(_core._symbols()["ee_log"])


@pytest.fixture
def lines():
    found = []
    _core.set_log(lambda level, line: found.append((level, line)))
    yield found
    _core.set_log(None)


def test_a_callback_gets_the_lines(lines):
    log(WARN, b"one")
    log(ERROR, "zwei \N{GREEK SMALL LETTER GAMMA}".encode())
    log(INFO, b"below the level that is shown")
    assert lines == [(WARN, "one"), (ERROR, "zwei \N{GREEK SMALL LETTER GAMMA}")]


def test_none_restores_standard_error(lines, capfd):
    _core.set_log(None)
    log(WARN, b"one")
    assert lines == [] and capfd.readouterr().err == "eellm: warn: one\n"


def test_a_callback_that_raises_is_reported_and_dropped(monkeypatch):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append(report.exc_value))

    def broken(level, line):
        raise ZeroDivisionError(line)

    for callback, kind in ((broken, ZeroDivisionError), (lambda: None, TypeError)):
        _core.set_log(callback)
        log(WARN, b"one")
        assert isinstance(reports.pop(), kind) and not reports
    _core.set_log(None)


def test_a_callback_may_replace_itself():
    found = []

    def callback(level, line):
        _core.set_log(None)
        found.append(line)

    _core.set_log(callback)
    references = sys.getrefcount(callback)
    log(WARN, b"one")
    assert found == ["one"] and sys.getrefcount(callback) == references - 1


def test_bytes_that_are_no_text(lines):
    log(WARN, b"a\xff\xc3")
    assert lines == [(WARN, "a\ufffd\ufffd")]


def test_threads_log_at_a_time(lines):
    def run():
        for _ in range(100):
            log(WARN, b"line")

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert lines == [(WARN, "line")] * 400


def test_what_is_no_callable_is_refused(lines):
    for wrong in (3, "print"):
        with pytest.raises(TypeError, match="callback must be callable or None, got"):
            _core.set_log(wrong)
    log(WARN, b"still")
    assert lines == [(WARN, "still")]
    with pytest.raises(TypeError):
        _core.set_log()
