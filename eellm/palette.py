"""Colours of exits, told apart with every kind of colour vision (Okabe and Ito, 2008)."""

EXIT_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
FINAL_COLOR = "#5A5A5A"


def colour(index: int, count: int) -> str:
    """The colour of exit `index` of `count`; the final one, the last, is grey."""
    if not 0 <= index < count:
        raise ValueError(f"no such exit (expected 0 to {count - 1}, got {index}); check the exits")
    return FINAL_COLOR if index == count - 1 else EXIT_COLORS[index % len(EXIT_COLORS)]
