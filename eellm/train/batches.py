"""Batches of a run's shape from data in any form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.errors import invalid

if TYPE_CHECKING:
    from eellm.data import Batches, Dataset
    from eellm.train.config import TrainConfig


def dataset_of(data: Any, config: TrainConfig, *, shuffle: bool) -> Dataset:
    """A dataset of windows: as given, or made of a token source or of token ids."""
    from eellm.data import PackedDataset, TokenArray

    if hasattr(data, "windows") and hasattr(data, "window_count"):
        if data.seq_length != config.seq_length:
            expected = f"seq_length {config.seq_length} as train.seq_length says"
            raise invalid("the dataset does not fit", expected, data.seq_length, "change one")
        dataset: Dataset = data
        return dataset
    if not hasattr(data, "bounds"):
        data = TokenArray(np.asarray(data))
    return PackedDataset(data, config.seq_length, seed=config.seed, shuffle=shuffle)


def training_batches(data: Any, config: TrainConfig, microbatches: int) -> Batches:
    """Batches of the run's shape, those microbatches included that fill bubbles."""
    from eellm.data import Batches

    if isinstance(data, Batches):
        _check_batches(data, config, microbatches)
        return data
    dataset = dataset_of(data, config, shuffle=True)
    return Batches(dataset, config.micro_batch_size, microbatches, prefetch=True)


def held_out_batches(data: Any, config: TrainConfig) -> Batches:
    """Batches over the first valid_batches batches of the data, or over all of it."""
    from eellm.data import Batches, validation_batches

    if isinstance(data, Batches):
        _check_batches(data, config, config.microbatches)
        return data
    dataset = dataset_of(data, config, shuffle=False)
    windows = None
    if config.valid_batches:
        windows = min(config.valid_batches * config.global_batch_size, dataset.window_count)
    return validation_batches(
        dataset, config.micro_batch_size, config.microbatches, windows=windows
    )


def _check_batches(batches: Batches, config: TrainConfig, microbatches: int) -> None:
    got = (batches.micro_batch_size, batches.microbatches, batches.dataset.seq_length)
    wanted = (config.micro_batch_size, microbatches, config.seq_length)
    if got != wanted:
        names = "(micro_batch_size, microbatches, seq_length)"
        raise invalid(f"the batches' {names} do not fit", str(wanted), got, "change one of them")
