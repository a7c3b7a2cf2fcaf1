"""The address of the command line: `python -m klein`."""

import sys

from klein.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
