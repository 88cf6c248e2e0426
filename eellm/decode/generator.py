"""A model made ready to generate many times."""

from __future__ import annotations

import collections.abc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.decode.generation import Generation, Piece
from eellm.decode.jobs import Job, Scoring, Writing, by_sequence, prepare
from eellm.decode.limits import MAX_SEQUENCES, check_engine, check_limits
from eellm.decode.pipeline import Servers, Trace, begin_job, load_rank, part_of, spread, threads_of
from eellm.decode.prompts import Prompts, Reader
from eellm.decode.settings import Settings, takes_settings

if TYPE_CHECKING:
    from eellm._core import Comm, Engine
    from eellm.config import ModelConfig
    from eellm.data.tokenizers import Tokenizer
    from eellm.model import Model

Stream = Callable[[Piece], object]
Pieces = collections.abc.Generator[Piece, None, None]


class Generator:
    """A model made ready once to generate many times.

    Its weights are copied in the form that decoding wants: what happens to the model's parameters
    later changes nothing here. `Generator.from_pretrained` reads them from files without a model in
    memory. One call at a time: a generator that is in use refuses a second one.

    dtype: of the copy, "float32" or "bfloat16".
    max_sequences: texts that are written together.
    max_length: tokens of a text with its prompt; by default the model's context.
    cache_tokens: tokens that the key-value cache holds over all texts, a fixed budget of memory;
        texts wait until others have ended. By default as many as could be needed.
    tokenizer: by default the one in the model's directory.
    progress: show a bar where packing takes more than a second, on a terminal.
    ranks: spread the model over so many threads of this process, each with its own layers, which
        write with the engine "pipeline"; split: how many layers each has, by default equal shares.
        `close` ends them, as does dropping the generator.
    engine: the engine of calls that name none: "deferred", or "pipeline" with several ranks.
    """

    config: ModelConfig

    def __init__(
        self,
        model: Model,
        *,
        dtype: str = "float32",
        max_sequences: int = MAX_SEQUENCES,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        tokenizer: Tokenizer | None = None,
        progress: bool = True,
        ranks: int = 1,
        split: Sequence[int] | None = None,
        engine: str | None = None,
        trace: int = 0,
    ) -> None:
        """Packs the weights of a model in memory.

        trace: passes that each rank notes, for `traces`.
        """
        from eellm import _core
        from eellm.files import packed

        config = model.config
        self._engine_name = check_engine(config, engine, ranks)
        check_limits(config, dtype, max_sequences, max_length, cache_tokens)
        parts = [part_of(config, ranks, rank, split) for rank in range(ranks)]

        def make(rank: int, comm: Comm | None) -> Engine:
            core = model.core
            if ranks > 1:
                threads = threads_of(core.threads, ranks)
                core = _core.Model(
                    config.to_core(), threads, core.isa, weights=False, part=parts[rank]
                )
            made = _core.Engine(
                core,
                dtype=dtype,
                max_sequences=max_sequences,
                max_length=max_length or 0,
                positions=cache_tokens or 0,
                empty=True,
                comm=comm,
                trace=trace,
            )
            packed.load_from_model(made, model.core, progress, core)
            return made

        self._servers = spread(ranks, make) if ranks > 1 else Servers([make(0, None)])
        find = finder(model, tokenizer)
        self._begin(config, self._servers.engines[0], find, max_sequences, max_length, cache_tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        threads: int = 0,
        max_sequences: int = MAX_SEQUENCES,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        tokenizer: Tokenizer | None = None,
        revision: str | None = None,
        progress: bool = True,
        ranks: int = 1,
        split: Sequence[int] | None = None,
        engine: str | None = None,
        comm: Comm | None = None,
        trace: int = 0,
    ) -> Generator:
        """A generator from a directory, or from the Hugging Face hub by name.

        Weights go from the files straight into the form that decoding wants, on each rank its own.
        dtype None: bfloat16 where the files have it, which changes no value, else float32.
        threads 0: all that the process may use, in a job its share. comm: the ranks of a job
        (`eellm.distributed.world()`) in place of threads; this process is rank 0, the others call
        `eellm.decode.serve`.
        """
        from eellm.distributed import threads_per_rank
        from eellm.files import directory
        from eellm.files.locate import find_folder

        folder = find_folder(path, revision)
        config = directory.read_config(folder)
        size = ranks if comm is None else comm.size
        self = cls.__new__(cls)
        self._engine_name = check_engine(config, engine, size)
        check_limits(config, dtype, max_sequences, max_length, cache_tokens)
        part_of(config, size, 0, split)  # refuses a split before ranks start
        options = {
            "dtype": dtype,
            "max_sequences": max_sequences,
            "max_length": max_length or 0,
            "cache_tokens": cache_tokens or 0,
            "split": None if split is None else [int(count) for count in split],
            "trace": trace,
        }

        def make(rank: int, each: Comm) -> Engine:
            own = threads_of(threads, ranks) if comm is None else threads or threads_per_rank()
            return load_rank(folder, each, options, own, progress)[1]

        if comm is None:
            self._servers = spread(ranks, make)
        else:
            begin_job(comm, options)
            self._servers = Servers([make(0, comm)])
        find = _folder_finder(folder, tokenizer)
        self._begin(config, self._servers.engines[0], find, max_sequences, max_length, cache_tokens)
        return self

    def _begin(
        self,
        config: ModelConfig,
        engine: Engine,
        find_tokenizer: Callable[[], Tokenizer],
        max_sequences: int,
        max_length: int | None,
        cache_tokens: int | None,
    ) -> None:
        self.config, self.max_sequences = config, max_sequences
        self.max_length = max_length or config.max_position_embeddings
        self._engine, self._lock = engine, threading.Lock()
        self._reader = Reader(config.vocab_size, self.max_length, find_tokenizer, cache_tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of prompts and texts."""
        return self._reader.find_tokenizer()

    @property
    def core(self) -> Engine:
        """The native engine, for measurements: nothing else may run in it meanwhile."""
        return self._engine

    @property
    def stats(self) -> dict[str, int]:
        """What the engine has done so far: steps, layers run, bytes read, drafts, and memory."""
        return self._engine.stats

    def close(self) -> None:
        """Ends the other ranks, where there are any: no more texts can be written then."""
        self._servers.close()

    def traces(self) -> list[Trace]:
        """What each rank did, after `close`: seconds [n, 3] (start, end, when a token was decided
        or NaN), and numbers [n, 6] (sequence, rows [first, last), layers [first, last), exit that
        decided or -1)."""
        return self._servers.traces()

    @takes_settings
    def generate(self, prompts: Prompts, *, stream: Stream | None = None, **settings: Any) -> Any:
        """Continues prompts; see `eellm.generate`."""
        chosen = self._settings(settings)
        live = stream is not None
        single, texts = prepare(self.config, self._reader, prompts, chosen, live)
        results = self.finish(texts, stream)
        return results[0] if single and chosen.n == 1 else results

    @takes_settings
    def stream(self, prompts: Prompts, **settings: Any) -> Iterator[Piece]:
        """The tokens of prompts as they come; closing the iterator ends the texts."""
        _, texts = prepare(self.config, self._reader, prompts, self._settings(settings), True)
        return self._run(texts)

    def _settings(self, settings: Mapping[str, Any]) -> Settings:
        return Settings.of({"engine": self._engine_name, **settings})

    def score(self, texts: Prompts, *, add_bos: bool | None = None) -> Any:
        """What every exit thinks of one text (gives Scores) or of a list (a list of them).

        A text is one, or a list of tokens, two at least; the first is not scored. add_bos: put the
        start token before texts, as in `generate`.
        """
        single, each_text, tokenizer = self._reader.read(texts, add_bos, score=True)
        jobs = [Scoring(text) for text in each_text]
        for _ in self._run(jobs):
            pass
        results = [job.result(self.config, tokenizer and tokenizer.stream()) for job in jobs]
        return results[0] if single else results

    def finish(self, texts: Sequence[Writing], stream: Stream | None) -> list[Generation]:
        """Writes prepared texts to their end."""
        with closing(self._run(texts)) as pieces:
            for piece in pieces:
                if stream:
                    stream(piece)
        return [text.result(self.config) for text in texts]

    def _run(self, jobs: Sequence[Job]) -> Pieces:
        """Runs the engine; as many jobs as fit are under way at a time."""
        waiting = deque(jobs)
        running: dict[int, Job] = {}
        if not self._lock.acquire(blocking=False):
            from eellm._core import BusyError

            raise BusyError("the generator is in use; finish or close its other stream first")
        try:
            while waiting or running:
                if waiting and len(running) < self.max_sequences:
                    self._admit(waiting, running)
                for number, events in by_sequence(self._engine.step()):
                    job = running.get(number)
                    if job is None:
                        continue
                    stopped = job.stopped
                    yield from job.take(events)
                    if job.ended or (
                        job.stopped and not stopped and not self._engine.finish(number)
                    ):
                        del running[number]
        finally:
            # After an interruption, an error, or a closed iterator.
            for number in running:
                with suppress(ValueError):
                    self._engine.remove(number)
            self._lock.release()

    def _admit(self, waiting: deque[Job], running: dict[int, Job]) -> None:
        """Adds jobs while there is room."""
        from eellm._core import BusyError

        while waiting and len(running) < self.max_sequences:
            try:
                number = waiting[0].add(self._engine)
            except BusyError:
                # Room comes when a sequence ends, be it one that an interrupted call left behind.
                if not self._engine.active:
                    raise
                return
            running[number] = waiting.popleft()


def finder(model: Model, given: Tokenizer | None) -> Callable[[], Tokenizer]:
    """How to get the tokenizer of a model, once it is needed."""
    return lambda: model.tokenizer if given is None else given


def _folder_finder(folder: Path, given: Tokenizer | None) -> Callable[[], Tokenizer]:
    @cache
    def find() -> Tokenizer:
        from eellm.data.tokenizers import load_tokenizer

        return load_tokenizer(folder) if given is None else given

    return find
