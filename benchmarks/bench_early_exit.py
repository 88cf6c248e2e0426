"""What early exits gain on real text, and what they cost.

    python benchmarks/bench_early_exit.py [--only METRIC] [--json FILE] [--turns N]

early_exit_99_agreement_vs_full decodes 200 tokens of each of 50 source files that the model has not
seen, forced from the text, at full depth and with early exits in turns. Which exits are looked at,
and their thresholds, are those with the highest speed among what reaches 99 % agreement with full
depth on one half of 20,480 other held-out tokens; agreement is reported on the other half.
speculative_vs_full_greedy lets the model write on its own after 64 tokens of each file; the text is
that of full depth to the token, or the benchmark fails. benchmarks/code_model.py says which model.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import code_model, decoding
from benchmarks.code_model import FILES, PROMPT, TOKENS
from benchmarks.common import arguments, in_turns, median, record, report

METRICS = {
    # Two standard errors above 0.99, which it is then judged to reach on the other half.
    "early_exit_99_agreement_vs_full": dict(agreement=0.992, dtype="float32"),
    "speculative_vs_full_greedy": dict(dtype="float32"),
    "speculative_replayed_0_7": {},
}
SCORED = 20480
PILOT = 10  # files on which candidates are compared
CANDIDATES = 4


class Run:
    """One way to decode: an engine of its own, and what it has done."""

    def __init__(self, core, config, dtype, **request):
        from eellm import _core

        self.engine = _core.Engine(core, dtype=dtype, max_length=config.max_position_embeddings)
        self.request = request
        self.clear()

    def clear(self):
        self.seconds, self.bytes, self.tokens, self.texts, self.exits = 0.0, 0, 0, [], []

    def decode(self, prompt, **more):
        """Decodes one text; the time counts from the first new token on."""
        engine = self.engine
        engine.add(prompt, max_new_tokens=TOKENS, **self.request, **more)
        events = [engine.step()]
        read, start = engine.stats["bytes_read"], time.perf_counter()
        while engine.active:
            events.append(engine.step())
        self.seconds += time.perf_counter() - start
        self.bytes += engine.stats["bytes_read"] - read
        self.tokens += sum(map(len, events[1:]))
        found = np.concatenate(events)
        self.texts.append(found["token"].tolist())
        self.exits += found["exit"].tolist()

    def result(self, depths):
        return dict(
            seconds=self.seconds, bytes=self.bytes, tokens=self.tokens,
            mean_depth=float(np.mean(np.asarray(depths)[self.exits])),
            distinct_4=distinct_4(self.texts), request=self.request,
        )  # fmt: skip


def distinct_4(texts):
    """Share of the sequences of four tokens in a text that occur in it once only or first."""
    grams = [[tuple(t[i : i + 4]) for i in range(len(t) - 3)] for t in texts]
    return sum(len(set(g)) for g in grams) / max(1, sum(map(len, grams)))


def prefix_agreement(texts, others):
    """Share of the tokens before two texts first differ."""
    same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(x))
            for x, y in zip(texts, others, strict=True)]  # fmt: skip
    return sum(same) / sum(map(len, texts))


class Text:
    """The model, its scores on held-out text, and the files to decode."""

    def __init__(self, threads, dtype):
        from eellm.decode import exit_depths
        from eellm.evaluation.costs import StepCosts
        from eellm.model import Model

        folder, texts = code_model.find(threads)
        self.model = Model.from_pretrained(folder, threads=threads)
        self.config, self.core, self.dtype = self.model.config, self.model.core, dtype
        self.depths = exit_depths(self.config)
        documents = [d for d in code_model.documents(folder, texts) if len(d) >= PROMPT + TOKENS]
        self.files = [d[: PROMPT + TOKENS] for d in documents[:FILES]]
        self.others = [d[PROMPT + TOKENS :] for d in documents[:FILES]] + documents[FILES:]
        self.costs = StepCosts(self.config, dtype)

    def scores(self):
        from eellm import _core
        from eellm.evaluation.scoring import cut, score

        window = self.config.max_position_embeddings
        engine = _core.Engine(self.core, dtype=self.dtype, max_sequences=4)
        return score(engine, cut([d for d in self.others if len(d) > 1], window, SCORED))

    def run(self, **request):
        return Run(self.core, self.config, self.dtype, **request)


def fastest(text, requests, forced):
    """The request that decodes the first files in the least time, each beside full depth."""
    runs = [text.run(engine="full"), *(text.run(**request) for request in requests)]
    for tokens in text.files[:PILOT]:
        for run in runs:
            run.decode(tokens[:PROMPT], **({"forced": tokens[PROMPT:]} if forced else {}))
    return requests[int(np.argmin([run.seconds for run in runs[1:]]))]


def compare(text, request, forced):
    """Full depth and the other in turns, over all files."""
    full, ours = text.run(engine="full"), text.run(**request)
    for run in (full, ours):  # warm-up
        run.decode(text.files[0][:PROMPT])
        run.clear()
    ratios = []
    for tokens in text.files:
        before = full.seconds, ours.seconds
        for run in (full, ours):
            run.decode(tokens[:PROMPT], **({"forced": tokens[PROMPT:]} if forced else {}))
        ratios.append((full.seconds - before[0]) / (ours.seconds - before[1]))
    same = prefix_agreement(ours.texts, full.texts)
    return dict(
        full=full.result(text.depths), ours=ours.result(text.depths), ratio=median(ratios),
        same=same, stats=ours.engine.stats,
    )  # fmt: skip


def side_early_exit(case, threads):
    from eellm.evaluation import thresholds

    text = Text(threads, case["dtype"])
    chosen_on, judged_on = text.scores().halves()
    found = thresholds.candidates(
        chosen_on.confidence, chosen_on.correct, text.depths,
        agreement=case["agreement"], cost=text.costs.leaving,
    )[:CANDIDATES]  # fmt: skip
    requests = [dict(engine="deferred", thresholds=list(each.thresholds)) for each in found]
    best = fastest(text, requests, forced=True)
    judged = thresholds.outcome(
        best["thresholds"], judged_on.confidence, judged_on.correct, text.depths
    )
    out = compare(text, best, forced=True)
    free = compare(text, best, forced=False)
    return dict(
        out, agreement=judged.agreement, shares=judged.shares,
        free_running=dict(same=free["same"], distinct_4=free["ours"]["distinct_4"],
                          distinct_4_full=free["full"]["distinct_4"], ratio=free["ratio"]),
    )  # fmt: skip


def side_speculative(case, threads):
    from eellm.evaluation import drafts

    text = Text(threads, case["dtype"])
    plans = drafts.plans(text.costs, text.scores(), 64)
    # The best two of each exit: lengths next to the best are much alike.
    plans = [p for p in plans if p in [q for q in plans if q.exit == p.exit][:2]][:CANDIDATES]
    requests = [
        dict(
            engine="speculative", max_deferred=plan.max_drafts,
            thresholds=[plan.threshold if e == plan.exit else 1.0 for e in range(text.costs.early)],
        )
        for plan in plans
    ]  # fmt: skip
    best = fastest(text, requests, forced=False)
    out = compare(text, best, forced=False)
    if out["same"] != 1.0:
        raise SystemExit(f"speculation changed the text: {out['same']:.4f} of it is the same")
    stats = out["stats"]
    return dict(out, accepted=stats["accepted"] / max(1, stats["drafts"]))


SIDES = {
    "early_exit": side_early_exit,
    "speculative_text": side_speculative,
    "speculative": decoding.side_speculative,
}


def on_text(metric, case, options):
    side = "early_exit" if metric.startswith("early") else "speculative_text"
    results = in_turns(__file__, [side], case, options.turns or 3, options.threads)[side]
    ratios = [r["ratio"] for r in results]
    limits = [
        r["full"]["bytes"] / r["full"]["tokens"] * r["ours"]["tokens"] / r["ours"]["bytes"]
        for r in results
    ]
    # Each turn makes its own choice by time.
    keys = ("agreement", "free_running", "accepted")
    turns = [
        {key: r[key] for key in keys if key in r}
        | {key: r["ours"][key] for key in ("request", "mean_depth", "distinct_4")}
        for r in results
    ]
    speeds = [r["ours"]["tokens"] / r["ours"]["seconds"] for r in results]
    peers = [r["full"]["tokens"] / r["full"]["seconds"] for r in results]
    return record(
        metric, median(speeds), "tok/s", speeds, peer="full depth", peer_value=median(peers),
        ratio=median(ratios), limit=median(limits),
        limit_share=median([r / b for r, b in zip(ratios, limits, strict=True)]),
        config=json.dumps(case | {"turns": turns}),
    )  # fmt: skip


def main():
    options = arguments(__doc__.splitlines()[0], list(METRICS))
    if options.side:
        print(json.dumps(SIDES[options.side](json.loads(options.case), options.threads)))
        return
    records = []
    for metric, case in METRICS.items():
        if options.only and metric != options.only:
            continue
        if metric == "speculative_replayed_0_7":
            records.append(decoding.speculative_replayed(__file__, metric, options))
        else:
            records.append(on_text(metric, case, options))
            print(records[-1]["config"])
    report(records, options.json)


if __name__ == "__main__":
    main()
