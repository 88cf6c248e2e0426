"""A model spread over ranks: its texts are those of the engine deferred, to the bit, whatever the
split, the exits and the company; and rank 0 goes on while later ranks still fill the cache."""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm import _core
from tests.infer import rules
from tests.infer.models import (
    CASES,
    Scratch,
    drain,
    follow,
    full_cache,
    make,
    make_config,
    random_tokens,
    run,
    same,
    thresholds_for,
)
from tests.infer.pipes import Pipe, fill_part, part_of
from tests.infer.test_engines import requests

COUNT = 20


def told(events):
    """Events without what depends on when they come: tokens, then the views of full depth."""
    events = events[np.lexsort((events["position"], events["kind"]))].copy()
    events["done"] = 0
    return events


def matches(found, wanted):
    """The events of a pipeline are those of another engine; the last one tells the end."""
    return (
        same(told(found), told(wanted))
        and not found["done"][:-1].any()
        and found["done"][-1] == wanted["done"][-1]
        and np.array_equal(np.sort(found["position"][found["kind"] == rules.TOKEN]),
                           found["position"][found["kind"] == rules.TOKEN])
    )  # fmt: skip


def serve_all(pipe, wanted):
    """The events of requests, all in flight together."""
    numbers = [pipe.engine.add(prompt, **{**r, "engine": "pipeline"}) for prompt, r in wanted]
    return drain(pipe.engine, numbers)


def alone(core, prompt, request):
    request = {**request, "engine": "deferred"}
    return run(core, prompt, request.pop("max_new_tokens"), **request)


def model(case, **changes):
    core, wide, _ = make(case, **changes)
    config = make_config(case, **changes).to_core()
    prompt = random_tokens(1, 9, config["vocab_size"])
    return config, core, prompt, thresholds_for(wide, random_tokens(2, 40, config["vocab_size"]))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_text_of_deferred(case, ranks):
    config, core, prompt, thresholds = model(case)
    wanted = [
        (prompt, {"max_new_tokens": COUNT, "thresholds": thresholds}),
        (prompt[:1], {"max_new_tokens": COUNT, "thresholds": [0.0]}),
        (prompt[:4], {"max_new_tokens": COUNT, "thresholds": thresholds, "full_depth": True,
                      "all_confidences": True}),
        (prompt, {"max_new_tokens": COUNT, "thresholds": thresholds, "temperature": 0.9, "seed": 3,
                  "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {3: 1.5}}),
        (prompt, {"max_new_tokens": COUNT}),
    ]  # fmt: skip
    with Pipe(config, core, ranks, max_sequences=len(wanted)) as pipe:
        found = serve_all(pipe, wanted)
        for (tokens, request), events in zip(wanted, found, strict=True):
            assert matches(events, alone(core, tokens, request))
        # Never left: the engine full.
        (full,) = serve_all(pipe, [(prompt, {"max_new_tokens": COUNT})])
        assert same(full, run(core, prompt, COUNT, engine="full"))
        number = pipe.engine.add(prompt, max_new_tokens=COUNT, engine="full")
        assert same(drain(pipe.engine, [number])[0], full)


@pytest.mark.parametrize("full_depth", [False, True])
@pytest.mark.parametrize("case", ["llama_heads", "gpt2_mlp", "parallel_shared"])
def test_the_rules(case, full_depth):
    """One rank step for step, and three ranks, against the rules that look at every text from
    scratch."""
    config, core, prompt, thresholds = model(case)
    request = {"max_new_tokens": COUNT, "thresholds": thresholds, "full_depth": full_depth}
    options = {"engine": "pipeline", **request}
    wanted = follow(core, config, Scratch(core, prompt), prompt, options, cache=not full_depth)
    with Pipe(config, core, 3) as pipe:
        (found,) = serve_all(pipe, [(prompt, request)])
    assert matches(found, wanted)


@pytest.mark.parametrize("bounds, earlier", [([0, 1, 4], False), ([0, 3, 4], True),
                                             ([0, 2, 4], True), ([0, 2, 4], False)])  # fmt: skip
def test_splits_and_edges(bounds, earlier):
    """Exits at the edge between two ranks on either side, and inside of ranks."""
    for case in ("llama_heads", "window", "gpt2_mlp"):
        config, core, prompt, thresholds = model(case)
        request = {"max_new_tokens": COUNT, "thresholds": thresholds, "full_depth": True}
        with Pipe(config, core, 2, bounds=bounds, earlier_edge=earlier) as pipe:
            (found,) = serve_all(pipe, [(prompt, request)])
        assert matches(found, alone(core, prompt, request))


@st.composite
def pipelines(draw):
    """A random model, its split, and requests."""
    seed = draw(st.integers(0, 10**6))
    core, config = make(seed)[0], make_config(seed).to_core()
    layers, exits = config["num_layers"], len(config["exits"])
    cuts = draw(st.sets(st.integers(1, layers - 1), max_size=3)) if layers > 1 else set()
    each = requests(exits, config["vocab_size"], config["max_positions"])
    wanted = draw(st.lists(each, min_size=1, max_size=4))
    return config, core, [0, *sorted(cuts), layers], draw(st.booleans()), wanted


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.booleans())
def test_random_models_splits_and_requests(pipeline, bfloat16):
    config, core, bounds, earlier, wanted = pipeline
    if len(bounds) == 2:
        return
    dtype = "bfloat16" if bfloat16 else "float32"
    options = {"bounds": bounds, "earlier_edge": earlier, "dtype": dtype}
    with Pipe(config, core, len(bounds) - 1, max_sequences=len(wanted), **options) as pipe:
        found = serve_all(pipe, wanted)
    for (prompt, request), events in zip(wanted, found, strict=True):
        assert matches(events, alone(core, prompt, {**request, "dtype": dtype}))


def test_another_threshold_is_noticed():
    """Negative control of `matches`."""
    config, core, prompt, thresholds = model("llama_heads")
    request = {"max_new_tokens": COUNT, "thresholds": thresholds, "full_depth": True}
    with Pipe(config, core, 2) as pipe:
        (found,) = serve_all(pipe, [(prompt, request)])
    wanted = alone(core, prompt, request)
    assert matches(found, wanted)
    assert not matches(found, alone(core, prompt, {**request, "thresholds": [0.9]}))
    assert not matches(found[:-1], wanted)
    changed = wanted.copy()
    changed["exits"]["confidence"][3, np.isfinite(changed["exits"]["confidence"][3])] += 1e-7
    assert not matches(found, changed)
    one = core.parameter("model.layers.3.mlp.down_proj.weight")
    np.asarray(one)[0, 0] += 0.5
    assert not matches(found, alone(core, prompt, request))


def test_the_cache_of_every_rank():
    """Keys and values of all positions stand on every rank, also of tokens that left on the first
    rank, and of a long prompt that is read in pieces."""
    config, core, _, _ = model("window", max_position_embeddings=700)
    prompt = random_tokens(5, 600)
    with Pipe(config, core, 3, bounds=[0, 1, 2, 4], max_sequences=2) as pipe:
        number = pipe.engine.add(
            prompt, max_new_tokens=40, thresholds=[0.0], full_depth=True, engine="pipeline"
        )
        events = []
        while len(events) < 50:  # tokens and their full depth: the last passes are through
            events.extend(pipe.engine.step())
        text = [*prompt, *(e["token"] for e in events if e["kind"] == rules.TOKEN)]
        through = max(e["position"] for e in events if e["kind"] == rules.FULL_DEPTH)
        pipe.engine.remove(number)
        pipe.stop()
        other = _core.Engine(core, max_length=700)
        wanted = full_cache(core, text[:through], 4)
        assert other.active == 0
        assert through > 600 and all(len(k) == through for k, _ in wanted)


def test_prompts_in_pieces():
    """A long prompt among short ones."""
    config, core, _, thresholds = model("window", max_position_embeddings=1200)
    wanted = [
        (random_tokens(seed, n), {"max_new_tokens": 12, "thresholds": thresholds})
        for seed, n in enumerate((1, 255, 256, 257, 513, 1100, 2))
    ]
    with Pipe(config, core, 3, max_sequences=len(wanted)) as pipe:
        found = serve_all(pipe, wanted)
    for (tokens, request), events in zip(wanted, found, strict=True):
        assert matches(events, alone(core, tokens, request))


def test_places_are_used_again():
    """Many requests through few places: a sequence that has ended frees its cache on all ranks."""
    config, core, prompt, thresholds = model("llama_heads")
    wanted = [
        (random_tokens(seed, 1 + seed % 11),
         {"max_new_tokens": 3 + seed % 9, "thresholds": thresholds, "stop_tokens": [1, 5, 9],
          "full_depth": seed % 3 == 0})
        for seed in range(40)
    ]  # fmt: skip
    with Pipe(config, core, 3, max_sequences=3, positions=256) as pipe:
        engine, waiting, numbers, events = pipe.engine, list(wanted), [], []
        while waiting or engine.active:
            try:
                while waiting:
                    prompt, request = waiting[0]
                    numbers.append(engine.add(prompt, engine="pipeline", **request))
                    waiting.pop(0)
            except _core.BusyError:
                pass
            events.append(engine.step())
        found = drain(engine, numbers, events)
    for (tokens, request), each in zip(wanted, found, strict=True):
        assert matches(each, alone(core, tokens, request))


def test_finish_and_remove():
    config, core, prompt, _ = model("llama_heads")
    request = {"max_new_tokens": 60, "thresholds": [0.0], "engine": "pipeline"}
    with Pipe(config, core, 4, max_sequences=3) as pipe:
        engine = pipe.engine
        whole = alone(core, prompt, request)
        for steps in (1, 2, 5, 9):
            looked = engine.add(prompt, **request, full_depth=True)
            plain = engine.add(prompt, **request)
            events = [engine.step() for _ in range(2 * steps)]
            rows = engine.finish(looked)
            assert engine.finish(plain) == 0
            while engine.active:
                events.append(engine.step())
            events = np.concatenate(events)
            mine = events[events["sequence"] == looked]
            tokens, views = (mine[mine["kind"] == kind] for kind in (0, 1))
            # Every token that was told has its view of full depth; nothing comes behind the end.
            assert len(tokens) == len(views) >= rows > 0
            assert mine["done"][-1] == 3 and not mine["done"][:-1].any()
            assert tokens["token"].tolist() == whole["token"][: len(tokens)].tolist()
        gone = engine.add(prompt, **request)
        engine.step()
        engine.remove(gone)
        with pytest.raises(ValueError, match="no sequence"):
            engine.remove(gone)
        # The others are not disturbed.
        (found,) = serve_all(pipe, [(prompt, request)])
        assert matches(found, whole)


def test_rank_0_goes_on_while_others_fill():
    """The trace: a token leaves on rank 0, and rank 0 runs the next one before the last rank has
    written the keys and values of the first."""
    config, core, prompt, _ = model("llama")
    replay = np.zeros(12, np.int32)
    options = {"trace": 1000, "stage_seconds": 0.02}
    with Pipe(config, core, 4, bounds=[0, 1, 2, 3, 4], earlier_edge=True, **options) as pipe:
        number = pipe.engine.add(
            prompt[:1], max_new_tokens=12, engine="pipeline", replay=replay, forced=replay
        )
        drain(pipe.engine, [number])
        pipe.stop()
        (first, own), (last, filled) = pipe.engines[0].trace, pipe.engines[3].trace
    starts = {int(row): start for (start, _, _), (_, row, *_) in zip(first, own, strict=True)}
    ends = {int(row): end for (_, end, _), (_, row, *_) in zip(last, filled, strict=True)}
    assert own[:, 5].tolist() == [0] * 12  # all left at the first exit

    # The last rank is several tokens behind: nothing waits for the pipeline to drain. One that did
    # would overlap nowhere; a machine that is busy with other things may delay a few tokens.
    def overlaps(behind):
        return sum(starts[row + behind] < ends[row] for row in range(12 - behind))

    assert overlaps(1) >= 8
    assert overlaps(3) >= 5


def test_servers_wait_for_requests_without_limit():
    config, core, prompt, thresholds = model("llama")
    request = {"max_new_tokens": 4, "thresholds": thresholds}
    with Pipe(config, core, 3, timeout=1.0) as pipe:
        for _ in range(2):
            time.sleep(1.5)
            (found,) = serve_all(pipe, [(prompt, request)])
            assert matches(found, alone(core, prompt, request))


def test_a_missing_answer_ends_the_job():
    """A rank that hangs within a request: one error that names it, on every rank."""
    config, core, prompt, _ = model("llama")
    pipe = Pipe(config, core, 3, timeout=0.5, stage_seconds=3.0)
    pipe.engine.add(prompt[:1], max_new_tokens=3, engine="pipeline")
    with pytest.raises(_core.CommError, match=r"rank 0: no message from rank 2 within 0\.5 s"):
        pipe.engine.step()
    with pytest.raises(_core.CommError, match="no message from rank 2"):
        pipe.engine.step()
    with pytest.raises(_core.CommError, match="no message from rank 2"):
        pipe.engine.add(prompt, max_new_tokens=3, engine="pipeline")
    pipe.join()
    assert sorted(pipe.errors) == [1, 2]
    assert all("no message from rank 2" in str(error) for error in pipe.errors.values())


def test_an_abort_ends_all_ranks():
    config, core, prompt, _ = model("llama")
    pipe = Pipe(config, core, 2)
    pipe.engine.add(prompt, max_new_tokens=30, engine="pipeline")
    pipe.engine.step()
    pipe.comms[0].abort("enough")
    with pytest.raises(_core.CommError, match="enough"):
        while True:
            pipe.engine.step()
    pipe.join()
    assert "enough" in str(pipe.errors[1])


def test_an_engine_that_is_dropped_ends_its_servers():
    config, core, prompt, _ = model("llama")
    pipe = Pipe(config, core, 3)
    pipe.engine.add(prompt, max_new_tokens=30, engine="pipeline")
    pipe.engine.step()
    pipe.engine = pipe.engines[0] = None
    pipe.join()
    assert not pipe.errors


def test_logits_that_are_not_finite():
    config, core, prompt, _ = model("llama")
    np.asarray(core.parameter("model.layers.3.mlp.down_proj.weight"))[0, 0] = np.nan
    with Pipe(config, core, 2, max_sequences=2) as pipe:
        bad = pipe.engine.add(prompt, max_new_tokens=5, engine="pipeline")
        good = pipe.engine.add(prompt, max_new_tokens=5, engine="pipeline", thresholds=[0.0])
        events = []
        with pytest.raises(_core.NonFiniteError, match=f"sequence {bad} at position 9, exit 2"):
            while True:
                events.append(pipe.engine.step())
        found = drain(pipe.engine, [good], events)[0]
        assert len(found) == 5 and (found["exit"] == 0).all()


def test_what_is_refused():
    config, core, prompt, _ = model("llama")
    comms = _core.comm_local(2, 5.0)
    part = _core.Model(config, 1, weights=False, part=part_of(2, 0))
    with pytest.raises(ValueError, match="part 0 of 2; give the communicator"):
        _core.Engine(part, empty=True)
    with pytest.raises(ValueError, match="part 0 of 2, the communicator is of rank 1 of 2"):
        _core.Engine(part, empty=True, comm=comms[1])
    with pytest.raises(ValueError, match="part 0 of 1, the communicator is of rank 0 of 2"):
        _core.Engine(core, comm=comms[0])
    with pytest.raises(TypeError, match="comm must be"):
        _core.Engine(core, comm=3)
    with pytest.raises(ValueError, match="stage_seconds must lie"):
        _core.Engine(part, empty=True, comm=comms[0], stage_seconds=-1.0)
    with pytest.raises(ValueError, match="a trace has"):
        _core.Engine(part, empty=True, comm=comms[0], trace=-1)
    chunks = _core.Model(config, 1, weights=False, part=(2, 2, 0, None, False, False))
    with pytest.raises(NotImplementedError, match="one chunk of layers on each rank"):
        _core.Engine(chunks, empty=True, comm=comms[0])
    engine = _core.Engine(part, empty=True, comm=comms[0])
    with pytest.raises(ValueError, match=r"has no weights for model\.embed_tokens"):
        engine.add(prompt, max_new_tokens=1, engine="pipeline")
    with pytest.raises(ValueError, match=r"layers\.3.* belongs to another rank than 0"):
        name = "model.layers.3.mlp.down_proj.weight"
        engine.load(name, np.asarray(core.parameter(name)))
    fill_part(engine, part, core)
    for other in ("deferred", "recompute", "speculative"):
        with pytest.raises(NotImplementedError, match="spread over 2 ranks"):
            engine.add(prompt, max_new_tokens=1, engine=other)
    with pytest.raises(NotImplementedError, match="spread over 2 ranks"):
        engine.score(prompt)
    with pytest.raises(ValueError, match="this is the first"):
        engine.serve()
    other = _core.Model(config, 1, weights=False, part=part_of(2, 1))
    server = _core.Engine(other, empty=True, comm=comms[1])
    with pytest.raises(ValueError, match="rank 1 has no weights for"):
        server.serve()
    fill_part(server, other, core)
    with pytest.raises(ValueError, match="rank 1 of the pipeline serves rank 0"):
        server.add(prompt, max_new_tokens=1, engine="pipeline")
    comms[0].abort("the end of the test")


def test_whole_models_take_the_engine_too():
    """One rank, with a communicator of its own or without: no row waits."""
    _, core, prompt, thresholds = model("llama_heads")
    request = {"max_new_tokens": COUNT, "thresholds": thresholds}
    engine = _core.Engine(core, comm=_core.comm_self())
    number = engine.add(prompt, engine="pipeline", **request)
    found = drain(engine, [number])[0]
    assert same(found, alone(core, prompt, request))
    assert engine.stop() is None


def test_threads_of_a_rank_change_nothing():
    config, core, prompt, thresholds = model("qk_norm")
    request = {"max_new_tokens": COUNT, "thresholds": thresholds}
    with Pipe(config, core, 2, threads=2) as pipe:
        (found,) = serve_all(pipe, [(prompt, request)])
    assert matches(found, alone(core, prompt, request))
    assert threading.active_count() < 50


def _live():
    gc.collect()
    return _core.alloc_stats()[1:]


def _use(config, core, fail_at):
    """Serves some requests, removes one half-way; the `fail_at`-th allocation fails."""
    pipe = Pipe(config, core, 3, max_sequences=3)
    _core._alloc_fail_at(fail_at)
    try:
        for round_ in range(2):
            for seed in range(3):
                pipe.engine.add(
                    random_tokens(seed, 5 + 70 * round_),
                    max_new_tokens=12,
                    engine="pipeline",
                    thresholds=[0.0],
                    full_depth=seed == 1,
                )
            for _ in range(7):
                pipe.engine.step()
            pipe.engine.remove(3 * round_)
            pipe.engine.finish(3 * round_ + 1)
            drain(pipe.engine, [3 * round_ + 1, 3 * round_ + 2])
    except (MemoryError, _core.CommError):
        return False
    finally:
        _core._alloc_fail_at(0)
        pipe.engine.stop()
        pipe.join()
    return True


def test_memory_that_runs_out():
    """Wherever it does, on whichever rank: an error on all, nothing lost, nothing hangs."""
    config, core, _, _ = model("llama_heads")
    assert _use(config, core, 0)
    before = _live()
    assert _use(config, core, 0)
    assert _live() == before
    failed = [n for n in range(1, 100) if not _use(config, core, n)]
    assert _live() == before
    assert len(failed) > 20 and _use(config, core, 0)
