"""What attention backends are told of a pack's documents."""

import itertools

import pytest
import torch

from megatron_vita import platform
from megatron_vita.config import ParallelConfig, Recipe
from megatron_vita.errors import ConfigError, PlatformError
from megatron_vita.model.backends import TransformerEngineBackend, choose_backend
from megatron_vita.model.documents import pack_documents
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
    packed, angles = TransformerEngineBackend().describe(bounds, inverse_frequencies=torch.ones(4))
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
    apart, joined = torch.tensor([0, 8, 16]), torch.tensor([0, 16])
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
    recipe = Recipe()
    recipe.parallel.attention_backend = "te"
    with pytest.raises(ConfigError, match=r"attention_backend te needs training\.bf16"):
        recipe.__post_init__()
    recipe.training.bf16 = True
    recipe.__post_init__()
    with pytest.raises(PlatformError, match="attention_backend is te, but CUDA is not present"):
        choose_backend(recipe)
