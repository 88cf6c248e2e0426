"""Do pipelines of real processes take the time that the simulator and the planner say?

    python benchmarks/bench_pipeline.py [--only METRIC] [--json FILE] [--turns N]

Every side is a job of mpirun. Training runs on 2 ranks with a thread each; its limit is the
simulator's step at per-layer times that both ranks measure beside each other, in turns with the
steps. Replays run the real runner and MPI on 4 and 8 ranks with waits in place of compute. Turns in
which other programs took much of the machine are repeated, as long as that makes sense.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, arguments, median, record, report

BUSY = 0.15  # of a CPU, from which on others disturb a turn
SECONDS = 580  # of a job, at most
SIZES = dict(vocab=8192, width=512, layers=8, heads=8, length=256, batch=8)
EXITS = [dict(layer=2, head="norm"), dict(layer=4, head="mlp")]
# schedule, chunks, recompute, split, micro batch, exits
LAYOUTS = [
    ("1f1b", 1, "none", None, 1, True),
    ("gpipe", 1, "none", None, 1, True),
    ("interleaved", 2, "none", None, 1, True),
    ("zero_bubble", 1, "none", None, 1, True),
    ("1f1b", 1, "full", [5, 3], 2, True),
    ("1f1b", 1, "attention", None, 2, False),
]
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1))
# Waits of a chunk in the replays, half of the backward for weights; of a rank and of an exit where
# exits are replayed: these have no norm, the final head has one. Their bound knows no messages.
FORWARD, BACKWARD = 20e-3, 20e-3
LAYER, EXIT, HEAD = (20e-3, 14e-3), 5e-3, 5e-3
METRICS = (
    "pipeline_2_ranks_of_simulator", "pipeline_2_ranks_zero_bubble", "timed_replay_of_simulator",
    "exits_on_4_ranks_over_bound", "plan_time_error", "plan_bytes_error",
    "pipeline_inference_latency_error",
)  # fmt: skip


# -- Jobs -----------------------------------------------------------------------------------------


def run_job(ranks, side, case):
    """A side as a job of so many ranks: the JSON that its rank 0 prints."""
    from eellm.distributed import find_program

    command = [find_program("mpirun"), "-n", str(ranks), "--bind-to", "none"]
    command += ["--map-by", "slot:OVERSUBSCRIBE"]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command += [sys.executable, __file__, "--side", side, "--case", json.dumps(case)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", EELLM_THREADS="1")
    print(f"\r  {side} on {ranks} ranks {'':30}", end="", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise SystemExit(f"side {side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Others:
    """CPU time that programs outside the job take, as a share of one CPU; a collective."""

    def __init__(self, comm):
        self.comm, self.last = comm, None
        self()

    def __call__(self):
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        mine = float(self.comm.all_reduce(np.array([time.process_time()]))[0])
        last, self.last = self.last, (busy - mine, time.perf_counter())
        if last is None:
            return 0.0
        load = np.array([(self.last[0] - last[0]) / (self.last[1] - last[1])])
        return max(0.0, float(self.comm.all_reduce(load, "max")[0]))


def quiet_turns(comm, turns, work):
    """What `work` gave in the quietest turns."""
    others = Others(comm)
    found = []
    while sum(load < BUSY for load, _ in found) < turns and len(found) < 2 * turns:
        others()
        result = work()
        found.append((others(), result))
    found.sort(key=lambda each: each[0])
    return [dict(result, load=load) for load, result in found[:turns]]


# -- Training -------------------------------------------------------------------------------------


def model_config(exits):
    from eellm import ModelConfig

    return ModelConfig.create(
        "gpt2", vocab_size=SIZES["vocab"], hidden_size=SIZES["width"],
        num_hidden_layers=SIZES["layers"], num_attention_heads=SIZES["heads"],
        intermediate_size=4 * SIZES["width"], max_position_embeddings=SIZES["length"],
        exits=EXITS if exits else [],
    )  # fmt: skip


class Training:
    """A layout of the model, its plan and its trainer."""

    def __init__(self, comm, name, chunks, recompute, split, micro_batch, exits):
        from eellm import _core
        from eellm.pipeline import Layout, Schedule
        from eellm.pipeline.plan import Planner

        self.comm, self.micro_batch = comm, micro_batch
        self.name, self.recompute = name, recompute
        self.config = model_config(exits)
        self.layout = Layout.of(self.config, comm.size, chunks, split=split)
        self.count = SIZES["batch"] // micro_batch
        self.schedule = Schedule(name, comm.size, self.count, chunks, exits=self.layout.exit_ranks)
        self.planner = Planner(
            self.config, comm.size, seq_length=SIZES["length"], global_batch_size=SIZES["batch"],
            speeds=self.measure,
        )  # fmt: skip
        part = (comm.size, chunks, comm.rank, np.array(self.layout.bounds, np.int32), False, False)
        self.model = _core.Model(self.config.to_core(), threads=1, part=part)
        self.model.initialize(0.02, 1)
        self.trainer = _core.Trainer(
            self.model, rows=micro_batch * SIZES["length"], schedule=self.schedule.spec, comm=comm,
            recompute=recompute,
        )  # fmt: skip
        self.step()

    def measure(self, size):
        from eellm.pipeline.measure import measure

        return measure(
            self.config, seq_length=SIZES["length"], micro_batch_size=size, comm=self.comm, steps=2
        )

    def plan(self):
        """The planner's view, at speeds measured now."""
        self.planner._made.clear()
        return self.planner.price(
            self.name, self.layout, "layers", self.micro_batch, self.recompute
        )

    def step(self):
        """Seconds of a step."""
        length, rows = SIZES["length"], self.micro_batch * SIZES["length"]
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, SIZES["vocab"], (self.count, rows), dtype=np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (self.count, self.micro_batch))
        ends = np.arange(0, rows + 1, length, dtype=np.int32)
        self.comm.barrier()
        start = time.perf_counter()
        self.trainer.step(
            tokens, tokens[:, ::-1].copy(), positions, np.zeros(tokens.shape, np.uint64),
            np.tile(ends, self.count), np.full(self.count, self.micro_batch, np.int32),
            exit_weights=[0.3] * len(self.config.exits), learning_rate=1e-4, clip=1.0,
        )  # fmt: skip
        return time.perf_counter() - start

    def overlap(self, steps=3):
        """The part of the messages' time behind actions (eellm.pipeline.trace)."""
        from eellm.pipeline.trace import gather, overlap_share

        self.trainer.record(1 << 14)
        for _ in range(steps):
            self.step()
        return overlap_share(gather(self.comm, self.trainer.recorded()))

    def bytes(self):
        """What each rank has allocated."""
        mine = np.array([sum(self.trainer.memory.values())], np.int64)
        return [int(np.frombuffer(each, np.int64)[0]) for each in
                self.comm.all_gather(mine.tobytes())]  # fmt: skip


def side_train(comm, case):
    """Predicted and real seconds of a layout, in turns."""
    made = Training(comm, *case["layout"])

    def turn():
        before = made.plan()
        real = median([made.step() for _ in range(3)])
        after = made.plan()
        costs = after.simulation.costs
        split = costs.backward_input + costs.backward_weight
        return dict(
            predicted=(before.seconds + after.seconds) / 2, real=real,
            weight=float((costs.backward_weight / split).min()),
            planned=[each.total for each in after.memory], overlap=made.overlap(),
        )  # fmt: skip

    return dict(turns=quiet_turns(comm, case["turns"], turn), bytes=made.bytes())


def of_simulator(metric, name, options):
    layout = next(each for each in LAYOUTS if each[0] == name)
    # A head that leaves zero bubble its weight parts: at least a quarter of each backward.
    sizes = dict(SIZES, vocab=4096) if name == "zero_bubble" else SIZES
    case = dict(layout=layout, turns=options.turns or 5, sizes=sizes)
    found = run_job(2, "train", case)["turns"]
    shares = [turn["predicted"] / turn["real"] for turn in found]
    config = dict(sizes, layout=layout, weight_share=median([t["weight"] for t in found]),
                  others=median([t["load"] for t in found]),
                  overlap=[t["overlap"] for t in found])  # fmt: skip
    print(f"{name}, 2 ranks: {median(config['overlap']):.2f} of messages' time behind actions")
    return record(
        metric, median([t["real"] for t in found]), "s", [t["real"] for t in found],
        limit=median([t["predicted"] for t in found]), limit_share=median(shares),
        config=json.dumps(config),
    )  # fmt: skip


def plan_errors(wanted, options):
    times, sizes = {}, {}
    for layout in LAYOUTS:
        found = run_job(2, "train", dict(layout=layout, turns=options.turns or 3))
        turns, label = found["turns"], " ".join(map(str, layout))
        times[label] = median([abs(t["predicted"] / t["real"] - 1) for t in turns])
        pairs = zip(turns[0]["planned"], found["bytes"], strict=True)
        sizes[label] = max(abs(planned / real - 1) for planned, real in pairs)
    records = []
    for metric, values in (("plan_time_error", times), ("plan_bytes_error", sizes)):
        if metric in wanted:
            config = json.dumps(dict(SIZES, layouts=values))
            records.append(
                record(metric, max(values.values()), "", list(values.values()), config=config)
            )
    return records


# -- Replays --------------------------------------------------------------------------------------


def side_replay(comm, case):
    """Steps of all schedules, and what the simulator says."""
    from eellm.pipeline import Costs, Schedule
    from eellm.pipeline.replay import Times, replay
    from eellm.pipeline.trace import overlap_share

    out = {}
    for name, chunks in SCHEDULES:
        schedule = Schedule(name, comm.size, 2 * comm.size, chunks)
        costs = Costs.uniform(comm.size, chunks, chunks * FORWARD, chunks * BACKWARD)
        times = Times.of(schedule, costs, message_bytes=case["bytes"])
        traced = replay(times, comm, steps=1, warmup=1, trace=True)
        turns = quiet_turns(
            comm,
            case["turns"],
            lambda times=times: dict(found=replay(times, comm, steps=2, warmup=1)),
        )
        out[name] = dict(
            unit=chunks * (FORWARD + BACKWARD),
            simulated=times.simulate().time, steps=[t["found"].seconds for t in turns],
            overlap=overlap_share(traced.trace),
        )  # fmt: skip
    return out


def side_exits(comm, case):
    """Two early exits on the ranks at 1/4 and 1/2 depth."""
    from eellm.pipeline import Costs, Schedule
    from eellm.pipeline.costs import upper_bound
    from eellm.pipeline.replay import Times, replay

    exits, count = [comm.size // 4, comm.size // 2], 4 * comm.size
    costs = Costs.uniform(comm.size, 1, *LAYER, exits=exits, exit=(0.0, EXIT), head=(0.0, HEAD))
    times = Times.of(
        Schedule("1f1b", comm.size, count, exits=exits), costs, message_bytes=case["bytes"]
    )
    each = [EXIT * exits.count(rank) for rank in range(comm.size)]
    bound = upper_bound(count, sum(LAYER), each, head=HEAD)
    turns = quiet_turns(
        comm, case["turns"], lambda: dict(found=replay(times, comm, steps=2, warmup=1))
    )
    return dict(
        bound=bound, simulated=times.simulate().time, steps=[t["found"].seconds for t in turns]
    )


def replayed(options):
    worst, table = None, {}
    for ranks in (4, 8):
        found = run_job(ranks, "replay", dict(bytes=1 << 20, turns=options.turns or 5))
        for name, each in found.items():
            measured, unit = median(each["steps"]), each["unit"]
            row = dict(predicted=each["simulated"], measured=measured, unit=unit,
                       share=each["simulated"] / measured, overlap=each["overlap"],
                       steps=each["steps"])  # fmt: skip
            table[f"{name} {ranks}"] = row
            worst = row if worst is None or row["share"] < worst["share"] else worst
    print("steps in forward + backward of a rank's layers; share of messages' time behind actions")
    print(f"{'schedule, ranks':16} {'predicted':>10} {'measured':>10} {'share':>7} {'behind':>7}")
    for label, row in table.items():
        predicted, measured = row["predicted"] / row["unit"], row["measured"] / row["unit"]
        shares = f"{row['share']:7.3f} {row['overlap']:7.2f}"
        print(f"{label:16} {predicted:10.3f} {measured:10.3f} {shares}")
    return record(
        "timed_replay_of_simulator", worst["measured"], "s", worst["steps"],
        limit=worst["predicted"], limit_share=worst["share"], config=json.dumps(table),
    )  # fmt: skip


def exits_over_bound(options):
    found = run_job(4, "exits", dict(bytes=1 << 20, turns=options.turns or 5))
    values = [seconds / found["bound"] for seconds in found["steps"]]
    return record("exits_on_4_ranks_over_bound", median(values), "", values,
                  config=json.dumps(found))  # fmt: skip


def side_latency(comm, case):
    """The engine "pipeline", its stages replaced by waits (eellm.decode.replay)."""
    from eellm.decode.replay import latency_error, replay_engine

    engine = replay_engine(comm, case["stage"])
    if comm.rank > 0:
        engine.serve()
        return None
    errors = [latency_error(engine, comm.size, case["stage"], seed=i) for i in range(case["turns"])]
    engine.stop()
    return dict(errors=errors)


def latency(options):
    case = dict(stage=20e-3, turns=options.turns or 5)
    errors = run_job(4, "latency", case)["errors"]
    return record("pipeline_inference_latency_error", median(errors), "", errors,
                  config=json.dumps(case))  # fmt: skip


# -- All ------------------------------------------------------------------------------------------

SIDES = {"train": side_train, "replay": side_replay, "exits": side_exits, "latency": side_latency}


def main():
    options = arguments(__doc__, METRICS)
    if options.side:
        from eellm.distributed import world

        comm = world("mpi")
        case = json.loads(options.case)
        SIZES.update(case.get("sizes", {}))
        result = SIDES[options.side](comm, case)
        if comm.rank == 0:
            print(json.dumps(result))
        return
    wanted = [options.only] if options.only else list(METRICS)
    records = []
    for metric, name in ((METRICS[0], "1f1b"), (METRICS[1], "zero_bubble")):
        if metric in wanted:
            records.append(of_simulator(metric, name, options))
    for metric, run in ((METRICS[2], replayed), (METRICS[3], exits_over_bound)):
        if metric in wanted:
            records.append(run(options))
    if METRICS[4] in wanted or METRICS[5] in wanted:
        records += plan_errors(wanted, options)
    if METRICS[6] in wanted:
        records.append(latency(options))
    report(records, options.json)


if __name__ == "__main__":
    main()
