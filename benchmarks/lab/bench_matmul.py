"""Matrix products beside PyTorch, OpenBLAS and the machine's own limits.

    python benchmarks/lab/bench_matmul.py [--set gpt2|head|small|rows|all] [--rounds 9]

Prints one line a product: the median rate of each side over rounds in which the sides take turns,
and the ratio of medians. Training products are given in GFLOP/s beside the peak of fused
multiply-adds; products over panels in GB/s of weights beside the read bandwidth. Uses the
functions of eellm._core, or of the library that EELLM_OPS_LIBRARY names.
"""

import argparse
import ctypes as ct
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.ops.harness import Ops, available_isas, function, weight_rows

PROBE = r"""
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec; }
#ifdef __AVX512F__
typedef __m512 vec;
#define SET _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#define ADD _mm512_add_ps
#define LOAD _mm512_load_ps
#define FIRST _mm512_cvtss_f32
#else
typedef __m256 vec;
#define SET _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#define ADD _mm256_add_ps
#define LOAD _mm256_load_ps
#define FIRST _mm256_cvtss_f32
#endif
#define LANES ((long)(sizeof(vec) / 4))
static volatile float sink;
struct job { long rounds; const float *data; };
static void *flops(void *arg) {
    struct job *job = arg; vec s[12], a = SET(1.0f), b = SET(1e-9f);
    for (int i = 0; i < 12; i++) s[i] = SET((float)i);
    for (long r = 0; r < job->rounds; r++)
        for (int i = 0; i < 12; i++) s[i] = FMA(s[i], a, b);
    for (int i = 1; i < 12; i++) s[0] = ADD(s[0], s[i]);
    sink = FIRST(s[0]); return NULL; }
static void *reads(void *arg) {
    struct job *job = arg; vec s[4] = {SET(0), SET(0), SET(0), SET(0)};
    for (long i = 0; i < job->rounds; i += 4 * LANES)
        for (int j = 0; j < 4; j++) s[j] = ADD(s[j], LOAD(job->data + i + j * LANES));
    sink = FIRST(ADD(ADD(s[0], s[1]), ADD(s[2], s[3]))); return NULL; }
static double timed(void *(*fn)(void *), struct job *jobs, int threads) {
    pthread_t t[64]; double start = now();
    for (int i = 1; i < threads; i++) pthread_create(&t[i], NULL, fn, &jobs[i]);
    fn(&jobs[0]);
    for (int i = 1; i < threads; i++) pthread_join(t[i], NULL);
    return now() - start; }
double peak_flops(int threads) {
    struct job jobs[64]; long n = 4000000;
    for (int i = 0; i < threads; i++) jobs[i] = (struct job){n, NULL};
    return 24.0 * (double)LANES * (double)n * threads / timed(flops, jobs, threads); }
double peak_reads(int threads, const float *data, long each) {
    struct job jobs[64];
    for (int i = 0; i < threads; i++) jobs[i] = (struct job){each, data + i * each};
    return 4.0 * (double)each * threads / timed(reads, jobs, threads); }
"""


def probe():
    """A library that measures the machine's limits, or None without a compiler."""
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "probe.c", folder / "probe.so"
    source.write_text(PROBE)
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    try:
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    loaded = ct.CDLL(str(library))
    loaded.peak_flops.restype = loaded.peak_reads.restype = ct.c_double
    loaded.peak_reads.argtypes = [ct.c_int, ct.c_void_p, ct.c_long]
    return loaded


def openblas(threads):
    """cblas_sgemm of scipy_openblas32 as f(trans_a, trans_b, a, b, c, beta), or None."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None:
        return None
    library = ct.CDLL(str(Path(spec.origin).parent / "lib/libscipy_openblas.so"))
    library.scipy_openblas_set_num_threads(threads)
    f, i, p = ct.c_float, ct.c_int, ct.c_void_p
    sgemm = library.scipy_cblas_sgemm
    sgemm.argtypes = [i, i, i, i, i, i, f, p, i, p, i, f, p, i]

    def product(trans_a, trans_b, a, b, c, beta):
        m, n = c.shape
        k = a.shape[0] if trans_a else a.shape[1]
        flags = [112 if t else 111 for t in (trans_a, trans_b)]
        sgemm(101, *flags, m, n, k, 1.0, a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[1],
              beta, c.ctypes.data, n)  # fmt: skip

    return product


def turns(sides, rounds, least=0.02):
    """Median seconds a call of each side; the sides take turns, each after a pause in which the
    waiting threads of the others fall asleep."""
    times = {name: [] for name in sides}
    repeats = {}
    for name, call in sides.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(least / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in sides.items():
            time.sleep(0.004)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def bound(ops, name, *arguments):
    """A call of one operation without the work of the harness at each call."""
    prepared = [ops._argument(value) for value in arguments]
    run = function(f"ee_{name}", ct.c_int, ct.c_void_p, *(kind for kind, _, _ in prepared))
    values = [value for _, value, _ in prepared]
    context = ops._context

    def call():
        run(context, *values)

    call.keep = prepared
    return call


def training_sides(ops, blas, kind, n, k, m):
    """The same product on each side. Gradients of inputs are written, of weights accumulated."""
    import torch

    rng = np.random.default_rng(0)
    x, w, y = (rng.random(s, np.float32) - 0.5 for s in ((n, k), (m, k), (n, m)))
    tx, tw, ty = map(torch.from_numpy, (x.copy(), w.copy(), y.copy()))
    if kind == "forward":
        sides = {
            "ours": bound(ops, "linear", y, x, weight_rows(w), None, None),
            "torch": lambda: torch.mm(tx, tw.t(), out=ty),
            "openblas": lambda: blas(False, True, x, w, y, 0.0),
        }
    elif kind == "input":
        sides = {
            "ours": bound(ops, "linear_backward_input", x, y, weight_rows(w), False),
            "torch": lambda: torch.mm(ty, tw, out=tx),
            "openblas": lambda: blas(False, False, y, w, x, 0.0),
        }
    else:
        sides = {
            "ours": bound(ops, "linear_backward_weight", w, None, y, x),
            "torch": lambda: tw.addmm_(ty.t(), tx),
            "openblas": lambda: blas(True, False, y, x, w, 1.0),
        }
    if blas is None:
        del sides["openblas"]
    return sides


def rows_sides(ops, n, k, m):
    """Enough copies of the weight that no cache holds them between calls."""
    import torch

    rng = np.random.default_rng(0)
    w = rng.random((m, k), np.float32) - 0.5
    x, y = rng.random((n, k), np.float32), np.empty((n, m), np.float32)
    copies = max(1, int(2e8 / w.nbytes))
    tx = torch.from_numpy(x.copy())
    tw = [torch.from_numpy(w.copy()) for _ in range(copies)]
    tb = [v.to(torch.bfloat16) for v in tw]
    tbx = tx.to(torch.bfloat16)
    f32 = [bound(ops, "linear", y, x, ops.packed(w), None, None) for _ in range(copies)]
    b16 = [bound(ops, "linear", y, x, ops.packed(w, "bfloat16"), None, None) for _ in range(copies)]

    def all_of(calls):
        return lambda: [call() for call in calls]

    return copies, {
        "ours": all_of(f32),
        "ours bf16": all_of(b16),
        "torch": lambda: [torch.nn.functional.linear(tx, v) for v in tw],
        "torch bf16": lambda: [torch.nn.functional.linear(tbx, v) for v in tb],
    }


GPT2 = [(1024, 768, 2304), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768)]
HEAD = [(256, 768, 50257), (1024, 768, 50257)]
SMALL = [(n, k, m) for n in (32, 512) for k, m in ((64, 192), (64, 64), (64, 256), (256, 64))]
ROWS = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="all", choices=["gpt2", "head", "small", "rows", "all"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=available_isas()[-1])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64, 256])
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    blas, limits = openblas(options.threads), probe()
    data = np.ones(1 << 26, np.float32)
    threads = options.threads
    sets = {"gpt2": GPT2, "head": HEAD, "small": SMALL}
    with Ops(options.isa, threads) as ops:
        for name, shapes in sets.items():
            if options.set not in (name, "all"):
                continue
            print(f"{'GFLOP/s':>8} {'N':>5} {'K':>5} {'M':>6}")
            for n, k, m in shapes:
                for kind in "forward", "input", "weight":
                    sides = training_sides(ops, blas, kind, n, k, m)
                    peak = max(limits.peak_flops(threads) for _ in range(3)) if limits else 0
                    times = turns(sides, options.rounds)
                    rates = {s: 2e-9 * n * k * m / t for s, t in times.items()}
                    line = "  ".join(f"{s} {rate:6.1f}" for s, rate in rates.items())
                    ratios = "  ".join(
                        f"/{s} {rates['ours'] / rates[s]:.2f}" for s in rates if s != "ours"
                    )
                    share = f"  /peak {rates['ours'] * 1e9 / peak:.2f}" if peak else ""
                    print(f"{kind:>8} {n:5} {k:5} {m:6}  {line}   {ratios}{share}", flush=True)
        if options.set in ("rows", "all"):
            print("GB/s of weights (of the dtype that is stored)")
            for k, m in ROWS:
                for n in options.rows:
                    copies, sides = rows_sides(ops, n, k, m)
                    each = data.size // threads
                    if limits:
                        sides["read"] = lambda each=each: limits.peak_reads(
                            threads, data.ctypes.data, each
                        )
                    times = turns(sides, options.rounds, 0.0)
                    size = 4e-9 * k * m * copies
                    rates = {
                        s: (4e-9 * data.size if s == "read" else size / (2 if "bf16" in s else 1))
                        / t
                        for s, t in times.items()
                    }
                    line = "  ".join(f"{s} {rate:5.1f}" for s, rate in rates.items())
                    print(f"{n:5} {k:5} {m:6}  {line}   /torch {rates['ours'] / rates['torch']:.2f}"
                          f"  bf16/torch bf16 {rates['ours bf16'] / rates['torch bf16']:.2f}"
                          f"  GFLOP/s {2e-9 * n * k * m * copies / times['ours']:.0f}",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
