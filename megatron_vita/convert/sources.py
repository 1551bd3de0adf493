"""Sources of an import: a Hugging Face folder or a GGUF file."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_vita.config import GenerationConfig, MediaConfig, ModelConfig
from megatron_vita.convert.families.config_file import CONFIG, Config
from megatron_vita.convert.families.folder_formats import LONG_VITA, FolderFormat, format_of
from megatron_vita.convert.families.generation import read_generation
from megatron_vita.convert.families.pixels import PROCESSOR, Processors, read_media
from megatron_vita.convert.families.rotary_config import warn_of_dynamic
from megatron_vita.convert.families.vita_processor import read_vita_processor
from megatron_vita.convert.formats.safetensors_writer import SafetensorsWriter
from megatron_vita.convert.formats.tensors import TensorInfo, TensorSource, same_bits
from megatron_vita.convert.formats.weight_files import open_weights
from megatron_vita.convert.settings.export_code import has_our_code
from megatron_vita.convert.settings.sidecar_files import PASSTHROUGH, copy_sidecar_files
from megatron_vita.errors import CheckpointError

GGUF = ".gguf"
ADAPTER = "adapter_config.json"
_HEADS = {  # output layers, and the embeddings that they may be tied to
    "lm_head.weight": "model.embed_tokens.weight",
    "language_model.lm_head.weight": "language_model.model.embed_tokens.weight",
}


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A source with its config and tensor headers, before any tensor is read."""

    path: Path
    folder_format: FolderFormat
    config: Config
    model: ModelConfig  # of which the format's parts count
    tensors: TensorSource
    # an output layer that the config ties to the embedding, and that is equal to it
    repeated: tuple[str, ...] = ()
    media: MediaConfig = field(default_factory=MediaConfig)  # of a format with a vision tower
    # of a format with a language model
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    longest: int = 0  # tokens that it was trained at; 0 where nothing says so

    def passthrough(self) -> dict[str, TensorInfo]:
        """Tensors that the model does not use and that are copied along."""
        aside = (*self.folder_format.passthrough, *self.repeated)
        return {name: info for name, info in self.tensors.infos.items() if name.startswith(aside)}

    def wanted(self) -> dict[str, TensorInfo]:
        """Tensors that the mapping must use."""
        aside = (*self.folder_format.passthrough, *self.folder_format.ignored, *self.repeated)
        needed = {name for rule in self.folder_format.table(self.model) for name in rule.theirs}
        infos = self.tensors.infos
        return {
            name: info
            for name, info in infos.items()
            if name in needed or not name.startswith(aside)
        }

    def write_sidecar_files(self, folder: Path) -> None:
        """Write the files that accompany the weights, including the config."""
        if passthrough := self.passthrough():
            (folder / PASSTHROUGH).mkdir(parents=True)
            writer = SafetensorsWriter(
                folder / PASSTHROUGH,
                [passthrough],
                largest=sum(info.nbytes for info in passthrough.values()),
            )
            for name in passthrough:
                writer.write(name, self.tensors.read(name))
            writer.close()
        if self.path.is_dir():
            copy_sidecar_files(self.path, folder)
            return
        from megatron_vita.convert.formats.gguf_reader import write_gguf_sidecar_files

        write_gguf_sidecar_files(self.path, folder)
        (folder / CONFIG).write_text(json.dumps(self.config.values, indent=2) + "\n")


def open_source(path: Path, *, ignored: Collection[str] = ()) -> OpenedSource:
    """Read a source's configs and tensor headers.

    Raises:
        CheckpointError: something in them is wrong, or a config field is neither used, nor known to
            have no effect, nor `ignored`. The message names file and field or tensor.
    """
    if path.suffix == GGUF:
        from megatron_vita.convert.formats.gguf_reader import GgufSource

        packed = GgufSource(path)
        return _opened(path, packed.config, packed)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is neither a folder with config.json and safetensors nor a {GGUF} file"
        )
    _refuse_adapter(path)
    opened = _opened(path, Config.read(path), open_weights(path))
    opened = replace(opened, media=_media_of(opened, ignored))
    if "language_model" in opened.folder_format.parts:
        language = _language_config(opened.config)
        warn_of_dynamic(language)
        opened = replace(
            opened,
            generation=read_generation(path, ignored=ignored),
            longest=language.integer("max_position_embeddings", 0, least=0),
        )
    # Last, when every reader has had its turn.
    opened.config.refuse_unread(ignored)
    return opened


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with a low-rank adapter, which transformers would apply to the weights."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: the folder is an adapter of a model: merge it into that model "
            "first, as peft's merge_and_unload does"
        )


def _media_of(opened: OpenedSource, ignored: Collection[str]) -> MediaConfig:
    """Media settings of a folder. Long-VITA's own folders have none: its preprocessing is our
    default."""
    if has_our_code(opened.config.values):
        settings = Config.read(opened.path, PROCESSOR)
        media = read_vita_processor(settings, opened.model.vision)
        settings.refuse_unread(ignored)
        return media
    if "vision_model" not in opened.folder_format.parts or opened.folder_format is LONG_VITA:
        return MediaConfig()
    processors = Processors.read(opened.path)
    media = read_media(
        opened.folder_format.name,
        opened.config,
        processors=processors,
        vision=opened.model.vision,
    )
    processors.refuse_unread(ignored)
    return media


def _language_config(config: Config) -> Config:
    """Config of the language model: a nested one, or the whole."""
    parts = [name for name in ("text_config", "llm_config") if config.get(name)]
    if parts:
        return config.part(parts[0])
    return config


def _opened(path: Path, config: Config, tensors: TensorSource) -> OpenedSource:
    folder_format = format_of(config, tensors.infos)
    model = folder_format.read(config, tensors.infos)
    for head, embedding in _HEADS.items():
        # Some folders store the output layer although the config ties it. If both are equal the
        # model stays tied, and the copy travels along for a faithful export.
        if head in tensors.infos and embedding in tensors.infos:
            tied = folder_format.read(config, tensors.infos.keys() - {head})
            is_tied = not tied.language.untie_embeddings_and_output_weights
            if is_tied and same_bits(tensors.read(head), tensors.read(embedding)):
                return OpenedSource(
                    path=path,
                    folder_format=folder_format,
                    config=config,
                    model=tied,
                    tensors=tensors,
                    repeated=(head,),
                )
    return OpenedSource(
        path=path, folder_format=folder_format, config=config, model=model, tensors=tensors
    )
