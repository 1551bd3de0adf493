"""Recomputation in the backward pass follows the recipe, and tiles pass the tower in turns."""

from collections import Counter

import pytest
import torch

from megatron_vita import platform
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups
from tests.functional.synthetic import make_pack, share_of, tiny_recipe

ONCE = [1, 1, 1, 1]
TWICE = [2, 2, 2, 2]
EVERYTHING_TWICE = dict.fromkeys(("query_key_value", "attention", "projection", "mlp"), TWICE)
EVERYTHING_TWICE |= {"mlp_output": ONCE}  # which the backward pass does not need
FULL, SELECTIVE = ({"recompute_granularity": kind} for kind in ("full", "selective"))
KEPT = {"recompute_keep_attention_layers": -1}
PIECES = {"mlp_chunk_tokens": 40}  # of 128: four pieces of 32
IN_PIECES = {"mlp": [8, 8, 8, 8], "mlp_output": [4, 4, 4, 4]}
FROM_PIXELS = {"recompute_vision": True, "recompute_vision_method": "tiles"}


def count_calls(*, backward: bool = True, **fields: object) -> dict[str, list[int]]:
    """Count the calls of each layer, its attention and MLP, and each layer of the tower in a
    forward and backward pass, or in a forward pass alone."""
    platform.initialize_process()
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    counts: Counter[str] = Counter()
    layers = list(model.language_model.decoder.layers)
    watched = {
        "layers": layers,
        "query_key_value": [layer.self_attention.linear_qkv for layer in layers],
        "attention": [layer.self_attention.core_attention for layer in layers],
        "projection": [layer.self_attention.linear_proj for layer in layers],
        "mlp": [layer.mlp.linear_fc1 for layer in layers],
        "mlp_output": [layer.mlp.linear_fc2 for layer in layers],
        "tower": list(model.vision_model.layers),
    }
    for modules in watched.values():
        for module in modules:
            module.register_forward_pre_hook(lambda module, *_: counts.update([module]))
    batch = share_of(make_pack([(111, 7)], seed=1), groups.rank_layout(), first_stage=True)
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        frames=batch.frames, rows_per_tile=4, layout=groups.rank_layout(),
    )  # fmt: skip
    tiles = normalize(batch.tiles, "imagenet")
    if backward:
        model(tiles, pack).sum().backward()
    else:
        with torch.no_grad():
            model.eval()(tiles, pack)
    return {name: [counts[module] for module in modules] for name, modules in watched.items()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"layers": ONCE, "attention": ONCE, "mlp": ONCE, "tower": [1, 1]}),
        (FULL, EVERYTHING_TWICE),
        (
            FULL | {"recompute_num_layers": 1},
            {part: [2, 1, 1, 1] for part in EVERYTHING_TWICE} | {"mlp_output": ONCE},
        ),
        (FULL | KEPT, EVERYTHING_TWICE | {"attention": ONCE}),
        (
            FULL | {"recompute_keep_attention_layers": 1},
            EVERYTHING_TWICE | {"attention": [2, 2, 2, 1]},
        ),
        (
            FULL | {"recompute_num_layers": 3, "recompute_keep_attention_layers": 2},
            {part: [2, 2, 2, 1] for part in EVERYTHING_TWICE}
            | {"attention": [2, 1, 1, 1], "mlp_output": ONCE},
        ),
        (FULL | KEPT | PIECES, EVERYTHING_TWICE | {"attention": ONCE} | IN_PIECES),
        (
            FULL | PIECES | {"recompute_num_layers": 1},
            {"query_key_value": [2, 1, 1, 1], "mlp": [8, 1, 1, 1]},
        ),
        (
            FULL | {"recompute_method": "uniform", "recompute_num_layers": 2},
            {"layers": TWICE},
        ),
        (SELECTIVE, {"layers": ONCE, "attention": TWICE, "mlp": ONCE}),
        (
            SELECTIVE | {"recompute_modules": ["mlp"]},
            {"layers": ONCE, "attention": ONCE, "mlp": TWICE},
        ),
        (
            SELECTIVE | PIECES | {"recompute_modules": ["mlp"]},
            {"query_key_value": ONCE, "attention": ONCE, "projection": ONCE} | IN_PIECES,
        ),
        ({"recompute_vision": True}, {"layers": ONCE, "tower": [2, 2]}),
        (FROM_PIXELS, {"layers": ONCE, "tower": [2, 2]}),
        (FROM_PIXELS | {"vision_tiles_at_once": 2}, {"tower": [8, 8]}),
        ({"vision_tiles_at_once": 2}, {"layers": ONCE, "tower": [4, 4]}),
        ({"vision_tiles_at_once": 2, "recompute_vision": True}, {"tower": [8, 8]}),
    ],
)
def test_parts_run_as_often_as_the_recipe_says(
    fields: dict, expected: dict[str, list[int]]
) -> None:
    found = count_calls(**fields)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (FULL, ONCE),
        (FULL | PIECES, [4, 4, 4, 4]),
        (FULL | PIECES | {"recompute_num_layers": 1}, [4, 1, 1, 1]),
        (SELECTIVE | PIECES | {"recompute_modules": ["mlp"]}, [4, 4, 4, 4]),
    ],
)
def test_an_mlp_takes_its_pieces_without_a_backward_pass_too(
    fields: dict, expected: list[int]
) -> None:
    found = count_calls(backward=False, **fields)
    assert found["mlp"] == found["mlp_output"] == expected
