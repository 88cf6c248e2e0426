"""What this installation and this machine can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from eellm._version import __version__

if TYPE_CHECKING:
    from eellm.model import Model


def collect(measure: bool = True) -> dict[str, Any]:
    """Version, build, threads and instruction set; with `measure` bandwidth and matrix rate."""
    import numpy

    from eellm import _core

    model = _smallest_model()
    found: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        **_core.build_info(),
        "mpi": importlib.util.find_spec("eellm._mpi") is not None,
        "threads": model.core.threads,
        "isa": model.core.isa,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("EELLM_")
        },
    }
    if measure:
        threads = model.core.threads
        found["bandwidth_bytes_per_second"] = _core.measure_bandwidth(threads, 256)
        found["matrix_flops_per_second"] = _core.measure_flops(threads, model.core.isa)
    return found


def _smallest_model() -> Model:
    """A model that tells what every model would run with."""
    from eellm.config import ModelConfig
    from eellm.model import Model

    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Model.from_config(ModelConfig.llama(vocab_size=2, **sizes))


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or sys.platform


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    units = {
        "bandwidth_bytes_per_second": ("memory bandwidth", 1e9, "GB/s read"),
        "matrix_flops_per_second": ("matrix rate", 1e9, "GFLOP/s float32"),
    }
    rows = []
    for key, value in found.items():
        if key in units:
            name, scale, unit = units[key]
            rows.append((name, f"{value / scale:.1f} {unit}"))
        elif isinstance(value, dict):
            shown = " ".join(f"{name}={item}" for name, item in value.items())
            rows.append((key, shown or "none"))
        elif isinstance(value, list | tuple):
            rows.append((key, " ".join(map(str, value)) or "none"))
        else:
            rows.append((key.replace("_", " "), str(value)))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
