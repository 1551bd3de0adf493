"""Checks of installed packages that fail early and say what to do."""

import importlib.metadata
import importlib.util

from megatron_vita.errors import PlatformError


def refuse_unrelated_apex() -> None:
    """Raises PlatformError if `apex` is not NVIDIA's: the package index has an unrelated one of
    that name.

    megatron-core takes any `apex` that it can import, and then fails far from the cause.
    """
    if (
        importlib.util.find_spec("apex") is None
        or importlib.util.find_spec("apex.optimizers") is not None
    ):
        return
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    raise PlatformError(
        f"the installed package apex {version} is not NVIDIA Apex, but an unrelated one from the package index. "
        "Run `pip uninstall apex`; see requirements-gpu.txt for how to get NVIDIA's, which is optional"
    )


def has_transformer_engine() -> bool:
    """Whether Transformer Engine for torch can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_flash_attention_4() -> bool:
    """Whether FlashAttention-4 (package flash-attn-4, module flash_attn.cute) can be imported."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None
