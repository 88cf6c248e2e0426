"""Logits of every exit, every gradient and ten optimizer steps against PyTorch."""

import numpy as np
import pytest

from eellm import _core

torch = pytest.importorskip("torch")
from tests.parity.cases import CASES, HEADS, MODELS, B, M, T, batch, randomise  # noqa: E402
from tests.parity.reference import Reference, parameters_of  # noqa: E402


def make(model, heads, isa="", threads=2):
    config = dict(MODELS[model], exits=HEADS[heads])
    core = _core.Model(config, threads, isa)
    randomise(core)
    return config, core


def reference_loss(config, parameters, data, weights, **options):
    """Loss over both microbatches, as one batch of four sequences."""
    shape = (M * B, T)
    segments = torch.zeros(shape, dtype=torch.long)
    segments[0, 5:] = 1
    model = Reference(config, parameters)
    logits = model.logits(data["tokens"].reshape(shape), data["positions"].reshape(shape), segments)
    return model.loss(logits, data["targets"], weights, **options)


def step(trainer, data, **options):
    return trainer.step(*data.values(), **options)


def error(value, exact):
    return float(np.abs(np.asarray(value, np.float64) - exact).max())


def rms(value, exact=0.0):
    return float(np.sqrt(np.mean((np.asarray(value, np.float64) - exact) ** 2)))


def check_gradients(core, trainer, plain, exact):
    """Each gradient's root mean square error against float64 is at most twice that of PyTorch in
    float32. The floor is one rounding of the largest gradient of the same layer: some gradients
    (a key's bias) are sums of such terms that cancel to nothing but rounding."""
    scale = {}
    for row in core.table:
        key = row["layer"], row["exit"]
        scale[key] = max(scale.get(key, 0.0), np.abs(exact[row["name"]]).max())
    for row in core.table:
        name = row["name"]
        limit = 2 * rms(plain[name], exact[name]) + 2.0**-23 * scale[row["layer"], row["exit"]]
        assert rms(trainer.gradient(name), exact[name]) <= limit, name


def bound(torch32, exact):
    """Twice PyTorch's own float32 error, and a rounding of the largest value: single elements of
    the reference may happen to be exact."""
    exact = np.asarray(exact, np.float64)
    return 2 * error(torch32, exact) + 4 * 2.0**-24 * max(np.abs(exact).max(), 1e-3)


@pytest.mark.parametrize("model,heads", CASES)
def test_logits_of_every_exit(model, heads):
    config, core = make(model, heads)
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], (B, T), dtype=np.int32)
    out = np.empty((len(config["exits"]) + 1, B, T, config["vocab_size"]), np.float32)
    core.forward(tokens, out)
    with torch.no_grad():
        exact = Reference(config, parameters_of(core, torch.float64)).logits(tokens)
        plain = Reference(config, parameters_of(core)).logits(tokens)
    for e in range(len(out)):
        assert error(out[e], exact[e].numpy()) <= bound(plain[e].numpy(), exact[e].numpy()), e


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model,heads", CASES)
def test_gradients(model, heads, dynamic):
    config, core = make(model, heads)
    exits = len(config["exits"])
    weights = [0.25 + 0.1 * e for e in range(exits)]
    temperature = [0.8 + 0.2 * e for e in range(exits)]
    trainer = _core.Trainer(core, rows=B * T, microbatches=M, exit_temperature=temperature,
                            dynamic_weights=dynamic)  # fmt: skip
    data = batch(config)
    result = step(trainer, data, exit_weights=weights, learning_rate=0.0, update=False)
    grads = {}
    for dtype in (torch.float32, torch.float64):
        parameters = parameters_of(core, dtype)
        total, losses = reference_loss(config, parameters, data, weights, temperature=temperature,
                                       dynamic=dynamic)  # fmt: skip
        total.backward()
        grads[dtype] = {name: p.grad.numpy() for name, p in parameters.items()}
        if dtype == torch.float64:
            np.testing.assert_allclose(result["losses"], [x.item() for x in losses], rtol=2e-6)
    assert all(np.abs(g).max() > 0 for g in grads[torch.float64].values())
    check_gradients(core, trainer, grads[torch.float32], grads[torch.float64])


@pytest.mark.parametrize("model,heads", [("llama", "mixed"), ("gpt2", "mixed")])
def test_a_wrong_weight_fails(model, heads):
    """Negative control: the comparison notices when one exit's loss weight is off by 0.1 %."""
    config, core = make(model, heads)
    weights = [0.5] * len(config["exits"])
    trainer = _core.Trainer(core, rows=B * T, microbatches=M)
    data = batch(config)
    step(trainer, data, exit_weights=[0.5005, *weights[1:]], learning_rate=0.0, update=False)
    grads = {}
    for dtype in (torch.float32, torch.float64):
        parameters = parameters_of(core, dtype)
        reference_loss(config, parameters, data, weights)[0].backward()
        grads[dtype] = {name: p.grad.numpy() for name, p in parameters.items()}
    with pytest.raises(AssertionError):
        check_gradients(core, trainer, grads[torch.float32], grads[torch.float64])


@pytest.mark.parametrize("model,heads", [("llama", "mixed"), ("gpt2", "mixed"), ("gemma", "norm")])
def test_ten_optimizer_steps(model, heads):
    config, core = make(model, heads)
    weights = [0.3] * len(config["exits"])
    # A large eps: where second moments are tiny, AdamW turns rounding into steps of full length.
    options = dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-4, weight_decay=0.1, clip=1.0)
    trainer = _core.Trainer(core, rows=B * T, microbatches=M)
    decay = {row["name"]: row["decay"] for row in core.table}
    runs = {}
    for dtype in (torch.float32, torch.float64):
        parameters = parameters_of(core, dtype)
        groups = [
            dict(params=[p for n, p in parameters.items() if decay[n] == d],
                 weight_decay=0.1 if d else 0.0)
            for d in (True, False)
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-4)
        runs[dtype] = parameters, optimizer, []
    for i in range(10):
        data = batch(config, seed=10 + i)
        result = step(trainer, data, exit_weights=weights, **options)
        assert result["updated"] and result["finite"]
        for parameters, optimizer, log in runs.values():
            optimizer.zero_grad()
            total, losses = reference_loss(config, parameters, data, weights)
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            log.append([*(x.item() for x in losses), norm.item()])
        exact, plain = runs[torch.float64][2][-1], runs[torch.float32][2][-1]
        ours = [*result["losses"], result["grad_norm"]]
        assert error(ours, exact) <= 2 * error(plain, exact) + 2e-6 * max(exact), i
    assert trainer.steps == 10
    for name, exact in runs[torch.float64][0].items():
        exact = exact.detach().numpy()
        plain = runs[torch.float32][0][name].detach().numpy()
        ours = np.asarray(core.parameter(name))
        assert rms(ours, exact) <= 2 * rms(plain, exact) + 10 * 2.0**-23 * rms(exact), name


@pytest.mark.parametrize("model,heads", [("llama", "mixed"), ("gpt2", "mixed"), ("qk_norm", "mlp"),
                                         ("parallel_shared", "block")])  # fmt: skip
def test_recomputation_changes_no_bit_and_saves_memory(model, heads):
    if model == "parallel_shared":
        heads = "norm"
    grads, memory = {}, {}
    for mode in ("none", "attention", "full"):
        config, core = make(model, heads)
        trainer = _core.Trainer(core, rows=B * T, microbatches=M, recompute=mode, schedule="gpipe")
        data = batch(config)
        weights = [0.5] * len(config["exits"])
        result = step(trainer, data, exit_weights=weights, learning_rate=0.0, update=False)
        grads[mode] = [np.array(trainer.gradient(r["name"])) for r in core.table]
        memory[mode] = trainer.memory["activations"], result["losses"]
    for mode in ("attention", "full"):
        assert memory[mode][1] == memory["none"][1]
        for a, b in zip(grads["none"], grads[mode], strict=True):
            assert np.array_equal(a, b)
    expected = {mode: activation_bytes(config, mode, slots=M) for mode in memory}
    for mode, (found, _) in memory.items():
        assert abs(found - expected[mode]) <= 64 * 12 * config["num_layers"] * (M + 1), mode


def activation_bytes(config, mode, slots):
    """What the slots hold, written out from the table of pieces in model/block.h."""
    n, width, heads = B * T, config["hidden_size"], config["num_heads"]
    kv, d = config["num_kv_heads"], config["head_dim"]
    attention = n * (heads + 2 * kv) * d + n * heads * d + n * heads + 2 * n
    if config["qk_norm"]:
        attention += n * (heads + kv) * (d + 2)
    mlp = n * config["intermediate_size"] * (1 + config["gated"]) + 2 * n
    if not config["parallel_residual"]:
        mlp += n * width
    x = n * width
    layer = {"none": x + attention + mlp, "attention": x + mlp, "full": x}[mode]
    shared = {"none": 0, "attention": attention, "full": attention + mlp}[mode]
    return 4 * (slots * (config["num_layers"] * layer + x) + shared + x)


@pytest.mark.parametrize("isa", _core.build_info()["isa_levels"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_level_and_thread_count(isa, threads):
    config, core = make("llama", "mixed", isa, threads)
    weights = [0.4] * len(config["exits"])
    trainer = _core.Trainer(core, rows=B * T, microbatches=M)
    data = batch(config)
    result = step(trainer, data, exit_weights=weights, learning_rate=0.0, update=False)
    parameters = {d: parameters_of(core, d) for d in (torch.float32, torch.float64)}
    for p in parameters.values():
        reference_loss(config, p, data, weights)[0].backward()
    assert result["finite"]
    grads = {d: {n: x.grad.numpy() for n, x in p.items()} for d, p in parameters.items()}
    check_gradients(core, trainer, grads[torch.float32], grads[torch.float64])
