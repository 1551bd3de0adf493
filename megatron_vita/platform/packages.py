"""Checks of installed packages that fail early and name the remedy."""

import importlib.metadata
import importlib.util

from megatron_vita.errors import PlatformError


def refuse_unrelated_apex() -> None:
    """Refuse an installed `apex` that is not NVIDIA's: the package index has an unrelated one.

    megatron-core uses any `apex` that can be imported, and then fails far from the cause.

    Raises:
        PlatformError: the unrelated package is installed.
    """
    if importlib.util.find_spec("apex") is None:
        return
    # NVIDIA's has this module, the unrelated one has not.
    if importlib.util.find_spec("apex.optimizers") is not None:
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
    """Tell whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_flash_attention_4() -> bool:
    """Tell whether FlashAttention-4 (package flash-attn-4, module flash_attn.cute) is installed."""
    # `find_spec` of a submodule raises where the package is missing.
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None


def has_bitsandbytes() -> bool:
    """Tell whether bitsandbytes, the kernels of 4-bit weights, is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None
