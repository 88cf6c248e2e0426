"""A model in memory: made from a config or a directory, run, inspected and saved."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.config import ExitConfig, ModelConfig
from eellm.errors import invalid
from eellm.files import directory
from eellm.files.locate import find_folder

if TYPE_CHECKING:
    from eellm import _core
    from eellm.parallel import Group

_LOSS_BYTES = 256 << 20


class Model:
    """A language model with early exits.

    `Model.from_pretrained(path)` loads one, `Model.from_config(config)` draws a new one.
    `core` is the native model; `parameters()` are views of its memory. With a group the model is
    the part of one of its ranks: it holds the parameters of its layers and exits.
    """

    def __init__(
        self,
        config: ModelConfig,
        core: "_core.Model",
        path: Path | None = None,
        group: "Group | None" = None,
    ) -> None:
        """Wraps a native model; `path` is the directory it came from."""
        self.config, self.core, self.path, self.group = config, core, path, group

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        seed: int = 0,
        threads: int = 0,
        group: "Group | None" = None,
    ) -> "Model":
        """A model with values drawn at random. threads 0: all that the process may use. group: the
        ranks that share the model; the values are the same in every layout."""
        core = _native(config, threads, group)
        core.initialize(config.initializer_range, seed)
        return cls(config, core, group=group)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        exits: Iterable[ExitConfig | Mapping[str, Any]] | None = None,
        init: str = "copy",
        seed: int = 0,
        threads: int = 0,
        strict: bool = True,
        revision: str | None = None,
        group: "Group | None" = None,
    ) -> "Model":
        """A model from a directory, or from the Hugging Face hub by name.

        exits: early exits in place of those of the directory. Their values are copies (the final
        norm, the output matrix, the MLP of their layer, the last layer for a block), or random
        with init="random". group: the ranks that share the model, each loading its part.
        """
        if init not in ("copy", "random"):
            raise invalid("init is invalid", "copy or random", init)
        folder = find_folder(path, revision)
        config = directory.read_config(folder)
        weights = directory.Weights(folder)
        if exits is not None:
            config = replace(config, exits=tuple(exits))  # type: ignore[arg-type]
        core = _native(config, threads, group)
        directory.load_parameters(core, config, weights, with_exits=exits is None, strict=strict)
        if exits is not None:
            _initialize_exits(core, config, weights, init, seed)
        return cls(config, core, folder, group)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        dtype: str = "float32",
        max_shard_bytes: int = directory.MAX_SHARD_BYTES,
    ) -> None:
        """Writes a model directory, whose backbone Transformers can load if it knows the type.

        dtype: "float32", "bfloat16" or "float16". With a group all ranks call it, and each writes
        its part.
        """
        peers = None if self.group is None else self.group.peers
        directory.save_directory(
            path, self.config, self.core, dtype, max_shard_bytes, self.path, peers
        )

    def forward(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits [E, B, T, V] of every exit, the final one last, for tokens [B, T] or [T]."""
        batch = self._tokens(tokens)
        exits = len(self.config.exits) + 1
        out = np.empty((exits, *batch.shape, self.config.vocab_size), np.float32)
        if batch.size:
            self.core.forward(batch, out)
        return out

    __call__ = forward

    def loss(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.float64]:
        """Mean cross-entropy [E] of every exit, the final one last.

        targets [B, T]: the token that should follow, -1 for none; without them the next token.
        """
        batch = self._tokens(tokens)
        if targets is None:
            wanted = np.full_like(batch, -1)
            wanted[:, :-1] = batch[:, 1:]
        else:
            wanted = self._tokens(targets, "targets", low=-1)
            if wanted.shape != batch.shape:
                raise invalid("targets has the wrong shape", str(batch.shape), wanted.shape)
        count = int((wanted >= 0).sum())
        if not count:
            raise invalid("nothing to predict", "two tokens, or a target that is not -1", 0)
        exits = len(self.config.exits) + 1
        size = exits * batch.shape[1] * self.config.vocab_size * 4
        step = max(1, _LOSS_BYTES // size)
        total = np.zeros(exits)
        for start in range(0, len(batch), step):
            rows = slice(start, start + step)
            total += _loss_sum(self.forward(batch[rows]), wanted[rows])
        return total / count

    def generate(self, prompts: Any, **kwargs: Any) -> Any:
        """Text or tokens that follow prompts; see `eellm.decode.generate`."""
        from eellm.decode import generate

        return generate(self, prompts, **kwargs)

    def parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        """Views of the parameters that the model holds; writing to them changes the model."""
        held = (row["name"] for row in self.core.table if row["held"])
        return {name: self.parameter(name) for name in held}

    def parameter(self, name: str) -> npt.NDArray[np.float32]:
        """A view of one parameter."""
        return np.asarray(self.core.parameter(name))

    @property
    def num_parameters(self) -> int:
        """Numbers that the whole model is made of; shared ones count once."""
        return sum(int(np.prod(row["shape"])) for row in self.core.table)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's directory."""
        if self.path is None:
            raise FileNotFoundError(
                "the model came from no directory and has no tokenizer; load one with "
                "eellm.data.tokenizers.load_tokenizer"
            )
        from eellm.data.tokenizers import load_tokenizer

        return load_tokenizer(self.path)

    def __repr__(self) -> str:
        """Family, sizes and exits in one line."""
        config = self.config
        exits = ", ".join(f"{each.position} {each.layer}" for each in config.exits) or "none"
        part = ""
        if self.group is not None and self.group.size > 1:
            part = f", part {self.group.rank} of {self.group.size}"
        return (
            f"Model({config.model_type}, {self.num_parameters:,} parameters, "
            f"{config.num_hidden_layers} layers, early exits: {exits}{part})"
        )

    def _repr_html_(self) -> str:
        return f"{self.config._repr_html_()}<div>{self.num_parameters:,} parameters</div>"

    def _tokens(
        self, values: npt.ArrayLike, name: str = "tokens", low: int = 0
    ) -> npt.NDArray[np.int32]:
        array = np.asarray(values)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or (array.size and array.dtype.kind not in "iu"):
            raise invalid(
                f"{name} is invalid",
                "integers in one or two dimensions",
                f"{array.dtype.name} {array.shape}",
            )
        if array.size and not (low <= array.min() and array.max() < self.config.vocab_size):
            raise invalid(
                f"{name} is invalid",
                f"numbers from {low} to {self.config.vocab_size - 1}",
                f"{array.min()} to {array.max()}",
                "encode the text with the model's own tokenizer",
            )
        if array.shape[1] > self.config.max_position_embeddings:
            raise invalid(
                f"{name} is too long",
                f"at most {self.config.max_position_embeddings} in a row",
                array.shape[1],
            )
        return np.ascontiguousarray(array, np.int32)


def _native(config: ModelConfig, threads: int, group: "Group | None" = None) -> "_core.Model":
    from eellm import _core

    if group is None:
        return _core.Model(config.to_core(), threads=threads)
    return _core.Model(config.to_core(), threads=threads, part=group.part(config))


def _loss_sum(
    logits: npt.NDArray[np.float32], wanted: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Sum of the cross-entropy of every exit over the targets that are not -1."""
    total = np.zeros(len(logits))
    mask = wanted >= 0
    targets = wanted[mask][:, None]
    for i, each in enumerate(logits):
        rows = each[mask].astype(np.float64)
        top = rows.max(-1, keepdims=True)
        norm = np.log(np.exp(rows - top).sum(-1, keepdims=True)) + top
        total[i] = (norm - np.take_along_axis(rows, targets, -1)).sum()
    return total


def _initialize_exits(
    core: "_core.Model", config: ModelConfig, weights: directory.Weights, init: str, seed: int
) -> None:
    """Fills the parameters of new exits; what they are copies of may lie on another rank."""
    rows = {row["name"]: row for row in core.table}
    for name, row in rows.items():
        if row["exit"] < 0 or not row["held"]:
            continue
        if init == "random":
            core.initialize_parameter(name, config.initializer_range, seed)
            continue
        original = rows[_model_of(name, config)]
        if original["held"]:
            values = np.asarray(core.parameter(original["name"]))
        else:
            values = directory.find_parameter(original, weights).float32()
        np.asarray(core.parameter(name))[...] = values


def _model_of(name: str, config: ModelConfig) -> str:
    """The parameter of the backbone that a new exit's parameter is a copy of."""
    _, index, part, *rest = name.split(".")
    inner = ".".join(rest)
    if part == "norm":
        return f"model.norm.{inner}"
    if part == "mlp":
        return f"model.layers.{config.exits[int(index)].layer - 1}.mlp.{inner}"
    if part == "block":
        return f"model.layers.{config.num_hidden_layers - 1}.{inner}"
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
