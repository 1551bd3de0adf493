"""Run in every rank: answers of a checkpoint at one layout after another, written by rank 0.

Arguments: checkpoint, JSON of {file to write: fields of ParallelConfig and of EngineOptions}.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import ParallelConfig
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.prompt import MediaFile, Prompt
from megatron_vita.inference.requests import SamplingParams
from tests.inference.tiny import picture, prompts

GREEDY = SamplingParams(max_new_tokens=8, logprobs=2, ignore_eos=True)
DRAWN = SamplingParams(
    max_new_tokens=8,
    temperature=1.0,
    top_k=40,
    top_p=0.95,
    n=2,
    seed=7,
    logprobs=0,
    ignore_eos=True,
)
BEAMS = SamplingParams(max_new_tokens=6, num_beams=3, n=2)
DAMAGED = MediaFile(name="cut.png", data=picture(1).data[:1200])


def answers(engine: Engine) -> list[dict]:
    """Greedy, sampled and beam search answers, the sampled ones with a cached prefix, and one that
    fails."""
    found = engine.generate(prompts(), sampling=GREEDY)
    found += engine.generate(prompts(), sampling=DRAWN)
    found += engine.generate(prompts()[:2], sampling=BEAMS)
    found += engine.generate(
        [Prompt.ask("what color", images=[picture(4), DAMAGED])], sampling=GREEDY
    )
    found += engine.generate(prompts()[:1], sampling=GREEDY)
    return [dataclasses.asdict(answer) for answer in found]


def main() -> None:
    """Serve at each layout in turn."""
    checkpoint = sys.argv[1]
    layouts = json.loads(sys.argv[2])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    for file, (parallel, options) in layouts.items():
        small = {"chunk_tokens": 24, "busy_chunk_tokens": 8, "page_tokens": 4, "cache_tokens": 2048}
        engine = Engine.from_checkpoint(
            checkpoint,
            parallel=ParallelConfig(**parallel),
            options=EngineOptions(**(small | options)),
        )
        if dist.get_rank() == 0:
            engine.idle()
            Path(file).write_text(json.dumps(answers(engine)))
            engine.close()
        else:
            engine.serve_as_worker()
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
