"""What people pass as prompts and texts, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm.data.tokenizers import Tokenizer

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompts = str | Tokens | Sequence[str] | Sequence[Tokens]


@dataclass(frozen=True)
class Prompt:
    """A text and its tokens; text is None where there is no tokenizer."""

    tokens: npt.NDArray[np.int32]
    text: str | None


@dataclass(frozen=True)
class Reader:
    """Turns prompts into tokens of a model.

    find_tokenizer raises FileNotFoundError or ImportError where there is none. max_length: tokens
    that a prompt may have. cache_tokens: tokens that the cache holds, None for as many as needed.
    """

    vocab_size: int
    max_length: int
    find_tokenizer: Callable[[], Tokenizer]
    cache_tokens: int | None = None

    def read(
        self, prompts: Prompts, add_bos: bool | None, *, new_tokens: int = 0, score: bool = False
    ) -> tuple[bool, list[Prompt], Tokenizer | None]:
        """Whether there is a single one, all of them, and the tokenizer if there is one.

        new_tokens: so many may follow. score: they are texts to score, not prompts.
        """
        what, least = ("text", 2) if score else ("prompt", 1)
        single, every = _split(prompts, what)
        tokenizer = self.tokenizer(needed=any(isinstance(each, str) for each in every))
        found = []
        for i, prompt in enumerate(every):
            name = f"the {what}" if single else f"{what} {i}"
            found.append(self._read(name, prompt, tokenizer, add_bos, least))
            self._check_room(name, min(found[-1].tokens.size + new_tokens, self.max_length))
        return single, found, tokenizer

    def _check_room(self, name: str, needed: int) -> None:
        if self.cache_tokens is not None and needed > self.cache_tokens:
            raise invalid(
                f"cache_tokens is too small for {name}",
                f"{needed} at least, its tokens and those that may follow",
                self.cache_tokens,
                "make it larger, or the text or max_new_tokens smaller",
            )

    def tokenizer(self, needed: bool) -> Tokenizer | None:
        """The tokenizer; None where there is none and none is needed."""
        try:
            return self.find_tokenizer()
        except (FileNotFoundError, ImportError):
            if needed:
                raise
            return None

    def _read(
        self, name: str, prompt: Any, tokenizer: Any, add_bos: bool | None, least: int
    ) -> Prompt:
        if isinstance(prompt, str):
            text, tokens = prompt, _encode(prompt, tokenizer, add_bos)
        else:
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                got = Shown(f"{tokens.dtype.name} of shape {tokens.shape}")
                raise invalid(f"{name} is invalid", "a text or a list of integers", got)
            text = None
        if tokens.size < least:
            few = "no tokens" if not tokens.size else "too few tokens"
            expected = f"{least} at least"
            advice = "begin with the start token, or add_bos=True"
            raise invalid(f"{name} has {few}", expected, tokens.size, advice)
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise invalid(
                f"{name} has tokens outside the vocabulary",
                f"numbers from 0 to {self.vocab_size - 1}",
                Shown(f"{tokens.min()} to {tokens.max()}"),
                "encode the text with the model's own tokenizer",
            )
        if tokens.size > self.max_length:
            expected = f"at most {self.max_length} tokens"
            raise invalid(f"{name} is too long", expected, tokens.size, "shorten it")
        if text is None and tokenizer:
            text = tokenizer.decode(tokens)
        return Prompt(np.ascontiguousarray(tokens, np.int32), text)


def _split(prompts: Any, what: str) -> tuple[bool, list[Any]]:
    """Whether there is a single one, and all of them."""
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, bytes | dict) or not hasattr(prompts, "__len__"):
        expected = "a text, tokens, or a list of such"
        raise invalid(f"{what}s is invalid", expected, prompts)
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1, [prompts] if prompts.ndim == 1 else list(prompts)
    if not len(prompts):
        raise invalid(f"{what}s is empty", f"one {what} at least", Shown("none"))
    if isinstance(prompts[0], int | np.integer):
        return True, [prompts]
    return False, list(prompts)


def _encode(prompt: str, tokenizer: Any, add_bos: bool | None) -> npt.NDArray[np.int32]:
    if add_bos is None:
        known = tokenizer.bos_id is not None
        add_bos = known and (not prompt or tokenizer.kind == "sentencepiece")
    tokens: npt.NDArray[np.int32] = tokenizer.encode(prompt, add_bos=add_bos)
    return tokens
