"""What the benchmarks share: sides in processes of their own, taken in turns; records; tables.

A benchmark compares sides (ours, PyTorch eager, ...). Each side runs as `python bench_x.py --side
NAME ...` in a process of its own and prints one JSON line; the sides are run in turns (ABAB), and a
figure is the median over the turns. A record says what DESIGN calls for: metric, value, unit, peer,
peer_value, ratio, limit, limit_share, config, repeats, interval, commit, hardware; `ratio` and
`limit_share` are such that more is better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments(description, metrics):
    """The command line that every benchmark has. `--side` is how it calls itself."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", metavar="METRIC", choices=metrics, help="run one metric")
    parser.add_argument("--json", metavar="FILE", help="also write the records to FILE")
    parser.add_argument(
        "--turns", type=int, help="turns of each side (default: as the metric says)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each side")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(script, side, case, threads):
    """One turn of a side: its JSON result."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), EELLM_THREADS=str(threads))
    # Set where old OpenBLAS builds need them; they would slow the libraries that are compared.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, str(script), "--side", side, "--case", json.dumps(case)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"side {side} of {script} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(script, sides, case, turns, threads):
    """ABAB: {side: [result of each turn]}."""
    results = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides:
            print(f"\r  turn {turn + 1}/{turns}: {side:24}", end="", file=sys.stderr, flush=True)
            results[side].append(run_side(script, side, case, threads))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
    return results


def median(values):
    return statistics.median(values)


def interval(values):
    """The smallest and the largest: with a few turns no narrower interval can be claimed."""
    return [min(values), max(values)]


def hardware():
    """Processor, number of CPUs, and the best instruction-set level."""
    from eellm import _core

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "model\t", "cpu family"))
    ]
    return f"{' / '.join(dict.fromkeys(names))}, {os.cpu_count()} CPUs, {_core.build_info()['isa']}"


def commit():
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def record(metric, value, unit, values, **fields):
    """One record; `values` are those of the turns."""
    empty = dict(peer=None, peer_value=None, ratio=None, limit=None, limit_share=None, config="")
    return {
        "metric": metric, "value": value, "unit": unit, **empty, **fields,
        "repeats": len(values), "interval": interval(values), "commit": commit(),
        "hardware": hardware(),
    }  # fmt: skip


def report(records, path):
    """Prints the table; writes the list to `path` if there is one."""
    if records:
        print(records[0]["hardware"])
    print(f"{'metric':36} {'value':>11} {'unit':8} {'peer':>11} {'ratio':>6} {'of limit':>8}")
    for r in records:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        share = "" if r["limit_share"] is None else f"{r['limit_share']:.2f}"
        peer = "" if r["peer_value"] is None else f"{r['peer_value']:.4g}"
        print(f"{r['metric']:36} {r['value']:11.4g} {r['unit']:8} {peer:>11} {ratio:>6} {share:>8}")
    if path:
        Path(path).write_text(json.dumps(records, indent=1) + "\n")
