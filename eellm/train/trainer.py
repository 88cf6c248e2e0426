"""The training loop: batches, rates, guards, checkpoints and reports around the core's step."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from eellm.errors import invalid
from eellm.files.peers import Peers
from eellm.train import rates
from eellm.train.batches import held_out_batches, training_batches
from eellm.train.config import TrainConfig
from eellm.train.folder import RunFolder
from eellm.train.guard import Guard
from eellm.train.metrics import (
    Display,
    MetricsFile,
    ProgressKind,
    TensorBoard,
    require_tensorboard,
)
from eellm.train.signals import StopSignals
from eellm.train.tracing import Tracer

if TYPE_CHECKING:
    from eellm import _core
    from eellm.data import Batch, Batches, Dataset, Tokenizer, TokenSource
    from eellm.model import Model
    from eellm.pipeline import Schedule

log = logging.getLogger("eellm")

# Stands for a call of `stop` where a signal's number would stand.
_STOPPED = 1000

Callback = Callable[["Trainer", dict[str, Any]], None]


@functools.cache
def matrix_rate(threads: int, isa: str) -> float:
    """The machine's rate of large matrix products in FLOP/s, measured once in a process."""
    from eellm import _core

    return _core.measure_flops(threads, isa)


@dataclass(frozen=True)
class Evaluation:
    """Losses on text that is not trained on, early exits first, the final one last.

    agreement: share of tokens whose most likely next token is the final exit's. confidence and
    correct [E, tokens] where they were asked for: what thresholds are chosen from.
    """

    losses: list[float]
    agreement: list[float]
    tokens: int
    confidence: npt.NDArray[np.float32] | None = None
    correct: npt.NDArray[np.bool_] | None = None

    @property
    def perplexities(self) -> list[float]:
        """exp(loss) of each exit."""
        return [math.exp(min(loss, 700.0)) for loss in self.losses]


class Trainer:
    """Trains a model, step by step or as a whole.

    data: token ids, a token file, a dataset of windows, or `Batches`; valid likewise. output: a
    folder for checkpoints, metrics.jsonl and the trained model; without it nothing is written.
    resume: "none" wants an empty folder, "auto" goes on from its last good checkpoint. tokenizer
    is saved with the model. progress: "bar", "log", "none" or "auto" (a bar on a terminal).
    callbacks are called with the trainer and each record of `history`.

    A model that several ranks share (`Model.from_config(..., group=group)`) is trained by all of
    them together: each makes a trainer of its part with the same settings and the same data, and
    calls the same methods. The first rank writes metrics and shows progress, and callbacks run
    there alone. trace: a file for what the ranks do in steps 3 to 5, in Chrome's trace format.
    fault: see `_core.Trainer`, for tests.

    >>> trainer = eellm.Trainer(model, eellm.TrainConfig(steps=100), tokens, output="run")
    >>> trainer.train()
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        data: Batches | Dataset | TokenSource | npt.NDArray[Any],
        *,
        valid: Batches | Dataset | TokenSource | npt.NDArray[Any] | None = None,
        output: str | Path | None = None,
        resume: Literal["none", "auto"] = "none",
        tokenizer: Tokenizer | None = None,
        tensorboard: bool = False,
        progress: ProgressKind = "auto",
        callbacks: Sequence[Callback] = (),
        trace: str | Path | None = None,
        fault: tuple[str, int, int, float] | None = None,
    ):
        exits = len(model.config.exits)
        config.check_model(exits, model.config.max_position_embeddings)
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.group = model.group
        self.history: list[dict[str, Any]] = []
        self.done = 0
        self._exits = exits
        self._first = self.group is None or self.group.first
        self._progress: ProgressKind = progress if self._first else "none"
        self._tensorboard = tensorboard and self._first
        self._callbacks = list(callbacks) if self._first else []
        self._stopping = False
        self._signal = 0
        self._skipped = 0
        self._trace = None if trace is None else Path(trace)
        if tensorboard:
            require_tensorboard()
        self._guard = Guard(config.spike_threshold, config.spike_window)
        self.schedule = make_schedule(model, config)
        self._batches = training_batches(data, config, self.schedule.total)
        self._valid = None if valid is None else held_out_batches(valid, config)
        peers = Peers() if self.group is None else self.group.peers
        peers.agree("training settings", repr(config))
        self.folder = None
        if output is not None:
            self.folder = RunFolder(Path(output), config.keep_checkpoints, peers)
            self.folder.open(resume)
        self.core = self._make_core(fault)
        self._ranks = peers.size
        self._flops = sum(peers.gather(float(self.core.flops)))
        if self.folder is not None and resume == "auto":
            self._resume(self.folder)

    def _make_core(self, fault: tuple[str, int, int, float] | None) -> _core.Trainer:
        from eellm import _core

        config, group = self.config, self.group
        lists = None
        if self.schedule.custom:
            lists = [each.view(np.uint64) for each in self.schedule.lists]
        return _core.Trainer(
            self.model.core,
            rows=config.micro_batch_size * config.seq_length,
            schedule=self.schedule.spec,
            lists=lists,
            comm=None if group is None else group.pipeline,
            recompute=config.recompute,
            defer_exits=group is not None and group.config.exit_w == "deferred",
            exit_temperature=rates.per_exit(config.exit_temperature, self._exits),
            dynamic_weights=config.dynamic_exit_weights,
            fault=fault,
        )

    # -- One step ------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Takes one optimizer step and returns its record."""
        config, number = self.config, self.done
        began = time.perf_counter()
        batch = self._next_batch()
        max_loss, max_norm = self._guard.limits()
        weights = rates.exit_weights(config, self._exits, number)
        rate = rates.learning_rate(config, number)
        result = self.core.step(
            **batch.arguments(),
            exit_weights=weights,
            learning_rate=rate,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            max_loss=max_loss,
            max_grad_norm=max_norm,
            dropout_seed=config.seed,
            signal=self._signal,
        )
        self._signal = int(result["signal"])
        seconds = time.perf_counter() - began
        losses = [float(loss) for loss in result["losses"]]
        norm = float(result["grad_norm"])
        record = {
            "kind": "step",
            "step": number + 1,
            "losses": losses,
            "confidence": [float(value) for value in result["confidence"]],
            "exit_weights": weights,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": int(result["tokens"]),
            "seconds": seconds,
            "tokens_per_second": batch.tokens.size / seconds,
            "skipped": None,
        }
        if result["updated"]:
            self._guard.add(max(losses), norm)
            self._skipped = 0
        else:
            record["skipped"] = self._refuse(number + 1, losses, norm, max_loss, max_norm)
        self.done = number + 1
        self.history.append(record)
        return record

    def _next_batch(self) -> Batch:
        if self._batches.step != self.done:
            self._batches.load_state_dict({"step": self.done})
        try:
            return next(self._batches)
        except StopIteration:
            expected = f"batches for {self.config.steps} steps"
            raise invalid("the data ends too early", expected, self.done, "lower steps") from None

    def _refuse(
        self, step: int, losses: list[float], norm: float, max_loss: float, max_norm: float
    ) -> str:
        """Handles a step that the core did not take: its kind, or an exception."""
        from eellm import _core

        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        nonfinite = bool(bad) or not math.isfinite(norm)
        if nonfinite:
            name = self._exit_name(bad[0]) if bad else ""
            what = f"the loss of {name}" if bad else "the gradient norm"
            got, expected = losses[bad[0]] if bad else norm, "a finite number"
        elif max(losses) > max_loss:
            at = int(np.argmax(losses))
            what = f"the loss of {self._exit_name(at)}"
            got, expected = losses[at], f"at most {max_loss:.4g} by the last steps"
        else:
            what, got, expected = "the gradient norm", norm, f"at most {max_norm:.4g}"
        kind = "nonfinite" if nonfinite else "spike"
        self._skipped += 1
        action = self.config.on_nonfinite if nonfinite else self.config.on_spike
        if action == "stop" or self._skipped > self.config.max_skipped:
            many = f" after {self._skipped - 1} skipped steps" if self._skipped > 1 else ""
            last = None
            if self.folder is not None and self._first:
                last = self.folder.last_checkpoint()
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            text = f"step {step}: {what} is bad{many} (expected {expected}, got {got:.6g}); "
            text += f"{good}: lower learning_rate, look at the data, or set on_{kind} = skip"
            raise (_core.NonFiniteError if nonfinite else _core.Error)(text)
        return kind

    def _exit_name(self, index: int) -> str:
        if index == self._exits:
            return "the final exit"
        place = self.model.config.exits[index]
        return f"exit {index} ({place.position} layer {place.layer})"

    # -- The whole run -------------------------------------------------------------------------

    def train(self) -> list[dict[str, Any]]:
        """Trains to the last step and returns the history.

        SIGTERM saves a checkpoint and exits with status 143; Ctrl-C saves one and raises
        KeyboardInterrupt, pressed twice it aborts at once. On several ranks a signal to one of them
        stops all after the step that follows.
        """
        config = self.config
        self._stopping = False
        self._signal = 0
        metrics = tensorboard = None
        if self.folder is not None and self._first:
            metrics = MetricsFile(self.folder.metrics, self.done)
            if self._tensorboard:
                tensorboard = TensorBoard(self.folder.tensorboard)
        display = Display(self._progress, config.steps, self.done, config.log_interval)
        share = self._share() if self._progress != "none" or metrics is not None else None

        def report(record: dict[str, Any]) -> None:
            for writer in (metrics, tensorboard):
                if writer is not None:
                    writer.write(record)
            if self._first:
                display.show(record)
            for callback in self._callbacks:
                callback(self, record)

        tracer = self._make_tracer()
        try:
            with StopSignals() as signals:
                while self.done < config.steps and not self._asked_to_stop(signals):
                    if tracer is not None:
                        tracer.before_step()
                    record = self.step()
                    if tracer is not None:
                        tracer.after_step()
                    if share is not None:
                        record["matrix_share"] = share / record["seconds"]
                    report(record)
                    last = self.done == config.steps
                    if self._valid is not None and (last or _due(self.done, config.valid_interval)):
                        report(self.validate())
                    if _due(self.done, config.checkpoint_interval) and not last:
                        self.save_checkpoint()
                if self.folder is not None:
                    self._save_last(stopped=self.done < config.steps)
                signals.leave()
        finally:
            display.close()
            for writer in (metrics, tensorboard):
                if writer is not None:
                    writer.close()
        return self.history

    def stop(self) -> None:
        """Ends `train` after the present step, or with several ranks after the next; for
        callbacks."""
        self._stopping = True

    def _make_tracer(self) -> Tracer | None:
        from eellm import _core

        if self._trace is None:
            return None
        comm = _core.comm_self() if self.group is None else self.group.comm
        actions = len(self.schedule.actions(0 if self.group is None else self.group.rank))
        return Tracer(self._trace, self.core, comm, self.config.steps - self.done, actions)

    def _asked_to_stop(self, signals: StopSignals) -> bool:
        """Whether all ranks stop here; what this rank alone has been asked goes into the step."""
        asked = signals.received or (_STOPPED if self._stopping else 0)
        if self.group is None or self.group.size == 1:
            return bool(asked)
        if self._signal:  # the last step brought it to all ranks
            signals.received = self._signal if self._signal != _STOPPED else signals.received
            return True
        self._signal = asked
        return False

    def _share(self) -> float:
        """Seconds that a step's matrix products would take at the full rate of all ranks."""
        core = self.model.core
        return self._flops / self._ranks / matrix_rate(core.threads, core.isa)

    # -- Validation ----------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """The record of an evaluation on the validation data, added to the history."""
        began = time.perf_counter()
        result = self.evaluate()
        record = {
            "kind": "valid",
            "step": self.done,
            "losses": result.losses,
            "perplexities": result.perplexities,
            "agreement": result.agreement,
            "tokens": result.tokens,
            "seconds": time.perf_counter() - began,
        }
        self.history.append(record)
        return record

    def evaluate(self, data: Any = None, *, collect: bool = False) -> Evaluation:
        """Losses of every exit on `data` (default: the validation data), without dropout.

        With `collect` also the confidences and agreements of every token.
        """
        batches = self._valid if data is None else held_out_batches(data, self.config)
        if batches is None:
            raise invalid("no data to evaluate on", "valid or data", None, "pass data")
        loss_sum = np.zeros(self._exits + 1)
        agreement = np.zeros(self._exits + 1)
        tokens, confidence, correct = 0, [], []
        for step in range(batches.steps or 1):
            batch = batches.batch(step)
            result = self.core.evaluate(
                batch.tokens, batch.targets, batch.positions, batch.segments, batch.segment_counts
            )
            counted = batch.targets >= 0
            same = result["correct"][:, counted].astype(bool)
            loss_sum += result["loss_sum"]
            agreement += same.sum(axis=1)
            tokens += int(result["tokens"])
            if collect:
                confidence.append(result["confidence"][:, counted])
                correct.append(same)
        if not tokens:
            raise invalid("no tokens to evaluate", "unmasked tokens", 0, "give more text")
        return Evaluation(
            [float(value) for value in loss_sum / tokens],
            [float(value) for value in agreement / tokens],
            tokens,
            np.concatenate(confidence, axis=1) if collect else None,
            np.concatenate(correct, axis=1) if collect else None,
        )

    # -- Files ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside parameters, moments and step counts."""
        from eellm.train.config import lasting

        return {
            "skipped": self._skipped,
            "guard": self._guard.state_dict(),
            "train": lasting(self.config),
        }

    def save_checkpoint(self) -> Path | None:
        """Saves a checkpoint in the output folder; returns its path."""
        if self.folder is None:
            return None
        return self.folder.save(self.model, self.core, self.done, self.state_dict())

    def _save_last(self, stopped: bool) -> None:
        assert self.folder is not None
        path = self.save_checkpoint()
        if stopped:
            if self._first:
                log.warning("stopped at step %d; saved %s", self.done, path)
            return
        self.model.save_pretrained(self.folder.model)
        if self.tokenizer is not None and self._first:
            self.tokenizer.save(self.folder.model)

    def _resume(self, folder: RunFolder) -> None:
        from eellm.train.config import lasting

        state = folder.load(self.model, self.core)
        if state is None:
            return
        self.done = int(state["step"])
        self._skipped = int(state["skipped"])
        self._guard.load_state_dict(state["guard"])
        before, now = state["train"], lasting(self.config)
        changed = [
            f"train.{key}: {before.get(key)} -> {value}"
            for key, value in now.items()
            if before.get(key) != value
        ]
        if not self._first:
            return
        if changed:
            log.warning("resuming with changed settings: %s", ", ".join(changed))
        log.info("resuming after step %d of %d", self.done, self.config.steps)


def make_schedule(model: Model, config: TrainConfig) -> Schedule:
    """The schedule of the model's ranks; one rank alone takes microbatches one by one."""
    from eellm.pipeline import Schedule

    if model.group is None:
        return Schedule("1f1b", 1, config.microbatches)
    return model.group.schedule(model.config, config.microbatches)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
