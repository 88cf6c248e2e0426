"""What the tests of the command share with their fixtures."""

from tests.cli.conftest import ROOT, eellm, environment, error_line, start

__all__ = ["ROOT", "eellm", "environment", "error_line", "start"]
