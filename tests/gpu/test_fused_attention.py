"""Transformer Engine runs fused attention or is refused."""

import pytest
import torch

from megatron_vita import platform
from megatron_vita.errors import PlatformError
from tests.gpu.fields import GPUS

pytestmark = pytest.mark.skipif(
    GPUS == 0 or not platform.has_transformer_engine(), reason="needs Transformer Engine"
)


def test_fused_attention_is_found_for_bf16() -> None:
    from megatron_vita.model.backends.fused_attention import check_fused_attention

    check_fused_attention(heads=28, query_groups=4, width=128, dtype=torch.bfloat16)


def test_what_only_unfused_attention_could_do_is_an_error() -> None:
    from megatron_vita.model.backends.fused_attention import check_fused_attention

    with pytest.raises(PlatformError, match="no fused attention for this run"):
        check_fused_attention(heads=28, query_groups=4, width=128, dtype=torch.float32)
