"""Train and run early-exit large language models.

Everything public is imported on first use, so that `import eellm` costs little.
"""

from eellm._version import __version__

__all__ = ["__version__"]
