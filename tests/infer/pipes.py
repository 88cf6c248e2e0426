"""Pipelines of threads, for tests: an engine on every rank, of one model in memory."""

import threading

import numpy as np

from eellm import _core

TIMEOUT = 20.0


def part_of(ranks, rank, bounds=None, earlier_edge=False):
    """The argument `part` of a Model."""
    given = None if bounds is None else np.asarray(bounds, np.int32)
    return (ranks, 1, rank, given, earlier_edge, False)


def fill_part(engine, part, core):
    """Loads what a rank holds from a model in memory."""
    for row in part.table:
        if row["held"]:
            engine.load(row["name"], np.asarray(core.parameter(row["name"])))


class Pipe:
    """Engines of all ranks; those behind the first serve in threads. Stops them on leaving."""

    def __init__(self, config, core, ranks, *, bounds=None, earlier_edge=False, timeout=TIMEOUT,
                 threads=1, **options):  # fmt: skip
        self.comms = _core.comm_local(ranks, timeout)
        self.engines, self.errors = [], {}
        for rank in range(ranks):
            part = _core.Model(
                config, threads, weights=False, part=part_of(ranks, rank, bounds, earlier_edge)
            )
            engine = _core.Engine(part, empty=True, comm=self.comms[rank], **options)
            if core is not None:
                fill_part(engine, part, core)
            self.engines.append(engine)
        self.engine = self.engines[0]
        self.threads = [
            threading.Thread(target=self._serve, args=(rank,), daemon=True)
            for rank in range(1, ranks)
        ]
        for thread in self.threads:
            thread.start()

    def _serve(self, rank):
        try:
            self.engines[rank].serve()
        except Exception as error:
            self.errors[rank] = error

    def stop(self):
        """Ends the servers; raises what they raised."""
        self.engine.stop()
        self.join()
        for error in self.errors.values():
            raise error

    def join(self):
        for thread in self.threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a server did not return"

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.stop()
        else:
            self.comms[0].abort("the test failed")
            self.join()
