"""How answers are drawn where a request does not say."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(kw_only=True)
class GenerationConfig:
    """A server's defaults, as the model's authors advise; those that are null are OpenAI's."""

    temperature: float | None = described(None, "0 takes the likeliest token.")
    top_k: int | None = described(None, "Draw from so many likeliest tokens; 0: all.")
    top_p: float | None = described(None, "Draw from likeliest tokens of this probability.")
    repetition_penalty: float | None = described(
        None, "Above 1: against tokens of prompt and answer."
    )

    def __post_init__(self) -> None:
        right = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 1 << 31),
            "top_p": (1e-9, 1.0),
            "repetition_penalty": (0.01, 100.0),
        }
        for name, (least, most) in right.items():
            value = getattr(self, name)
            require(
                value is None or least <= value <= most,
                f"generation.{name} is {value}: it must be from {least:g} to {most:g}",
            )
