"""Decoding by several ranks: decode.py CASE [MODEL]. Rank 0 prints JSON, and every rank reports
failures as the command line does."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import closing

import numpy as np

from eellm.decode import Generator, replay, serve
from eellm.distributed import report_failure, world

SETTINGS = (
    {"max_new_tokens": 30, "threshold": 0.3},
    {"max_new_tokens": 30, "threshold": 0.0, "n": 2, "temperature": 0.9, "seed": 3},
    {"max_new_tokens": 20, "threshold": 0.3, "full_depth_logprobs": True, "stop": "e"},
    {"max_new_tokens": 12},
)


def _told(results):
    return [
        [r.tokens.tolist(), r.exits.tolist(), r.confidences.tobytes().hex(), r.text, r.finish]
        for r in results
    ]


def texts(comm, folder):
    """What the ranks write, and what one rank writes with the engine deferred."""
    if comm.rank > 0:
        return serve(folder, comm)
    # A long prompt: its rows travel in messages of more than 64 KB.
    prompts = ["Zwölf", "naïve", "V" * 300]
    alone = Generator.from_pretrained(folder, threads=1)
    with closing(Generator.from_pretrained(folder, comm=comm)) as spread:
        comm.timeout = 2.0
        for settings in SETTINGS:
            time.sleep(2.5)  # longer than a wait may last: nobody waits for requests
            found = _told(spread.generate(prompts, **settings))
            wanted = _told(alone.generate(prompts, **settings))
            print(json.dumps([found == wanted, len(set(found[0][1]))]))
    return None


def _long_text(comm, seconds=0.02):
    engine = replay.replay_engine(comm, seconds)
    if comm.rank > 0:
        return engine.serve()
    return print(len(replay.latencies(engine, [comm.size - 1] * 400)))


def killed(comm):
    """Rank 2 dies within a request."""
    if comm.rank == 2:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
    _long_text(comm)


def asleep(comm):
    """Rank 1 hangs within a request."""
    comm.timeout = 1.0
    if comm.rank == 1:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    _long_text(comm)


def failing(comm):
    """Rank 1 cannot go on: a stage that takes longer than anybody waits."""
    comm.timeout = 1.0
    _long_text(comm, 30.0 if comm.rank == 1 else 0.01)


def latency(comm):
    """The latency of tokens over the time to their exits, less 1."""
    seconds = 0.01
    engine = replay.replay_engine(comm, seconds)
    if comm.rank > 0:
        return engine.serve()
    print(json.dumps(replay.latency_error(engine, comm.size, seconds)))
    engine.stop()
    seconds, numbers = engine.trace
    return print(json.dumps([len(numbers), bool(np.isfinite(seconds[:, 1]).all())]))


def main():
    from eellm._core import CommError

    try:
        globals()[sys.argv[1]](world(timeout=20.0), *sys.argv[2:])
    except CommError as error:
        report_failure(f"eellm: error: {error}", 1)


main()
