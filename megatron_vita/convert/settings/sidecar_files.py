"""Files that accompany the weights: tokenizer, chat template, generation and processor configs,
code, licence."""

import shutil
from pathlib import Path

FOLDER = "hugging_face"  # in a checkpoint
PASSTHROUGH = "spare"  # in a folder of sidecar files: tensors that the model has no use for
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)


def copy_sidecar_files(source: Path, destination: Path) -> None:
    """Copy all files of a folder but weights into `destination`, which is created."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, destination / file.name)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer that transformers can load."""
    return any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
