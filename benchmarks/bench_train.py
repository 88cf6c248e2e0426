"""How fast is a training step, against PyTorch and against its matrix products?

    python benchmarks/bench_train.py [--only METRIC] [--json FILE] [--turns N]

The step is forward, backward, clipping and AdamW, float32. GPT-2 124M: batch 4 x 256; the tiny one:
4 layers, width 64, vocabulary 256. With exits: two, after 1/4 and 1/2 of the layers, with an own
norm and the tied output matrix, loss weight 0.3 each, on both sides.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import arguments, in_turns, median, record, report

GPT2 = dict(layers=12, width=768, heads=12, vocab=50257, context=1024, batch=4, time=256)
TINY = dict(layers=4, width=64, heads=4, vocab=256, context=64)
CLIP, LR, DECAY, EXIT_WEIGHT = 1.0, 3e-4, 0.1, 0.3

METRICS = {
    "train_gpt2_124m_of_gemm_bound": dict(GPT2, exits=0),
    "train_gpt2_124m_vs_torch_eager": dict(GPT2, exits=0),
    "train_gpt2_124m_vs_torch_compile": dict(GPT2, exits=0),
    "train_2_exits_vs_torch_compile": dict(GPT2, exits=2),
    "train_2_exits_over_their_flops": dict(GPT2, exits=2),
    "train_2_exits_memory_vs_torch": dict(GPT2, exits=2),
    "train_tiny_1x32_vs_torch_eager": dict(TINY, exits=0, batch=1, time=32),
    "train_tiny_8x64_vs_torch_eager": dict(TINY, exits=0, batch=8, time=64),
}


def exit_layers(case):
    return [case["layers"] // 4, case["layers"] // 2] if case["exits"] else []


def resident(field):
    """VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_steps(step, case):
    """Seconds of each step, after a warm-up; tiny steps are timed in groups."""
    tiny = case["width"] < 128
    for _ in range(30 if tiny else 1):
        step()
    group, count = (50, 12) if tiny else (1, 3)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(group):
            step()
        seconds.append((time.perf_counter() - start) / group)
    return seconds


def tokens_of(case):
    rng = np.random.default_rng(0)
    shape = (case["batch"], case["time"] + 1)
    return rng.integers(0, case["vocab"], shape).astype(np.int32)


# -- Our side -------------------------------------------------------------------------------------


def core_config(case):
    width, heads = case["width"], case["heads"]
    exits = [
        dict(layer=layer, before=False, branch="none", norm="own", output=-2)
        for layer in exit_layers(case)
    ]
    return dict(
        family="gpt2", vocab_size=case["vocab"], hidden_size=width, intermediate_size=4 * width,
        num_layers=case["layers"], num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
        max_positions=case["context"], norm="layernorm", norm_eps=1e-5, norm_offset=0.0,
        activation="gelu_tanh", gated=False, bias_q=True, bias_kv=True, bias_o=True, bias_up=True,
        bias_down=True, norm_bias=True, qk_norm=False, parallel_residual=False, shared_norm=False,
        tie_embeddings=True, positions="learned", rope_dims=0, rope_interleaved=False,
        rope_scale=1.0, attention_scale=(width // heads) ** -0.5, attention_softcap=0.0,
        logit_softcap=0.0, embedding_scale=1.0, embedding_dropout=0.0, attention_dropout=0.0,
        residual_dropout=0.0, exits=exits, window=[0] * case["layers"], rope_freq=[],
    )  # fmt: skip


def side_ours(case, threads):
    from eellm import _core

    before = resident("VmRSS")
    model = _core.Model(core_config(case), threads)
    model.initialize(0.02, 0)
    rows = case["batch"] * case["time"]
    trainer = _core.Trainer(model, rows=rows, microbatches=1)
    window = tokens_of(case)
    tokens = np.ascontiguousarray(window[:, :-1]).reshape(1, rows)
    targets = np.ascontiguousarray(window[:, 1:]).reshape(1, rows)
    positions = np.tile(np.arange(case["time"], dtype=np.int32), case["batch"]).reshape(1, rows)
    segments = np.arange(0, rows + 1, case["time"], dtype=np.int32)
    counts = np.array([case["batch"]], np.int32)
    ids = np.zeros((1, rows), np.uint64)
    weights = [EXIT_WEIGHT] * case["exits"]

    def step():
        trainer.step(tokens, targets, positions, ids, segments, counts, exit_weights=weights,
                     learning_rate=LR, weight_decay=DECAY, clip=CLIP)  # fmt: skip

    seconds = timed_steps(step, case)
    elements = sum(int(np.prod(row["shape"])) for row in model.table)
    return dict(seconds=seconds, flops=trainer.flops, parameters=elements,
                memory=resident("VmHWM") - before - 16 * elements)  # fmt: skip


# -- PyTorch --------------------------------------------------------------------------------------


def torch_model(case):
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, t, c = x.shape
            qkv = self.qkv(self.ln_1(x)).view(b, t, 3, self.heads, c // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
            return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            width = case["width"]
            self.wte = nn.Embedding(case["vocab"], width)
            self.wpe = nn.Embedding(case["context"], width)
            self.blocks = nn.ModuleList(Block(width, case["heads"]) for _ in range(case["layers"]))
            self.ln_f = nn.LayerNorm(width)
            self.exits = exit_layers(case)
            self.exit_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.exits)
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            loss = 0.0
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i + 1 in self.exits:
                    h = self.exit_norms[self.exits.index(i + 1)](x)
                    logits = F.linear(h, self.wte.weight)
                    loss = loss + EXIT_WEIGHT * F.cross_entropy(logits.flatten(0, 1), targets)
            logits = F.linear(self.ln_f(x), self.wte.weight)
            return loss + F.cross_entropy(logits.flatten(0, 1), targets)

    return Gpt()


def side_torch(case, threads, compile):
    import torch
    import torch._dynamo  # imported by compile and by the optimizer: not the step's memory

    torch.set_num_threads(threads)
    before = resident("VmRSS")
    model = torch_model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    window = torch.from_numpy(tokens_of(case)).long()
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:].flatten()
    run = torch.compile(model) if compile else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        run(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    seconds = timed_steps(step, case)
    elements = sum(p.numel() for p in model.parameters())
    return dict(seconds=seconds, memory=resident("VmHWM") - before - 16 * elements)


# -- The products of a step, alone ----------------------------------------------------------------


def products(case):
    """(kind, N rows, K input, M output features, how often) of a step without exits."""
    rows, width = case["batch"] * case["time"], case["width"]
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    out = []
    for kind in ("forward", "input", "weight"):
        out += [(kind, rows, k, m, case["layers"]) for k, m in shapes]
        out.append((kind, rows, width, case["vocab"], 1))
    return out


def best_seconds(run):
    run()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def side_ours_products(case, threads):
    from tests.ops.harness import Ops, available_isas, weight_rows

    with Ops(available_isas()[-1], threads) as ops:
        return dict(seconds=[our_product(ops, weight_rows, *p[:4]) for p in products(case)])


def our_product(ops, weight_rows, kind, rows, k, m):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((m, k), np.float32)
    x = rng.standard_normal((rows, k), np.float32)
    y = np.zeros((rows, m), np.float32)
    weight = weight_rows(w)
    if kind == "forward":
        return best_seconds(lambda: ops.linear(y, x, weight, None, None))
    if kind == "input":
        return best_seconds(lambda: ops.linear_backward_input(x, y, weight, False))
    return best_seconds(lambda: ops.linear_backward_weight(w, None, y, x))


def side_torch_products(case, threads):
    import torch

    torch.set_num_threads(threads)
    seconds = []
    for kind, rows, k, m, _ in products(case):
        w, x, y = torch.randn(m, k), torch.randn(rows, k), torch.zeros(rows, m)
        if kind == "forward":
            seconds.append(best_seconds(lambda w=w, x=x, y=y: torch.mm(x, w.T, out=y)))
        elif kind == "input":
            seconds.append(best_seconds(lambda w=w, x=x, y=y: torch.mm(y, w, out=x)))
        else:
            seconds.append(best_seconds(lambda w=w, x=x, y=y: w.addmm_(y.T, x)))
    return dict(seconds=seconds)


SIDES = {
    "ours": side_ours,
    "torch_eager": lambda case, threads: side_torch(case, threads, compile=False),
    "torch_compile": lambda case, threads: side_torch(case, threads, compile=True),
    "ours_products": side_ours_products,
    "torch_products": side_torch_products,
}


def step_seconds(results):
    return [median(r["seconds"]) for r in results]


def gemm_bound(metric, case, options):
    turns = options.turns or 3
    sides = ("ours", "ours_products", "torch_products")
    results = in_turns(__file__, sides, case, turns, options.threads)
    bound = 0.0
    for i, product in enumerate(products(case)):
        ours = median([r["seconds"][i] for r in results["ours_products"]])
        torch = median([r["seconds"][i] for r in results["torch_products"]])
        bound += product[4] * min(ours, torch)
    values = step_seconds(results["ours"])
    return record(metric, median(values), "s/step", values, limit=bound,
                  limit_share=bound / median(values), config=describe(case))  # fmt: skip


def against(metric, case, options, peer):
    turns = options.turns or (3 if case["width"] > 128 else 9)
    results = in_turns(__file__, ("ours", peer), case, turns, options.threads)
    values, peers = step_seconds(results["ours"]), step_seconds(results[peer])
    return record(metric, median(values), "s/step", values, peer=peer, peer_value=median(peers),
                  ratio=median(peers) / median(values), config=describe(case))  # fmt: skip


def exits_over_flops(metric, case, options):
    plain_case = dict(case, exits=0)
    turns = options.turns or 3
    pairs = []
    flops = {}
    for _ in range(turns):
        seconds = {}
        for name, c in (("plain", plain_case), ("exits", case)):
            result = in_turns(__file__, ("ours",), c, 1, options.threads)["ours"][0]
            seconds[name], flops[name] = median(result["seconds"]), result["flops"]
        pairs.append(seconds["exits"] / (seconds["plain"] * flops["exits"] / flops["plain"]))
    return record(metric, median(pairs), "ratio", pairs, ratio=1 / median(pairs),
                  config=describe(case))  # fmt: skip


def memory(metric, case, options):
    results = in_turns(__file__, ("ours", "torch_eager"), case, options.turns or 3, options.threads)
    values = [r["memory"] / 1e9 for r in results["ours"]]
    peers = [r["memory"] / 1e9 for r in results["torch_eager"]]
    return record(metric, median(values), "GB", values, peer="torch_eager",
                  peer_value=median(peers), ratio=median(peers) / median(values),
                  config=describe(case))  # fmt: skip


def describe(case):
    return json.dumps(case)


def main():
    options = arguments(__doc__.splitlines()[0], list(METRICS))
    if options.side:
        print(json.dumps(SIDES[options.side](json.loads(options.case), options.threads)))
        return
    records = []
    for metric, case in METRICS.items():
        if options.only and metric != options.only:
            continue
        if metric.endswith("gemm_bound"):
            records.append(gemm_bound(metric, case, options))
        elif metric.endswith("their_flops"):
            records.append(exits_over_flops(metric, case, options))
        elif "memory" in metric:
            records.append(memory(metric, case, options))
        else:
            peer = "torch_compile" if metric.endswith("compile") else "torch_eager"
            records.append(against(metric, case, options, peer))
    report(records, options.json)


if __name__ == "__main__":
    main()
