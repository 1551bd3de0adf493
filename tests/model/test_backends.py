"""Metadata of a pack's documents for the attention backends."""

import itertools

import pytest
import torch

from megatron_vita import platform
from megatron_vita.config import ParallelConfig, Recipe
from megatron_vita.errors import ConfigError, PlatformError
from megatron_vita.model.backends import backends
from megatron_vita.model.backends.backends import TransformerEngineBackend, choose_backend
from megatron_vita.model.backends.documents import pack_documents
from megatron_vita.parallel import groups


@pytest.mark.parametrize("seed", range(20))
def test_transformer_engine_is_given_one_tensor_of_bounds_that_ends_with_the_pack(
    seed: int,
) -> None:
    """Padding between and after documents, which its CP ring does not see (TransformerEngine issue
    3331), cannot occur: padded and unpadded bounds are one tensor, whose last entry is the length
    of the pack.
    """
    platform.initialize_process()
    groups.initialize_groups(ParallelConfig())
    lengths = 16 * torch.randint(1, 40, (12,), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *itertools.accumulate(lengths.tolist())], dtype=torch.int32)
    packed, angles = TransformerEngineBackend().attention_metadata(
        bounds, inverse_frequencies=torch.ones(4)
    )
    assert packed.cu_seqlens_q is packed.cu_seqlens_q_padded
    assert packed.cu_seqlens_kv is packed.cu_seqlens_kv_padded
    assert torch.equal(packed.cu_seqlens_q, bounds)
    assert packed.pad_between_seqs is False
    assert packed.max_seqlen_q == packed.max_seqlen_kv == len(angles) == lengths.max()


@pytest.mark.parametrize("cp_rank", [0, 1])
def test_rotary_positions_restart_at_each_document_and_run_on_through_a_joined_pack(
    cp_rank: int,
) -> None:
    """Looked at directly: attention inside a document sees differences of positions only."""
    apart = torch.tensor([0, 8, 16])
    joined = torch.tensor([0, 16])
    positions = [
        pack_documents(bounds, cp_size=2, cp_rank=cp_rank)[1].tolist() for bounds in (apart, joined)
    ]
    assert (
        positions
        == [
            [[0, 1, 6, 7, 0, 1, 6, 7], [0, 1, 2, 3, 12, 13, 14, 15]],
            [[2, 3, 4, 5, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10, 11]],
        ][cp_rank]
    )


@pytest.mark.skipif(platform.on_cuda(), reason="of machines without CUDA")
def test_transformer_engine_is_refused_where_it_cannot_run() -> None:
    te = {"parallel.attention_backend": "te"}
    with pytest.raises(ConfigError, match=r"attention_backend te needs training\.bf16"):
        Recipe().replaced(te)
    recipe = Recipe().replaced(te | {"training.bf16": True})
    with pytest.raises(PlatformError, match="attention_backend is te, but CUDA is not present"):
        choose_backend(recipe)


def on_gpu(monkeypatch: pytest.MonkeyPatch, **found: object) -> None:
    """Pretend a machine with CUDA, Transformer Engine and FlashAttention-4 on Hopper, except as
    given."""
    defaults = {"transformer_engine": True, "flash_attention_4": True, "capability": (9, 0)}
    found = defaults | found
    monkeypatch.setattr(platform, "on_cuda", lambda: True)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: found["transformer_engine"])
    monkeypatch.setattr(platform, "has_flash_attention_4", lambda: found["flash_attention_4"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")


FALLBACKS: list[tuple[dict, dict[str, object], str, str]] = [
    ({}, {}, "fa4", ""),
    ({"flash_attention_4": False}, {}, "te", "not fa4: FlashAttention-4 is not installed"),
    ({"capability": (8, 0)}, {}, "te", "not fa4: A100 is older than Hopper"),
    ({}, {"model.language.kv_channels": 80}, "te", "not fa4: model.language.kv_channels is 80"),
    ({}, {"parallel.context_parallel_size": 2, "parallel.cp_comm_type": "a2a"}, "te",
     "not fa4: parallel.cp_comm_type is a2a"),
    ({"transformer_engine": False}, {}, "torch", "Transformer Engine is not installed"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "fields", "chosen", "line"), FALLBACKS)
def test_auto_takes_the_fastest_backend_that_can_run_and_says_why_no_faster_one(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: dict,
    fields: dict[str, object],
    chosen: str,
    line: str,
) -> None:
    on_gpu(monkeypatch, **found)
    recipe = Recipe().replaced({"training.bf16": True} | fields)
    with caplog.at_level("INFO", logger=backends.__name__):
        assert backends._fastest_backend(recipe) == chosen
    assert len(caplog.messages) == (1 if line else 0)
    assert line in "".join(caplog.messages)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"flash_attention_4": False}, "is fa4, but .* not installed .pip install flash-attn-4"),
        ({"capability": (8, 0)}, "is fa4, but A100 is older than Hopper; use another of auto"),
        ({"transformer_engine": False}, "is fa4, but Transformer Engine is not installed"),
    ],
)
def test_fa4_by_name_is_refused_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, found: dict, message: str
) -> None:
    on_gpu(monkeypatch, **found)
    recipe = Recipe().replaced({"training.bf16": True, "parallel.attention_backend": "fa4"})
    with pytest.raises(PlatformError, match=message):
        choose_backend(recipe)
