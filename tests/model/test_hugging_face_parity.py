"""Logits and gradients equal those of Hugging Face's models with the same weights, in fp32."""

import pytest
import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_vita import platform
from megatron_vita.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    Recipe,
    VisionConfig,
    replaced,
)
from megatron_vita.layout.slicing import PackSlice, slice_pack
from megatron_vita.model.build import build_model
from megatron_vita.model.projector import Projector
from megatron_vita.model.vision import pixel_shuffle
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.model.hf_weights import copy_into, our_tensors, randomize

VOCAB = 96
IMAGE_TOKEN = 90
ROWS = 4
LENGTH = 32
CASES = {
    "one image of one tile": [3],
    "one image of several tiles": [2, 7, 13],
    "two images": [1, 20],
    "text only": [],
}


def shapes() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            image_size=56, patch_size=14, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
        ),
        projector=ProjectorConfig(kind="internvl"),
        language=LanguageConfig(
            num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
            kv_channels=8, vocab_size=VOCAB,
        ),
    )  # fmt: skip


def qwen2_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


@pytest.fixture(scope="module", params=["InternViT-300M", "InternViT-6B"])
def ours(request: pytest.FixtureRequest) -> VitaModel:
    platform.initialize_process()
    recipe = Recipe(model=shapes(), data=DataConfig(seq_length=LENGTH))
    if request.param == "InternViT-6B":
        fields = {"normalization": "RMSNorm", "qk_layernorm": True, "add_qkv_bias": False}
        recipe = recipe.replaced({f"model.vision.{n}": value for n, value in fields.items()})
    groups.initialize_groups(recipe.parallel)
    return build_model(recipe)


def one_document(ids: Tensor, placements: list[int]) -> PackSlice:
    return slice_pack(
        ids,
        labels=ids.roll(-1),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        placements=torch.tensor(placements, dtype=torch.int64),
        frames=torch.zeros(len(placements), dtype=torch.bool),
        rows_per_tile=ROWS,
        layout=groups.rank_layout(),
    )


def assert_same_gradients(model: VitaModel, expected: dict[str, Tensor]) -> None:
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    assert set(expected) == set(actual)
    for name, grad in expected.items():
        allowed = 1e-5 * grad.norm() + 1e-8 * total
        assert (actual[name] - grad).norm() <= allowed, (
            f"{name}: {(actual[name] - grad).norm()} > {allowed}"
        )


@pytest.mark.parametrize("case", CASES)
def test_internvl_gives_the_same_logits_and_gradients(ours: VitaModel, case: str) -> None:
    large = ours.shapes.vision.qk_layernorm
    theirs = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": not large, "layer_norm_eps": 1e-6,
                "norm_type": "rms_norm" if large else "layer_norm", "use_qk_norm": large,
            },
            text_config=qwen2_config().to_dict(),
            image_token_id=IMAGE_TOKEN, image_seq_length=ROWS, downsample_ratio=0.5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    randomize(theirs)
    weights = theirs.state_dict()
    ours.zero_grad()
    copy_into(ours, our_tensors(weights.__getitem__, ours.shapes, whole=True))
    placements = CASES[case]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, IMAGE_TOKEN, (LENGTH,), generator=generator)
    for start in placements:
        ids[start : start + ROWS] = IMAGE_TOKEN
    tiles = torch.randn(len(placements), 3, 56, 56, generator=generator)
    target = torch.randn(LENGTH, VOCAB, generator=generator)
    expected = theirs(input_ids=ids[None], pixel_values=tiles if placements else None).logits[0]
    actual = ours(tiles, one_document(ids, placements), wanted_rows=torch.arange(LENGTH))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for logits in (actual, expected):
        (logits * target).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    zero = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    expected_grads = our_tensors(
        lambda n: zero[n] if grads[n] is None else grads[n], ours.shapes, whole=True
    )
    assert_same_gradients(ours, expected_grads)


def llama_config() -> LlamaConfig:
    shared = {
        name: value for name, value in qwen2_config().to_dict().items() if name in LLAMA_FIELDS
    }
    return LlamaConfig(**shared, attention_bias=False, mlp_bias=False)


LLAMA_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_language_models_give_the_same_logits_and_gradients(family: str) -> None:
    platform.initialize_process()
    recipe = Recipe(model=shapes(), data=DataConfig(seq_length=LENGTH))
    biased = family == "qwen2"
    recipe = recipe.replaced({"model.language.add_qkv_bias": biased})
    groups.initialize_groups(recipe.parallel)
    ours = build_model(recipe)
    theirs = Qwen2ForCausalLM(qwen2_config()) if biased else LlamaForCausalLM(llama_config())
    randomize(theirs)
    copy_into(ours, our_tensors(theirs.state_dict().__getitem__, ours.shapes, whole=False))
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(2))
    expected = theirs(input_ids=ids[None]).logits[0]
    actual = ours(
        torch.zeros(0, 3, 56, 56), one_document(ids, []), wanted_rows=torch.arange(LENGTH)
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual.square().mean().backward()
    expected.square().mean().backward()
    grads = dict(theirs.named_parameters())
    vision = {
        name: torch.zeros_like(p) for name, p in ours.named_parameters() if "language" not in name
    }
    assert_same_gradients(
        ours, our_tensors(lambda name: grads[name].grad, ours.shapes, whole=False) | vision
    )


def test_long_vita_projector_is_norm_linear_gelu_linear_without_biases() -> None:
    config = replaced(shapes(), {"projector.kind": "long_vita"})
    projector = Projector(config)
    assert {name for name, _ in projector.named_parameters()} == {
        "norm.weight",
        "norm.bias",
        "fc1.weight",
        "fc2.weight",
    }
    assert projector.fc1.weight.shape == (config.vision.hidden_size, 4 * config.vision.hidden_size)
    assert projector.fc2.weight.shape == (config.language.hidden_size, config.vision.hidden_size)
    randomize(projector)
    x = torch.randn(3, ROWS, 4 * config.vision.hidden_size)
    centred = x - x.mean(-1, keepdim=True)
    normed = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * projector.norm.weight
    )
    hidden = (normed + projector.norm.bias) @ projector.fc1.weight.T
    expected = (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ projector.fc2.weight.T
    torch.testing.assert_close(projector(x), expected, atol=1e-5, rtol=1e-5)


def test_pixel_shuffle_joins_neighbouring_patches_two_by_two() -> None:
    side = 4
    channels = 2
    patches = torch.arange(side * side * channels).view(1, side * side, channels)
    grid = patches.view(side, side, channels)
    cells = [
        torch.cat([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]])
        for r in (0, 2)
        for c in (0, 2)
    ]
    assert torch.equal(pixel_shuffle(patches)[0], torch.stack(cells))
