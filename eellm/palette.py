"""Colours of exits, told apart with every kind of colour vision (Okabe and Ito, 2008)."""

EXIT_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
FINAL_COLOR = "#5A5A5A"

# Of a background behind text that may be dark or light.
_TINT = "66"


def colour(index: int, count: int) -> str:
    """The colour of exit `index` of `count`; the final one, the last, is grey."""
    if not 0 <= index < count:
        raise ValueError(f"no such exit (expected 0 to {count - 1}, got {index}); check the exits")
    return FINAL_COLOR if index == count - 1 else EXIT_COLORS[index % len(EXIT_COLORS)]


def css(index: int, count: int) -> str:
    """The colour as a background for HTML."""
    return f"background:{colour(index, count)}{_TINT}"


def ansi(text: str, index: int, count: int) -> str:
    """A text on the colour for a terminal; on none for the final exit.

    Colours end with each line, so that they do not fill it.
    """
    if index == count - 1:
        return text
    red, green, blue = bytes.fromhex(colour(index, count)[1:])
    start = f"\x1b[30;48;2;{red};{green};{blue}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def printable(text: str) -> str:
    """A text whose control characters are U+FFFD, safe to print on a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
