"""The folder of a run: metrics.jsonl, tensorboard/, checkpoints/ and at the end model/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm import _core
    from eellm.files.peers import Peers
    from eellm.model import Model

# What a run that was killed before its first checkpoint may have left.
_OURS = {"metrics.jsonl", "metrics.jsonl.tmp", "config.toml", "checkpoints", "tensorboard", "model"}


class RunFolder:
    """Paths and checkpoints of one run."""

    def __init__(self, path: Path, keep: int, peers: Peers):
        self.path, self._keep, self.peers = path, keep, peers
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def open(self, resume: str) -> None:
        """Creates the folder; one that is not empty is taken by resume="auto" alone."""
        self.peers.on_first(lambda: self._open(resume))

    def _open(self, resume: str) -> None:
        if resume not in ("none", "auto"):
            raise invalid("resume", "none or auto", resume)
        if self.path.exists() and not self.path.is_dir():
            raise invalid(f"the output {self.path}", "a folder", Shown("a file"), "name a folder")
        held = sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []
        strange = [name for name in held if name not in _OURS]
        if held and (resume == "none" or strange == held):
            advice = "choose another folder, remove this one"
            if strange != held:
                advice += ", or go on from its last checkpoint with resume auto"
            got = Shown(", ".join(held[:3]) + (" ..." if len(held) > 3 else ""))
            raise invalid(
                f"the output folder {self.path} is not empty", "an empty one", got, advice
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole, for the rank that asks."""
        from eellm.files import checkpoint

        return checkpoint.latest(self.checkpoints)

    def save(self, model: Model, core: _core.Trainer, step: int, state: Mapping[str, Any]) -> Path:
        """Saves a checkpoint and drops the oldest ones beyond the number to keep."""
        from eellm.files import checkpoint

        return checkpoint.save_training(
            self.checkpoints,
            step,
            model.config,
            model.core,
            core,
            state,
            self._keep,
            peers=self.peers,
        )

    def load(self, model: Model, core: _core.Trainer) -> dict[str, Any] | None:
        """Fills model and moments from the last good checkpoint; its state, None without one."""
        from eellm.files import checkpoint

        found = self.peers.on_first(lambda: str(self.last_checkpoint() or ""))
        if not found:
            return None
        return self.peers.together(
            lambda: checkpoint.load_training(found, model.config, model.core, core)
        )
