"""Makes tests/golden/parity.npz with PyTorch in float64, so that parity runs without PyTorch too.

    python -m tests.golden.make_golden

A change of the file means that the meaning of something changed: review it, do not just make it
anew.
"""

import numpy as np

from eellm import _core
from tests.parity.cases import FILE, GOLDEN, GOLDEN_STEPS, batch, golden_weights, randomise


def main():
    """Writes logits, losses and gradients of one batch, and the losses of ten steps."""
    import torch

    from tests.parity.reference import Reference, parameters_of
    from tests.parity.test_parity import reference_loss

    arrays = {}
    for case, config in GOLDEN.items():
        core = _core.Model(config, 1)
        randomise(core)
        parameters = parameters_of(core, torch.float64)
        weights = golden_weights(config)
        data = batch(config)
        total, losses = reference_loss(config, parameters, data, weights)
        total.backward()
        for name, p in parameters.items():
            arrays[f"{case}/gradient/{name}"] = p.grad.numpy().astype(np.float32)
        tokens = data["tokens"][0].reshape(2, -1)
        logits = Reference(config, parameters).logits(tokens)
        stack = torch.stack(logits).detach().numpy()
        arrays[f"{case}/logits"] = stack[:, :, -1].astype(np.float32)
        decay = {row["name"]: row["decay"] for row in core.table}
        groups = [
            {"params": [p for n, p in parameters.items() if decay[n]], "weight_decay": 0.1},
            {"params": [p for n, p in parameters.items() if not decay[n]], "weight_decay": 0.0},
        ]
        s = GOLDEN_STEPS
        betas = (s["beta1"], s["beta2"])
        optimizer = torch.optim.AdamW(groups, lr=s["learning_rate"], betas=betas, eps=s["eps"])
        steps = []
        for i in range(10):
            optimizer.zero_grad()
            total, losses = reference_loss(config, parameters, batch(config, 10 + i), weights)
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), s["clip"])
            optimizer.step()
            steps.append([x.item() for x in losses])
        arrays[f"{case}/steps"] = np.array(steps)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
