"""Run in every rank: rank 1 ends without a word after some steps. Rank 0 writes what its engine
says.

Arguments: folder, fields of ParallelConfig as JSON, steps, "busy" or "idle".
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import ParallelConfig
from megatron_vita.errors import EngineError
from megatron_vita.inference.requests.types import SamplingParams
from tests.inference.tiny import prompts, tiny_engine


def main() -> None:
    """Rank 0 answers or waits; the file has its error."""
    folder = Path(sys.argv[1])
    parallel = json.loads(sys.argv[2])
    steps = int(sys.argv[3])
    busy = sys.argv[4] == "busy"
    platform.initialize_process()
    engine = tiny_engine(folder, parallel=ParallelConfig(**parallel))
    if dist.get_rank() == 1:
        for _ in range(steps):
            engine.worker.execute(engine.receive_step())
        os._exit(3)
    try:
        while True:
            if busy:
                engine.generate(
                    prompts(), sampling=SamplingParams(max_new_tokens=50, ignore_eos=True)
                )
            else:
                engine.idle()
    except EngineError as error:
        (folder / "error").write_text(str(error))
    os._exit(0)  # what is left of the process group cannot be left in order


if __name__ == "__main__":
    main()
