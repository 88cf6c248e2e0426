"""Text from a model: one prompt or many at once, with early exits; and scores of given text."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from eellm.decode.generation import Generation, Piece
from eellm.decode.generator import Generator, Stream, finder
from eellm.decode.jobs import exit_depths, exit_names, prepare
from eellm.decode.limits import MAX_SEQUENCES, check_limits, check_ranks
from eellm.decode.pipeline import serve
from eellm.decode.prompts import Prompts, Reader
from eellm.decode.scores import Scores
from eellm.decode.settings import Settings, takes_settings

if TYPE_CHECKING:
    from eellm.data.tokenizers import Tokenizer
    from eellm.model import Model

__all__ = [
    "MAX_SEQUENCES",
    "Generation",
    "Generator",
    "Piece",
    "Scores",
    "Settings",
    "exit_depths",
    "exit_names",
    "generate",
    "serve",
]


@takes_settings
def generate(
    model: Model,
    prompts: Prompts,
    *,
    stream: Stream | None = None,
    dtype: str = "float32",
    max_sequences: int = MAX_SEQUENCES,
    cache_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    ranks: int = 1,
    **settings: Any,
) -> Any:
    """Continues one prompt (gives a Generation) or a list of prompts (a list of them).

    A prompt is a text, or a list of tokens. Texts depend on their own settings alone, not on what
    is written beside them. Every call packs the model's weights; for many calls use a Generator.

    stream: called with a Piece for every token as it comes.
    dtype, max_sequences, cache_tokens, tokenizer, ranks: those of a Generator.
    settings: the fields of `eellm.decode.Settings`, whose help explains them: engine, threshold,
        max_new_tokens, temperature, stop, n and others. With n above 1 the result is a list, prompt
        by prompt.
    """
    chosen = Settings.of({"engine": "pipeline", **settings} if ranks > 1 else settings)
    config = model.config
    check_ranks(ranks, chosen.engine, config.num_hidden_layers)
    check_limits(config, dtype, max_sequences, None, cache_tokens)
    find, context = finder(model, tokenizer), config.max_position_embeddings
    reader = Reader(config.vocab_size, context, find, cache_tokens)
    single, texts = prepare(config, reader, prompts, chosen, stream is not None)
    longest = max(text.length for text in texts)
    generator = Generator(
        model,
        dtype=dtype,
        max_sequences=min(max_sequences, len(texts)),
        max_length=min(longest, context),
        cache_tokens=cache_tokens,
        tokenizer=tokenizer,
        ranks=ranks,
    )
    with closing(generator):
        results = generator.finish(texts, stream)
    return results[0] if single and chosen.n == 1 else results
