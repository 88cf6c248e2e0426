"""`python -m eellm` is the command eellm."""

import sys

from eellm.cli import main

if __name__ == "__main__":
    sys.exit(main())
