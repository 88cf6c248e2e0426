"""What the demo shows: tables, texts with their exits in colour, pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from eellm.decode.generation import Generation
    from eellm.train.trainer import Trainer


def table(found: dict[str, Any]) -> str:
    """Losses, thresholds and shares of every exit."""
    rows = [("", "bits a token", "after 1/10", "threshold", "tokens")]
    for i, name in enumerate(found["exits"]):
        limit = f"{found['thresholds'][i]:.2f}" if i < len(found["thresholds"]) else ""
        rows.append(
            (
                name,
                f"{found['valid_losses'][i]:.2f}",
                f"{found['losses_after_a_tenth'][i]:.2f}",
                limit,
                f"{found['shares'][i]:.0%}",
            )
        )
    lines = [f"  {a:<16}{b:>13}{c:>12}{d:>11}{e:>8}" for a, b, c, d, e in rows]
    lines[0] = "Held-out" + lines[0][8:]
    told = (
        f"  With these thresholds {found['agreement']:.1%} of {found['judged_tokens']:,} held-out "
        f"tokens are as at full depth,\n  at a mean depth of {found['mean_depth']:.1f} "
        f"of {found['depths'][-1]:g} layers."
    )
    return "\n".join(["", *lines, told, ""])


def writing(texts: dict[str, list[Generation]]) -> dict[str, Any]:
    """Speed of both ways to write, shares of the exits, and how far the texts are the same."""
    early, full = texts["early"], texts["full"]
    exits = np.concatenate([each.exits for each in early])
    counts = np.bincount(exits, minlength=len(early[0].exit_names))
    prefix = [
        int(np.argmin(np.append(left.tokens == right.tokens, False)))
        for left, right in zip(early, full, strict=True)
    ]
    return {
        "generated": {
            "tokens": int(exits.size),
            "shares": (counts / exits.size).tolist(),
            "tokens_per_second": {
                "full": sum(len(g.tokens) for g in full) / sum(g.seconds for g in full),
                "early_exit": exits.size / sum(g.seconds for g in early),
            },
            "equal_prefix": float(np.mean(prefix)),
            "distinct_4grams": {
                "full": _distinct(full),
                "early_exit": _distinct(early),
            },
            "texts": [str(each) for each in early],
        }
    }


def _distinct(texts: list[Generation], length: int = 4) -> float:
    """The share of different ones among all runs of 4 tokens; low where texts go in circles."""
    runs = [
        tuple(each.tokens[i : i + length].tolist())
        for each in texts
        for i in range(len(each.tokens) - length + 1)
    ]
    return len(set(runs)) / max(1, len(runs))


def pictures(
    trainer: Trainer, texts: dict[str, list[Generation]], found: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Writes both pictures; their paths."""
    from eellm import plot

    names = [name[0].upper() + name[1:] for name in found["exits"]]
    entropy = found["unigram_entropy"]
    figure = plot.losses(trainer.history, names, unigram=entropy, title="Loss of every exit")
    figure.savefig(folder / "losses.png")
    first = texts["early"][0]
    figure = plot.exits(first, names=names)
    figure.savefig(folder / "exits.png")
    return {"losses": str(folder / "losses.png"), "exits": str(folder / "exits.png")}


def show(texts: dict[str, list[Generation]], found: dict[str, Any]) -> None:
    """Prints texts with colours where the terminal has them, then speeds and files."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for early in texts["early"][:2]:
        if colours:
            print(early.to_ansi())
        else:
            print(f"{early.prompt_text or ''}{early}")
            shares = ", ".join(f"{name} {share:.0%}" for name, share in early.exit_shares.items())
            print(f"\n{shares}")
        print("-" * 80)
    made = found["generated"]
    speed = made["tokens_per_second"]
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in zip(found["exits"], made["shares"], strict=True)
    )
    print(f"Written     {made['tokens']} tokens; left at: {shares}")
    print(
        f"Speed       {speed['full']:.0f} tokens/s at full depth, {speed['early_exit']:.0f} with "
        "early exits"
    )
    print(
        f"Agreement   {found['agreement']:.1%} token by token; the written texts are equal for "
        f"{made['equal_prefix']:.0f} tokens on average"
    )
    print(f"Time        {found['seconds']:.0f} s")
    print("Files       " + "\n            ".join(found["paths"].values()))
    model = found["paths"]["model"]
    limits = ",".join(f"{value:.2f}" for value in found["thresholds"])
    print(f'Next        eellm generate {model} --prompt "class " --threshold {limits}')
