"""Call a function in a process group, with each rank's log: call.py MODULE NAME ARGUMENTS.

`ARGUMENTS` is a pickle file. The process is a rank of torchrun or of `tests.functional.launch`.
"""

import importlib
import pickle
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_vita import platform


def main() -> None:
    """Join the group, call the function, and leave the group."""
    module, name, file = sys.argv[1:]
    arguments, keywords = pickle.loads(Path(file).read_bytes())
    function = getattr(importlib.import_module(module), name)
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    function(*arguments, **keywords)
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
