"""Default sampling parameters of a server."""

from dataclasses import dataclass

from megatron_vita.config.parsing.fields import check_fields, described


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling defaults recommended by the model's authors; null: the default of OpenAI's API.

    Bounds are those of requests, so that a default never makes a request invalid.
    """

    temperature: float | None = described(
        None, "Sampling temperature; 0: greedy decoding.", ge=0, le=100
    )
    top_k: int | None = described(None, "Sample from the k most probable tokens; 0: all.", ge=0)
    top_p: float | None = described(
        None, "Sample from the most probable tokens up to this sum.", gt=0, le=1
    )
    repetition_penalty: float | None = described(
        None,
        "Penalty on tokens of prompt and answer; above 1 discourages repetition.",
        ge=0.01,
        le=100,
    )

    def __post_init__(self) -> None:
        check_fields(self, "generation.")
