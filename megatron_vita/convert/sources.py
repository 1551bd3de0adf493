"""What weights can come from: a Hugging Face folder or a GGUF file."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.config import ModelConfig
from megatron_vita.convert.config_file import CONFIG, Config
from megatron_vita.convert.families.layouts import Layout, layout_of
from megatron_vita.convert.formats import pickle_reader, safetensors_reader
from megatron_vita.convert.formats.pickle_reader import PickledSource
from megatron_vita.convert.formats.safetensors_reader import SafetensorsSource
from megatron_vita.convert.formats.safetensors_writer import SafetensorsWriter
from megatron_vita.convert.formats.tensors import TensorInfo, TensorSource, same_bits
from megatron_vita.convert.sidecar_files import SPARE, copy_companions, has_tokenizer
from megatron_vita.errors import CheckpointError
from megatron_vita.text.tokenizer import load_tokenizer

GGUF = ".gguf"
_HEADS = {  # output layers, and the embeddings that they may be tied to
    "lm_head.weight": "model.embed_tokens.weight",
    "language_model.lm_head.weight": "language_model.model.embed_tokens.weight",
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source whose config and tensors are known, and not yet read."""

    path: Path
    layout: Layout
    config: Config
    model: ModelConfig  # of which the layout's parts count
    tensors: TensorSource
    # an output layer that the config ties to the embedding, and that is equal to it
    repeated: tuple[str, ...] = ()

    def spare(self) -> dict[str, TensorInfo]:
        """Tensors that the model has no use for, and that travel along."""
        aside = (*self.layout.spare, *self.repeated)
        return {name: info for name, info in self.tensors.infos.items() if name.startswith(aside)}

    def wanted(self) -> dict[str, TensorInfo]:
        """Tensors that must be the model's."""
        aside = (*self.layout.spare, *self.layout.others, *self.repeated)
        needed = {name for rule in self.layout.table(self.model) for name in rule.theirs}
        infos = self.tensors.infos
        return {
            name: info
            for name, info in infos.items()
            if name in needed or not name.startswith(aside)
        }

    def write_companions(self, folder: Path) -> None:
        """Writes what travels with the weights, the config included."""
        if spare := self.spare():
            (folder / SPARE).mkdir(parents=True)
            writer = SafetensorsWriter(
                folder / SPARE, [spare], largest=sum(info.nbytes for info in spare.values())
            )
            for name in spare:
                writer.write(name, self.tensors.read(name))
            writer.close()
        if self.path.is_dir():
            copy_companions(self.path, folder)
            return
        from megatron_vita.convert.formats.gguf_reader import write_gguf_companions

        write_gguf_companions(self.path, folder)
        (folder / CONFIG).write_text(json.dumps(self.config.values, indent=2) + "\n")

    def tokenizer_size(self) -> int:
        """Entries of its tokenizer with the special tokens of media; 0 if it has none."""
        with tempfile.TemporaryDirectory() as folder:
            self.write_companions(Path(folder))
            return load_tokenizer(folder).vocab_size if has_tokenizer(Path(folder)) else 0


def open_source(path: Path) -> Opened:
    """Reads config and headers. CheckpointError, naming file and field or tensor, if anything is
    wrong with them."""
    if path.suffix == GGUF:
        from megatron_vita.convert.formats.gguf_reader import GgufSource

        packed = GgufSource(path)
        return _opened(path, packed.config, packed)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is neither a folder with config.json and safetensors nor a {GGUF} file"
        )
    config = Config.read(path)
    pickled = any((path / name).exists() for name in (pickle_reader.SINGLE, pickle_reader.INDEX))
    safe = any(
        (path / name).exists() for name in (safetensors_reader.SINGLE, safetensors_reader.INDEX)
    )
    return _opened(
        path, config, PickledSource(path) if pickled and not safe else SafetensorsSource(path)
    )


def _opened(path: Path, config: Config, tensors: TensorSource) -> Opened:
    layout = layout_of(config, tensors.infos)
    model = layout.read(config, tensors.infos)
    for head, embedding in _HEADS.items():
        if head in tensors.infos and embedding in tensors.infos:
            tied = layout.read(config, tensors.infos.keys() - {head})
            is_tied = not tied.language.untie_embeddings_and_output_weights
            if is_tied and same_bits(tensors.read(head), tensors.read(embedding)):
                return Opened(
                    path=path,
                    layout=layout,
                    config=config,
                    model=tied,
                    tensors=tensors,
                    repeated=(head,),
                )
    return Opened(path=path, layout=layout, config=config, model=model, tensors=tensors)
