"""Entry point of the command line; see `python -m data_tools --help`."""

import sys

from data_tools.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
