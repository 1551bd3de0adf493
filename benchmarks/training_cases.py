"""Cases of the training benchmark: a model, a pack, a layout and levers, from options or a file."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_shapes import QWEN2_7B, QWEN2_HALF_B, QWEN3_8B, TINY, TINY_TOWER

from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.config.parsing.yaml_file import read_yaml, resolved
from megatron_vita.errors import ConfigError

MODELS: dict[str, dict[str, Any]] = {
    # InternViT-300M is the default tower, Qwen2.5-14B the default language model
    "7b": {"language": QWEN2_7B},
    "14b": {"language": {}},
    "8b-text": {"language": QWEN3_8B, "text_only": True},
    "small": {"language": QWEN2_HALF_B},
    "tiny": {"language": TINY, "vision": TINY_TOWER},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: model, pack, layout and levers."""

    case: str = ""  # name; empty: made from the rest
    model: str = "7b"
    layers: int = 0  # 0: the model's own
    tokens: int = 32768
    documents: int = 4
    tiles: int = 0  # of a pack; 0: such that 60 % are image tokens
    packs: int = 1  # of a replica in a step
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = True  # where tp is above 1
    backend: str = "auto"
    levers: list[str] = field(default_factory=list)  # overrides of the recipe
    peer: str = ""  # another program in the place of this one
    warm_up: int = 1
    warm_up_tokens: int = 0  # of the packs of warm-up steps; 0: the same packs
    steps: int = 3
    profile: bool = False
    device_gib: int = 0  # of the device's memory that may be used; 0: all

    @property
    def gpus(self) -> int:
        """Number of processes."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def layout(self) -> str:
        """Sizes above 1, as in tp2sp-cp2."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.tp > 1 and self.sp:
            parts[0] += "sp"
        return "-".join(parts) or "1"

    @property
    def name(self) -> str:
        """The given name, or one of all that sets the case apart, fit for a file."""
        if self.case:
            return self.case
        length = str(self.tokens)
        if self.tokens % 1024 == 0:
            length = f"{self.tokens // 1024}k"
        parts = [self.model]
        if self.layers:
            parts.append(f"{self.layers}-layers")
        parts += [length, f"{self.documents}-documents"]
        if self.tiles:
            parts.append(f"{self.tiles}-tiles")
        if self.packs > 1:
            parts.append(f"{self.packs}-packs")
        parts += [self.layout, self.peer or self.backend]
        parts += [lever.split(".")[-1] for lever in self.levers]
        # Names of layouts and levers hold signs that not all file systems take.
        return re.sub(r"[^\w.+-]+", "-", "-".join(part for part in parts if part)).strip("-")

    def recipe(self) -> Recipe:
        """The recipe, with the levers last."""
        model = MODELS[self.model]
        language = dict(model["language"])
        if self.layers:
            language["num_layers"] = self.layers
        tree: dict[str, Any] = {
            "model": model | {"language": language},
            "data": {
                "seq_length": self.tokens,
                "train": [{"name": "random", "shards": "none"}],
                "num_workers": 0,  # packs are made here
            },
            "parallel": {
                "tensor_model_parallel_size": self.tp,
                "context_parallel_size": self.cp,
                "pipeline_model_parallel_size": self.pp,
                "sequence_parallel": self.sp and self.tp > 1,
                "attention_backend": self.backend,
            },
            "training": {
                "global_batch_size": self.packs * self.dp,
                "bf16": self.model != "tiny",
                "recompute_vision": not model.get("text_only", False),
            },
        }
        return recipe_from_dict(tree, self.levers)


def case_from_dict(values: dict[str, Any]) -> Case:
    """A case from plain values.

    Raises:
        ConfigError: an unknown field or model, documents that do not divide the tokens or tiles,
            more tiles than the tokens hold, or what the peer cannot do.
    """
    known = {field.name for field in dataclasses.fields(Case)}
    if unknown := values.keys() - known:
        raise ConfigError(f"case has no field {min(unknown)!r}; known: {', '.join(sorted(known))}")
    case = Case(**values)
    if case.model not in MODELS:
        raise ConfigError(f"model is {case.model!r}; known: {', '.join(MODELS)}")
    if case.tokens % case.documents:
        raise ConfigError(f"tokens {case.tokens} are not a multiple of documents {case.documents}")
    _check_tiles(case)
    if case.peer and (case.gpus != case.dp or case.documents != 1 or case.packs != 1):
        raise ConfigError(
            f"case {case.name}: a peer takes one pack of one document on each GPU: documents 1, packs 1, and dp alone"
        )
    return case


def _check_tiles(case: Case) -> None:
    """Refuse tiles that the pack cannot hold or that do not divide over its documents."""
    if not case.tiles:
        return
    if case.peer or MODELS[case.model].get("text_only"):
        raise ConfigError(f"tiles {case.tiles}: a peer or a text-only model takes none")
    rows = case.recipe().model.vision.image_token_length + 2
    most = case.tokens // case.documents // rows * case.documents
    if case.tiles % case.documents or case.tiles > most:
        raise ConfigError(
            f"tiles {case.tiles}: a multiple of documents {case.documents} is needed, "
            f"at most {most} in {case.tokens} tokens"
        )


def read_cases(path: Path, defaults: dict[str, Any]) -> list[Case]:
    """Cases of a YAML file, a list of mappings of `Case`'s fields; `defaults` are of fields that it
    leaves out.

    Raises:
        ConfigError: the file is no such list, or holds what `case_from_dict` refuses.
    """
    entries = resolved(read_yaml(path, what="cases"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: a list of cases is needed, each a mapping of fields")
    cases = [case_from_dict(defaults | entry) for entry in entries]
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: two cases are named {min(twice)}")
    return cases
