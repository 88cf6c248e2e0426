"""How fast is decoding, against the machine's limits and against Transformers?

    python benchmarks/bench_decode.py [--only METRIC] [--json FILE] [--turns N]

GPT-2 124M's shape with random weights, few positions, so that what is read is weights. Where a
metric sets our own speed against bandwidth or full depth, the two take turns within one process
(benchmarks/decoding.py says why); peers run in processes of their own.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import decoding
from benchmarks.common import arguments, in_turns, median, record, report
from benchmarks.decoding import GPT2, Stream, make_model, step_rate, take_turns, weight_counts

GENERATE = dict(GPT2, prompt=32, new=64)
METRICS = {
    "decode_gpt2_124m_f32_bandwidth": dict(GPT2, dtype="float32", slices=8),
    "decode_gpt2_124m_bf16_bandwidth": dict(GPT2, dtype="bfloat16", slices=8),
    "decode_f32_vs_transformers_f32": dict(GENERATE, dtype="float32"),
    "decode_bf16_vs_transformers_best": dict(GENERATE, dtype="bfloat16"),
    "decode_prefill_512_of_gemm_bound": dict(GPT2, rows=512),
    "decode_forced_exit_of_ideal": dict(GPT2, exits=[6], slices=8),
    "decode_replayed_exits_of_ideal": dict(GPT2, exits=[3, 6, 9], slices=8),
    "decode_16_rows_over_1": dict(GPT2, sequences=16, slices=8),
}
# The exits that a trained model's tokens left at, a digit a token; see the file.
PATTERN = Path(__file__).with_name("exit_pattern.json")


# -- Sides ----------------------------------------------------------------------------------------


def side_bandwidth(case, threads):
    """Decoding at full depth, and the read bandwidth before and after each slice."""
    from eellm import _core

    stream = Stream(make_model(case, threads), dtype=case["dtype"], engine="full")
    return take_turns({"ours": stream}, case["slices"], lambda: bandwidth(_core, threads))


def bandwidth(core, threads):
    return core.measure_bandwidth(threads, 256)


def side_rows(case, threads):
    """Steps of one row and of many in turns, the bandwidth between them, and the matrix rate."""
    from eellm import _core

    model = make_model(case, threads)
    streams = {
        "one": Stream(model, engine="full"),
        "many": Stream(model, case["sequences"], engine="full"),
    }
    out = take_turns(streams, case["slices"], lambda: bandwidth(_core, threads))
    return dict(out, flops=_core.measure_flops(threads, ""))


def side_exits(case, threads):
    """Full depth and early exits in turns; every token leaves at the only exit, or where
    case["replay"] says."""
    model = make_model(case, threads)
    replay = np.array(case["replay"], np.int32) if "replay" in case else None
    streams = {
        "full": Stream(model, engine="full"),
        "ours": Stream(model, replay=replay, engine="deferred", thresholds=[0.0]),
    }
    return take_turns(streams, case["slices"])


def prompt_of(case, tokens):
    return np.random.default_rng(0).integers(0, case["vocab"], tokens).astype(np.int32)


def repeated(run, warmups, repeats):
    for _ in range(warmups):
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def engine_run(case, threads, dtype, prompt, new):
    """A function that decodes `new` tokens after a prompt."""
    from eellm import _core

    model = make_model(case, threads)
    engine = _core.Engine(model.core, dtype=dtype, max_length=len(prompt) + new)

    def run():
        engine.add(prompt, max_new_tokens=new, engine="full")
        while engine.active:
            engine.step()

    run.keep = model
    return run


def side_generate(case, threads):
    prompt = prompt_of(case, case["prompt"])
    return dict(
        seconds=repeated(engine_run(case, threads, case["dtype"], prompt, case["new"]), 1, 3)
    )


def side_transformers(case, threads, dtype):
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.GPT2Config(
        vocab_size=case["vocab"], n_embd=case["width"], n_layer=case["layers"],
        n_head=case["heads"], n_positions=case["context"],
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().to(getattr(torch, dtype))
    tokens = torch.from_numpy(prompt_of(case, case["prompt"])).long()[None]

    def run():
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0,
                min_new_tokens=case["new"], max_new_tokens=case["new"],
            )  # fmt: skip

    return dict(seconds=repeated(run, 1, 3))


def side_prefill(case, threads):
    return dict(
        seconds=repeated(engine_run(case, threads, "float32", prompt_of(case, 512), 1), 1, 5)
    )


def prompt_products(case):
    """(rows, inputs, outputs, how often) of the products that a prompt needs: past its last keys
    and values only the last row matters."""
    rows, width, layers = case["rows"], case["width"], case["layers"]
    rest = [(width, width), (width, 4 * width), (4 * width, width)]
    return [
        (rows, width, 3 * width, layers),
        *((rows, k, m, layers - 1) for k, m in rest),
        *((1, k, m, 1) for k, m in rest),
        (1, width, case["vocab"], 1),
    ]


def product_seconds(case, multiply):
    """The median time of each product; multiply(x, w) returns a function that runs it."""
    rng = np.random.default_rng(0)
    seconds = []
    for rows, k, m, _ in prompt_products(case):
        x = rng.standard_normal((rows, k), np.float32)
        w = rng.standard_normal((m, k), np.float32)
        seconds.append(median(repeated(multiply(x, w), 1, 5)))
    return dict(seconds=seconds)


def side_our_products(case, threads):
    from tests.ops.harness import Ops, available_isas, weight_rows

    with Ops(available_isas()[-1], threads) as ops:

        def multiply(x, w):
            y, weight = np.zeros((len(x), len(w)), np.float32), weight_rows(w)
            return lambda: ops.linear(y, x, weight, None, None)

        return product_seconds(case, multiply)


def side_torch_products(case, threads):
    import torch

    torch.set_num_threads(threads)

    def multiply(x, w):
        x, w = torch.from_numpy(x), torch.from_numpy(w)
        y = torch.zeros(len(x), len(w))
        return lambda: torch.mm(x, w.T, out=y)

    return product_seconds(case, multiply)


SIDES = {
    "bandwidth": side_bandwidth,
    "rows": side_rows,
    "exits": side_exits,
    "generate": side_generate,
    "transformers_float32": lambda case, threads: side_transformers(case, threads, "float32"),
    "transformers_bfloat16": lambda case, threads: side_transformers(case, threads, "bfloat16"),
    "prefill": side_prefill,
    "our_products": side_our_products,
    "torch_products": side_torch_products,
    "speculative": decoding.side_speculative,
}


# -- Metrics --------------------------------------------------------------------------------------


def run(sides, case, options, turns):
    return in_turns(__file__, sides, case, options.turns or turns, options.threads)


def of_bandwidth(metric, case, options):
    turns = run(["bandwidth"], case, options, 9)["bandwidth"]
    rates = [median([step_rate(s) for s in r["ours"]]) / 1e9 for r in turns]
    limits = [median([s["limit"] for s in r["ours"]]) / 1e9 for r in turns]
    shares = [median([step_rate(s) / s["limit"] for s in r["ours"]]) for r in turns]
    return record(metric, median(rates), "GB/s", rates, limit=median(limits),
                  limit_share=median(shares), config=json.dumps(case))  # fmt: skip


def against_transformers(metric, case, options):
    peers = ["transformers_float32"]
    if metric.endswith("best"):
        peers.append("transformers_bfloat16")
    results = run(["generate", *peers], case, options, 5)
    speeds = {
        side: [case["new"] / median(r["seconds"]) for r in turns] for side, turns in results.items()
    }
    ours = speeds["generate"]
    peer = max(peers, key=lambda p: median(speeds[p]))
    return record(metric, median(ours), "tok/s", ours, peer=peer, peer_value=median(speeds[peer]),
                  ratio=median(ours) / median(speeds[peer]), config=json.dumps(case))  # fmt: skip


def of_products(metric, case, options):
    results = run(["prefill", "our_products", "torch_products"], case, options, 3)
    values = [median(r["seconds"]) for r in results["prefill"]]
    bound = 0.0
    for i, product in enumerate(prompt_products(case)):
        ours, torch = (
            median([r["seconds"][i] for r in results[side]])
            for side in ("our_products", "torch_products")
        )
        bound += product[-1] * min(ours, torch)
    return record(metric, median(values), "s", values, limit=bound,
                  limit_share=bound / median(values), config=json.dumps(case))  # fmt: skip


def many_rows(metric, case, options):
    """The limit: the larger of the time to read the weights and the time of the multiplications,
    over the time of a step of one row."""
    turns = run(["rows"], case, options, 9)["rows"]
    layer, head = weight_counts(case)
    flops = 2.0 * (case["layers"] * layer + head) * case["sequences"]
    values, limits, shares = [], [], []
    for r in turns:
        pairs = list(zip(r["many"], r["one"], strict=True))
        step = [(m["step"], o["step"]) for m, o in pairs]
        least = [max(m["bytes"] / m["steps"] / m["limit"], flops / r["flops"]) for m, _ in pairs]
        values.append(median([m / o for m, o in step]))
        limits.append(median([t / o for t, (_, o) in zip(least, step, strict=True)]))
        shares.append(median([t / m for t, (m, _) in zip(least, step, strict=True)]))
    return record(metric, median(values), "ratio", values, ratio=1 / median(values),
                  limit=median(limits), limit_share=median(shares),
                  config=json.dumps(case))  # fmt: skip


def of_ideal(metric, case, options):
    if metric == "decode_replayed_exits_of_ideal":
        case = dict(
            case, replay=[int(e) for e in "".join(json.loads(PATTERN.read_text())["exits"])]
        )
    results = run(["exits"], case, options, 5)["exits"]
    config = {k: v for k, v in case.items() if k != "replay"}
    return decoding.ideal_record(metric, results, config=json.dumps(config))


MEASURES = {
    "decode_gpt2_124m_f32_bandwidth": of_bandwidth,
    "decode_gpt2_124m_bf16_bandwidth": of_bandwidth,
    "decode_f32_vs_transformers_f32": against_transformers,
    "decode_bf16_vs_transformers_best": against_transformers,
    "decode_prefill_512_of_gemm_bound": of_products,
    "decode_forced_exit_of_ideal": of_ideal,
    "decode_replayed_exits_of_ideal": of_ideal,
    "decode_16_rows_over_1": many_rows,
}


def main():
    options = arguments(__doc__.splitlines()[0], list(METRICS))
    if options.side:
        print(json.dumps(SIDES[options.side](json.loads(options.case), options.threads)))
        return
    records = [
        MEASURES[metric](metric, case, options)
        for metric, case in METRICS.items()
        if not options.only or metric == options.only
    ]
    report(records, options.json)


if __name__ == "__main__":
    main()
