"""Choice among a folder's weight files, the same as transformers makes."""

import logging
from pathlib import Path

from megatron_vita.convert.formats import pickle_reader, safetensors_reader
from megatron_vita.convert.formats.pickle_reader import PickledSource
from megatron_vita.convert.formats.safetensors_reader import SafetensorsSource
from megatron_vita.convert.formats.tensors import TensorSource
from megatron_vita.errors import CheckpointError

_SAFE = (safetensors_reader.SINGLE, safetensors_reader.INDEX)
_PICKLED = (pickle_reader.SINGLE, pickle_reader.INDEX)
_KINDS = (".safetensors", ".bin")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
logger = logging.getLogger(__name__)


def open_weights(folder: Path) -> TensorSource:
    """Open a folder's tensors: safetensors before pickles, a single file before an index.

    Weight files that are not read are named in a warning.

    Raises:
        CheckpointError: the folder has no weights.
    """
    names = {path.name for path in folder.iterdir()}
    if names.intersection(_SAFE):
        source: TensorSource = SafetensorsSource(folder)
    elif names.intersection(_PICKLED):
        source = PickledSource(folder)
    else:
        raise CheckpointError(f"{folder}: has none of {', '.join((*_SAFE, *_PICKLED))}")
    read = {info.file.name for info in source.infos.values()}
    # Files of other kinds (ONNX, TensorFlow) are no alternative weights that users would miss.
    aside = sorted(
        name for name in names - read if name.endswith(_KINDS) and name not in _NO_WEIGHTS
    )
    if aside:
        logger.warning(
            "%s: %s is read, as transformers does; not read: %s",
            folder,
            ", ".join(sorted(read)),
            ", ".join(aside),
        )
    return source
