"""The peer of `serving.py`: transformers' InternVL of the same shape on one GPU, with random
weights and pixels.

    python benchmarks/serving_peer.py --lengths 8192,32768,131072,262144

Prefill with a key-value cache and the last logits alone, pixels in; and the time to the first token
of one image.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from serving_shapes import ROWS_OF_FRAME, SHAPES, causal_flops
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl import InternVLVisionConfig
from transformers.models.qwen2 import Qwen2Config

GIB = 1 << 30
IMAGE_TOKEN = 7


def build(shape: str) -> InternVLForConditionalGeneration:
    """The model on the GPU in bf16."""
    language = SHAPES[shape]
    text = Qwen2Config(
        num_hidden_layers=language.num_layers,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_query_groups,
        # As large in the tiny shape, since ids of prompts are drawn up to it.
        vocab_size=152064,
        max_position_embeddings=1 << 20,
        rope_theta=language.rotary_base,
    )
    vision = InternVLVisionConfig(
        num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14],
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = InternVLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return model.eval()


def prompt(length: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [1, length] with 256 placeholders for each frame, and pixels on the host."""
    ids = torch.randint(1000, 150000, (length,))
    for frame in range(frames):
        ids[frame * ROWS_OF_FRAME + 1 : frame * ROWS_OF_FRAME + 257] = IMAGE_TOKEN
    return ids[None], torch.randint(0, 256, (frames, 3, 448, 448), dtype=torch.uint8)


@torch.no_grad()
def first_token(model: InternVLForConditionalGeneration, length: int, frames: int) -> float:
    """Measure the seconds from ids and pixels on the host to the first token there."""
    ids, pixels = prompt(length, frames)
    torch.cuda.synchronize()
    start = time.perf_counter()
    features = [
        model.get_image_features(pixel_values=part.cuda().to(torch.bfloat16).div_(255))
        for part in pixels.split(64)
    ]
    rows = torch.cat([getattr(part, "pooler_output", part).flatten(0, -2) for part in features])
    ids = ids.cuda()
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == IMAGE_TOKEN] = rows.to(embeddings.dtype)
    out = model.model.language_model(inputs_embeds=embeddings, use_cache=True)
    int(model.lm_head(out.last_hidden_state[:, -1]).argmax())
    return time.perf_counter() - start


def main() -> None:
    """Print rows like those of `serving.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument(
        "--lengths", type=lambda text: [int(part) for part in text.split(",") if part], default=[]
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = build(options.shape)
    rows = []
    for tiles in (1, 13):
        times = [first_token(model, tiles * ROWS_OF_FRAME + 32, tiles) for _ in range(12)]
        rows.append(f"| transformers | {tiles} | {1e3 * statistics.median(times[3:]):.1f} |")
    for length in options.lengths:
        times = [
            first_token(model, length, length // ROWS_OF_FRAME)
            for _ in range(3 if length <= 65536 else 1)
        ]
        rate = causal_flops(options.shape, length) / min(times) / 1e12
        memory = torch.cuda.max_memory_allocated() / GIB
        rows.append(f"| transformers | {length} | {min(times):.2f} | {rate:.0f} | {memory:.1f} |")
    print("\n".join(rows))  # noqa: T201
    if options.out:
        options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
