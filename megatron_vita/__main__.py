"""python -m megatron_vita COMMAND ...: the command `vita`, as torchrun starts it."""

import sys

from megatron_vita.cli.vita import main

if __name__ == "__main__":
    sys.exit(main())
