"""Configuration of a vision-language model that megatron_vita has exported."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# Fields of the model as a whole; all others are the language model's.
_OWN = (
    *("architectures", "auto_map", "transformers_version", "name_or_path", "_name_or_path"),
    *("dtype", "torch_dtype", "attn_implementation", "output_attentions", "output_hidden_states"),
)


class VitaConfig(PreTrainedConfig):
    """Fields of the language model, and beside them those of vision tower and placeholders.

    Args:
        visual: fields of the vision tower, an InternViT.
        language_model_type: model type of the language model in transformers.
        media_token_ids: ids of the placeholders that feature rows of images and videos replace.
        fields: fields of the language model's own configuration.
    """

    model_type = "long_vita"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # an attribute of transformers' class

    def __init__(
        self,
        visual: Mapping[str, Any] | None = None,
        language_model_type: str = "qwen2",
        media_token_ids: Sequence[int] = (),
        **fields: Any,
    ) -> None:
        own = {name: fields.pop(name) for name in _OWN if name in fields}
        fields.pop("model_type", None)
        self.visual = dict(visual or {})
        self.language_model_type = language_model_type
        self.media_token_ids = list(media_token_ids)
        self.text_config = AutoConfig.for_model(language_model_type, **fields)
        super().__init__(**own)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, those of the language model beside the others as in config.json."""
        fields = super().to_dict()
        language = fields.pop("text_config")
        language.pop("model_type")
        return language | fields
