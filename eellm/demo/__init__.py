"""The demo; `run` does all of it."""

from eellm.demo.main import run

__all__ = ["run"]
