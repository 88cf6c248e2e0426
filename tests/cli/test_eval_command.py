"""eellm eval as people run it."""

import json

import pytest

from tests.cli.common import eellm, error_line


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "text.txt"
    path.write_text((corpus / "text.txt").read_text()[:6000])
    return path


def test_tables(trained, text, tmp_path):
    done = eellm("eval", trained, "--text", text, "--speed-tokens", 16, "--agreement", 0.5,
                 "--html", tmp_path / "page.html", "--png", tmp_path / "curve.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for part in ("perplexity", "threshold", "mean layers", "measured", "drafts at most", "final"):
        assert part in done.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<table") == 4


def test_json(trained, text):
    done = eellm("eval", trained, "--text", text, "--text", text, "--tokens", 300, "--window", 40,
                 "--speed-tokens", 0, "--dtype", "bfloat16", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tokens"] == 300 and told["window"] == 40 and told["dtype"] == "bfloat16"
    assert len(told["losses"]) == len(told["agreement"]) == 2 and told["agreement"][-1] == 1
    assert len(told["curve"]) == 21 and told["full_tokens_per_second"] is None
    assert told["wanted"] == 0.99


def test_what_is_refused(trained, text, tmp_path):
    assert "--text" in error_line(eellm("eval", trained), 2)
    missing = eellm("eval", trained, "--text", tmp_path / "none.txt")
    assert "none.txt" in error_line(missing, 2)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in error_line(eellm("eval", trained, "--text", tmp_path / "bytes"), 2)
    (tmp_path / "empty").write_text("")
    assert "nothing to score" in error_line(eellm("eval", trained, "--text", tmp_path / "empty"), 2)
    wrong = eellm("eval", trained, "--text", text, "--agreement", 2)
    assert "agreement" in error_line(wrong, 2)
