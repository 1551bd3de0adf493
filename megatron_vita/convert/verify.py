"""Verification of a conversion: every tensor both ways, bit by bit, and logits of forward passes."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe
from megatron_vita.convert.exporting import read_ours
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.formats.tensors import TensorSource, same_bits
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.probes import QUESTION, Probe, encoder_of, make_probes, question_ids
from megatron_vita.convert.progress import ProgressBar
from megatron_vita.convert.settings.export_code import has_our_code
from megatron_vita.convert.sources import GGUF
from megatron_vita.convert.transfers import Transfer
from megatron_vita.costs.memory.parameters import model_parameters
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.errors import CheckpointError
from megatron_vita.layout.slicing import IGNORED_LABEL, slice_pack
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.text.hugging_face import transformers_tokenizer

ROWS = 32  # whose logits are compared, at most, of each prompt
CLOSE = 1e-3  # of the largest logit: fp32 on both sides, whatever the order of sums
logger = logging.getLogger(__name__)


def compare_tensors(transfers: list[tuple[Transfer, TensorSource]], checkpoint: Path) -> None:
    """Raise CheckpointError unless joining theirs gives ours and splitting ours gives theirs, bit
    by bit."""
    source = DistSource(checkpoint)
    with ProgressBar(
        "comparing", nbytes=sum(transfer.nbytes for transfer, _ in transfers)
    ) as progress:
        for transfer, theirs in transfers:
            ours = read_ours(source, transfer)
            if not same_bits(transfer.join(theirs.read), ours):
                raise CheckpointError(
                    f"{checkpoint}: tensor {transfer.location} is not what {transfer.rule.theirs} make up"
                )
            for name, tensor in transfer.split(ours).items():
                if not same_bits(tensor, theirs.read(name)):
                    raise CheckpointError(
                        f"{checkpoint}: tensor {transfer.location} is not split into {name} as it was read"
                    )
                theirs.release(name)
            source.release(transfer.location)
            progress.advance(transfer.nbytes)


def compare_logits(checkpoint: Path, folder: Path | None) -> str:
    """Run forward passes of the checkpoint over texts, an image and a video, and, where it can load
    `folder`, of transformers.

    Says in sentences what was compared and what was not. CheckpointError if logits are no numbers,
    or not those of transformers, or if a question has other token ids by the folder's template.
    """
    recipe = store.recipe_of(checkpoint)
    needed = model_parameters(recipe.model) * 4 * (1 if folder is None else 2)
    free = psutil.virtual_memory().available
    # Weights in fp32 alone: activations need some of the rest.
    if needed > 0.8 * free:
        return (
            f"no forward pass: it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        )
    probes = make_probes(recipe, checkpoint)
    ours = _our_logits(checkpoint, recipe, probes)
    for probe, logits in zip(probes, ours, strict=True):
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                f"{checkpoint}: logits of {probe.name} are NaN or infinite in a forward pass"
            )
    theirs = Reference.open(folder)
    said = [_compare(checkpoint, theirs, probes, ours)]
    if theirs.model is not None and (encoder := encoder_of(recipe, checkpoint)) is not None:
        said.append(theirs.compare_prompt(encoder))
    return "; ".join(filter(None, said))


def _compare(checkpoint: Path, theirs: "Reference", probes: list[Probe], ours: list[Tensor]) -> str:
    """Logits of both, probe by probe."""
    compared: list[str] = []
    alone: list[str] = []
    farthest = 0.0
    for probe, logits in zip(probes, ours, strict=True):
        if not theirs.takes(probe):
            alone.append(probe.name)
            continue
        # Either model may have rows that pad the vocabulary.
        expected = theirs.logits(probe)[:, : logits.shape[1]]
        apart = float((logits[:, : expected.shape[1]] - expected).abs().max())
        apart /= float(expected.abs().max())
        # Not `apart > CLOSE`, which NaN would pass.
        if not apart <= CLOSE:
            raise CheckpointError(
                f"{checkpoint}: logits of {probe.name} are {apart:.1e} (of the largest) away from those of "
                f"transformers for {theirs.folder}; {CLOSE:.0e} is allowed"
            )
        compared.append(probe.name)
        farthest = max(farthest, apart)
    said = []
    if compared:
        said.append(
            f"forward passes gave transformers' logits, at most {farthest:.1e} of the largest apart, "
            f"for {', '.join(compared)}"
        )
    if alone:
        said.append(f"not compared, for {theirs.lacks}, but finite: {', '.join(alone)}")
    return "; ".join(said)


@torch.no_grad()
def _our_logits(checkpoint: Path, recipe: Recipe, probes: list[Probe]) -> list[Tensor]:
    """fp32 logits [at most ROWS, V] after the last tokens of each probe."""
    platform.initialize_process()
    recipe = Recipe(model=recipe.model)  # in fp32 on one rank, whatever it is trained with
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe).eval()
    store.load_weights([model], checkpoint)
    return [_forward(model, probe, recipe) for probe in probes]


def _forward(model: VitaModel, probe: Probe, recipe: Recipe) -> Tensor:
    length = len(probe.ids)
    pack = slice_pack(
        probe.ids,
        labels=torch.full_like(probe.ids, IGNORED_LABEL),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        placements=probe.placements,
        frames=torch.zeros(len(probe.placements), dtype=torch.bool),
        rows_per_tile=recipe.model.vision.image_token_length,
        layout=groups.rank_layout(),
    )
    # The last ones, since they depend on all tokens and tiles before them.
    rows = torch.arange(max(length - ROWS, 0), length)
    pixels = probe.pixels.to(platform.device())
    return model(pixels, pack.to(platform.device()), wanted_rows=rows).cpu()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers' model of a folder.

    Without a model, `lacks` says why: loading it would run code of the folder. The modelling files
    of our own exports are run from this package, not from the folder.
    """

    folder: Path | None
    model: Any = None
    lacks: str = ""

    @classmethod
    def open(cls, folder: Path | None) -> "Reference":
        """Load a folder or a GGUF file in fp32."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        from megatron_vita.convert.exported.modeling_vita import VitaForConditionalGeneration

        if folder is None:
            return cls(folder=None, lacks="the format holds no language model")
        # Code of a folder is never run, however it is named there.
        place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        path = folder
        if folder.suffix == GGUF:
            path = folder.parent
            place["gguf_file"] = folder.name
        if folder.is_dir() and has_our_code(Config.read(folder).values):
            ours = VitaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
            return cls(folder=folder, model=ours.eval())
        try:
            config = AutoConfig.from_pretrained(path, **place)
            whole = hasattr(config, "vision_config")
            loader = AutoModelForImageTextToText if whole else AutoModelForCausalLM
            model = loader.from_pretrained(path, dtype=torch.float32, **place).eval()
        # Such as an unknown model type or a missing field: no error of the checkpoint.
        except (ValueError, KeyError, OSError) as error:
            logger.warning(
                "%s: transformers cannot load it, so logits are not compared: %s",
                folder,
                error,
            )
            return cls(folder=folder, lacks=f"transformers has no class for {folder.name}")
        lacks = "" if whole else f"transformers' {type(model).__name__} takes no images and videos"
        return cls(folder=folder, model=model, lacks=lacks)

    def takes(self, probe: Probe) -> bool:
        """Return true if the model accepts a probe."""
        return self.model is not None and (not len(probe.pixels) or not self.lacks)

    @torch.no_grad()
    def logits(self, probe: Probe) -> Tensor:
        """Logits [rows, vocabulary] of the last positions of a probe, in float32."""
        media = {"pixel_values": probe.pixels} if len(probe.pixels) else {}
        found = self.model(input_ids=probe.ids[None], logits_to_keep=ROWS, **media)
        return found.logits[0].float()

    def compare_prompt(self, encoder: SampleEncoder) -> str:
        """Compare the ids of a question with those of the folder's chat template, where it has
        one."""
        if self.folder is None or not self.folder.is_dir():
            return ""
        tokenizer = transformers_tokenizer(self.folder)
        if not tokenizer.chat_template:
            return "the folder has no chat template to compare prompts with"
        messages = [{"role": "user", "content": QUESTION}]
        rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        expected = list(rendered["input_ids"])
        ours = question_ids(encoder).tolist()
        if ours != expected:
            raise CheckpointError(
                f"{self.folder}: a question becomes {tokenizer.decode(expected)!r} by the chat template, "
                f"but {tokenizer.decode(ours)!r} by the recipe"
            )
        return "a question has the token ids of the chat template"
