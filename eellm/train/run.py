"""A training run from settings: the sections [model], [data], [train], [parallel], [output]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from eellm.config import ExitConfig, ModelConfig
from eellm.errors import invalid
from eellm.parallel import Group, ParallelConfig
from eellm.settings import as_values, build_sections, check_values, dump_toml, field_types
from eellm.train.config import TrainConfig

if TYPE_CHECKING:
    from eellm.data import Batches, Blend, PackedDataset, Tokenizer
    from eellm.model import Model
    from eellm.train.trainer import Trainer

# Stands for the tokenizer's until that is loaded.
_ANY_VOCABULARY = 1 << 24


class ModelSettings:
    """[model]: the fields of ModelConfig, or a pretrained model with perhaps new exits."""

    def __init__(
        self, pretrained: str | None, exit_init: str, values: dict[str, Any], threads: int
    ) -> None:
        self.pretrained, self.exit_init = pretrained, exit_init
        self.values, self.threads = values, threads

    @classmethod
    def setting_types(cls) -> dict[str, Any]:
        """Keys and types of the section."""
        own = {
            "pretrained": str | None,
            "exit_init": Literal["copy", "random"],
            "threads": int,
        }
        fields = {name: kind for name, kind in field_types(ModelConfig).items() if name != "extra"}
        return own | fields

    @classmethod
    def from_settings(
        cls, pretrained: str | None = None, exit_init: str = "copy", threads: int = 0, **values: Any
    ) -> ModelSettings:
        """Checks what can be checked before the tokenizer or the model is loaded."""
        if threads < 0:
            raise invalid("model.threads", "0 for all or a number of threads", threads)
        if pretrained is None:
            settings = cls(None, exit_init, values, threads)
            if values:
                settings.config(_ANY_VOCABULARY)
            return settings
        for name in values:
            if name != "exits":
                expected = "nothing but exits beside model.pretrained"
                advice = "the pretrained model says it; remove it"
                raise invalid(f"model.{name}", expected, values[name], advice)
        return cls(pretrained, exit_init, values, threads)

    def config(self, vocab_size: int | None = None) -> ModelConfig:
        """The config of a new model; the vocabulary is the tokenizer's unless it is set."""
        values = dict(self.values)
        if "vocab_size" not in values and vocab_size is not None:
            values["vocab_size"] = vocab_size
        return ModelConfig.create(values.pop("model_type", "llama"), **values)

    def to_settings(self) -> dict[str, Any]:
        """The section as it is written; a new model in full."""
        own: dict[str, Any] = {"threads": self.threads}
        if self.pretrained is not None:
            own |= {"pretrained": self.pretrained, "exit_init": self.exit_init}
            values = dict(self.values)
        elif not self.values:
            values = {}
        else:
            values = dict(vars(self.config(_ANY_VOCABULARY)))
            del values["extra"]
            if "vocab_size" not in self.values:
                del values["vocab_size"]
        if "exits" in values:
            values["exits"] = [exit_settings(each) for each in values["exits"]]
        return own | values


def exit_settings(config: ExitConfig) -> dict[str, Any]:
    """An exit in TOML, which has no None."""
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    return values | {key: "none" for key in ("branch", "norm") if key not in values}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """[data]: token files by their prefixes, and how documents meet in a sample."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    valid: tuple[str, ...] = ()
    tokenizer: str | None = None
    reset_positions: bool = False
    reset_attention: bool = False
    mask_separators: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        check_values(self)
        if self.weights and len(self.weights) != len(self.train):
            expected = f"one weight for each of {len(self.train)} files in data.train"
            raise invalid("weights", expected, self.weights, "or leave them out")

    @classmethod
    def setting_types(cls) -> dict[str, Any]:
        """One file may stand without brackets."""
        lists = {"train": tuple[str, ...] | str, "valid": tuple[str, ...] | str}
        plain = {"weights": tuple[float, ...], "tokenizer": str | None}
        flags = ("reset_positions", "reset_attention", "mask_separators")
        return lists | plain | dict.fromkeys(flags, bool)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """[output]: where a run leaves its files, and what it shows."""

    folder: str = "run"
    tensorboard: bool = False
    progress: Literal["auto", "bar", "log", "none"] = "auto"

    def __post_init__(self) -> None:
        check_values(self)
        if not self.folder:
            raise invalid("folder", "a folder's name", self.folder, "set output.folder")


SCHEMA: Mapping[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "output": OutputSettings,
}


@dataclass(frozen=True)
class RunSettings:
    """All sections of a run."""

    model: ModelSettings
    data: DataSettings
    train: TrainConfig
    parallel: ParallelConfig
    output: OutputSettings

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RunSettings:
        """Builds and checks the sections."""
        return cls(**build_sections(SCHEMA, values))

    def to_toml(self) -> str:
        """The complete settings as TOML; reading them gives the same settings."""
        sections = {name: as_values(getattr(self, name)) for name in SCHEMA}
        return dump_toml(sections)


def make_trainer(
    settings: RunSettings,
    resume: Literal["none", "auto"] = "none",
    trace: str | None = None,
    fault: tuple[str, int, int, float] | None = None,
) -> Trainer:
    """Loads data and tokenizer, makes or loads the model, and returns the trainer.

    In a job of several ranks every rank calls it, and has a trainer of its part of the model.
    """
    from eellm import distributed
    from eellm.train.trainer import Trainer

    data = settings.data
    if not data.train:
        raise invalid(
            "data.train",
            "the prefix of a token file",
            "none",
            "make one with `eellm data prepare` and set data.train",
        )
    group = Group(distributed.world(timeout=settings.parallel.timeout), settings.parallel)
    group.peers.agree("settings", settings.to_toml())
    tokenizer = _tokenizer(data)
    model = make_model(settings.model, settings.train.seed, tokenizer, group)
    microbatches = group.schedule(model.config, settings.train.microbatches).total
    return Trainer(
        model,
        settings.train,
        _batches(settings, microbatches, shuffle=True, tokenizer=tokenizer),
        valid=_batches(settings, settings.train.microbatches, shuffle=False, tokenizer=tokenizer)
        if data.valid
        else None,
        output=settings.output.folder,
        resume=resume,
        tokenizer=tokenizer,
        tensorboard=settings.output.tensorboard,
        progress=settings.output.progress,
        trace=trace,
        fault=fault,
    )


def _tokenizer(data: DataSettings) -> Tokenizer | None:
    from eellm.data import load_tokenizer

    return None if data.tokenizer is None else load_tokenizer(data.tokenizer)


def make_model(
    settings: ModelSettings, seed: int, tokenizer: Tokenizer | None, group: Group | None = None
) -> Model:
    """A new model drawn from the seed, or the pretrained one with its new exits."""
    from eellm import distributed
    from eellm.model import Model

    threads = settings.threads or (distributed.threads_per_rank() if distributed.is_job() else 0)

    if settings.pretrained is None:
        config = settings.config(tokenizer.vocab_size if tokenizer is not None else None)
        if tokenizer is not None:
            config = with_special_tokens(config, tokenizer)
        return Model.from_config(config, seed=seed, threads=threads, group=group)
    return Model.from_pretrained(
        settings.pretrained,
        exits=settings.values.get("exits"),
        init=settings.exit_init,
        seed=seed,
        threads=threads,
        group=group,
    )


def with_special_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with the tokenizer's start and end tokens, where it names none."""
    if tokenizer.vocab_size > config.vocab_size:
        expected = f"at least the tokenizer's {tokenizer.vocab_size}"
        raise invalid("model.vocab_size", expected, config.vocab_size, "raise it or leave it out")
    changes: dict[str, Any] = {}
    if config.bos_token_id is None and tokenizer.bos_id is not None:
        changes["bos_token_id"] = tokenizer.bos_id
    if config.eos_token_id is None and tokenizer.eod_id is not None:
        changes["eos_token_id"] = tokenizer.eod_id
    return replace(config, **changes) if changes else config


def _batches(
    settings: RunSettings, microbatches: int, *, shuffle: bool, tokenizer: Tokenizer | None
) -> Batches:
    from eellm.data import Batches, Blend, PackedDataset, TokenFile, validation_batches

    data, train = settings.data, settings.train
    options = {
        "reset_positions": data.reset_positions,
        "reset_attention": data.reset_attention,
        "mask_separators": data.mask_separators,
    }
    eod = tokenizer.eod_id if tokenizer is not None else None
    parts: list[PackedDataset] = []
    for prefix in data.train if shuffle else data.valid:
        source = TokenFile(prefix)
        parts.append(
            PackedDataset(source, train.seq_length, seed=train.seed, shuffle=shuffle, eod_id=eod)
        )
    if shuffle:
        weights = data.weights or [float(part.window_count) for part in parts]
        dataset: PackedDataset | Blend = parts[0] if len(parts) == 1 else Blend(parts, weights)
        return Batches(dataset, train.micro_batch_size, microbatches, prefetch=True, **options)
    dataset = parts[0]
    if len(parts) > 1:
        dataset = Blend(parts, [float(part.window_count) for part in parts])
    windows = None
    if train.valid_batches:
        windows = min(train.valid_batches * train.global_batch_size, dataset.window_count)
    return validation_batches(
        dataset, train.micro_batch_size, microbatches, windows=windows, **options
    )
