r"""VLMEvalKit's run.py with the model `vita`.

    VITA_BASE_URL=http://localhost:8000/v1 \
        python -m megatron_vita.evaluation.adapters.vlmevalkit_model --model vita --data MVBench_MP4

VITA_MODEL names the server's model, VITA_MAX_FRAMES limits frames of a video. Made for VLMEvalKit's
API models of 2026.
"""

import os
from typing import Any

from vlmeval.api.base import BaseAPI

from megatron_vita.evaluation.adapters.asking import HarnessClient
from megatron_vita.evaluation.adapters.prompt_rules import MAX_NEW_TOKENS, Part, long_vita_parts


class VitaAPI(BaseAPI):
    """An API model behind a server, prompted as Long-VITA was."""

    is_api = True
    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_frames: int | None = None,
        **of_the_harness: Any,
    ) -> None:
        """Connect to a server; `of_the_harness` are options such as retry, wait and verbose."""
        super().__init__(**of_the_harness)
        self.client = HarnessClient(
            base_url, model=model, max_new_tokens=max_new_tokens, max_frames=max_frames
        )

    def generate_inner(
        self, inputs: list[dict[str, Any]], dataset: str | None = None, **_: Any
    ) -> tuple[int, str, str]:
        """Return a status (0: success), the answer, and a message to log."""
        parts = [Part(part["type"], part["value"]) for part in inputs]
        kind = None
        if dataset:
            kind = kind_of(dataset)
        asked = [("user", long_vita_parts(parts, benchmark=dataset, kind=kind))]
        if self.system_prompt:
            asked.insert(0, ("system", [Part("text", self.system_prompt)]))
        return 0, self.client.answer(asked), ""


def kind_of(dataset: str) -> str:
    """Return the kind of a dataset's questions by the harness."""
    from vlmeval.dataset import DATASET_TYPE

    return DATASET_TYPE(dataset)


def _from_environment() -> VitaAPI:
    max_frames = None
    if frames := os.environ.get("VITA_MAX_FRAMES"):
        max_frames = int(frames)
    return VitaAPI(
        os.environ["VITA_BASE_URL"], model=os.environ.get("VITA_MODEL"), max_frames=max_frames
    )


if __name__ == "__main__":
    from vlmeval.config import supported_VLM
    from vlmeval.run import main

    supported_VLM["vita"] = _from_environment
    main()
