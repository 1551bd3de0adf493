"""Default sampling parameters of a server."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(kw_only=True)
class GenerationConfig:
    """Sampling defaults recommended by the model's authors; null: the default of OpenAI's API."""

    temperature: float | None = described(None, "Sampling temperature; 0: greedy decoding.")
    top_k: int | None = described(None, "Sample from the k most probable tokens; 0: all.")
    top_p: float | None = described(None, "Sample from the most probable tokens up to this sum.")
    repetition_penalty: float | None = described(
        None, "Penalty on tokens of prompt and answer; above 1 discourages repetition."
    )

    def __post_init__(self) -> None:
        # The bounds are those of requests, so that a default never makes a request invalid.
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
