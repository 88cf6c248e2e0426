"""The fixture that makes trainers."""

import pytest

import eellm
from tests.train.common import small_config, small_train, text_tokens


@pytest.fixture
def make(tmp_path):
    """Makes a trainer: make(output, resume=..., model=..., data=..., **TrainConfig)."""

    def build(
        output=None,
        *,
        resume="none",
        config=None,
        model=None,
        data=None,
        tensorboard=False,
        **changes,
    ):
        model = (
            eellm.Model.from_config(config or small_config(), seed=3) if model is None else model
        )
        return eellm.Trainer(
            model,
            small_train(**changes),
            text_tokens() if data is None else data,
            valid=text_tokens(600, seed=9),
            output=None if output is None else tmp_path / output,
            resume=resume,
            tensorboard=tensorboard,
            progress="none",
        )

    return build
