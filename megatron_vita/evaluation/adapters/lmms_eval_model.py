r"""lmms-eval's command with the model `vita`.

    python -m megatron_vita.evaluation.adapters.lmms_eval_model --model vita --tasks mvbench \
        --model_args base_url=http://localhost:8000/v1

Made for lmms-eval 0.7: a chat model, whose requests carry `doc_to_messages`.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from megatron_vita.evaluation.adapters.asking import HarnessClient
from megatron_vita.evaluation.adapters.prompt_rules import MAX_NEW_TOKENS, Part, long_vita_parts

BENCHMARKS = {
    "ocrbench": ("OCRBench", "VQA"),
    "mmmu": ("MMMU_DEV_VAL", "MCQ"),
    "mmstar": ("MMStar", "MCQ"),
    "mvbench": ("MVBench", "Video-MCQ"),
    "mmvet": ("MMVet", "VQA"),
    "mathvista": ("MathVista_MINI", "VQA"),
    "mme": ("MME", "Y/N"),
    "pope": ("POPE", "Y/N"),
    "hallusion": ("HallusionBench", "Y/N"),
    "ai2d": ("AI2D_TEST", "MCQ"),
    "mmbench": ("MMBench", "MCQ"),
    "seedbench": ("SEEDBench_IMG", "MCQ"),
    "scienceqa": ("ScienceQA_TEST", "MCQ"),
    "realworldqa": ("RealWorldQA", "MCQ"),
    "blink": ("BLINK", "MCQ"),
    "mmerealworld": ("MME-RealWorld", "MCQ"),
    "videomme": ("Video-MME", "Video-MCQ"),
    "longvideobench": ("LongVideoBench", "Video-MCQ"),
    "mlvu": ("MLVU_MCQ", "Video-MCQ"),
    "tempcompass": ("TempCompass", "Video-MCQ"),
}
"""VLMEvalKit's names and kinds of benchmarks, by the first letters and digits of lmms-eval's tasks."""


def benchmark_of(task: str) -> tuple[str, str] | None:
    """Return VLMEvalKit's name and kind of a task; None where Long-VITA has no rule.

    The longest matching prefix wins.
    """
    plain = re.sub(r"[^a-z0-9]", "", task.lower())
    fitting = [name for name in BENCHMARKS if plain.startswith(name)]
    if fitting:
        return BENCHMARKS[max(fitting, key=len)]
    return None


class VitaChat(lmms):
    """A chat model behind a server. Tasks without a Long-VITA rule are asked as the harness
    words them."""

    is_simple = False

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        at_once: int = 8,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_frames: int | None = None,
        **of_the_harness: Any,
    ) -> None:
        """Connect to a server. Other options of the harness (batch_size, device) are ignored."""
        super().__init__()
        self.client = HarnessClient(
            base_url, model=model, max_new_tokens=max_new_tokens, max_frames=max_frames
        )
        self.at_once = at_once

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers, in order."""
        # Threads wait for the server, which batches what arrives together.
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(tqdm(pool.map(self._answer, requests), total=len(requests), desc="vita"))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: the protocol gives no likelihoods of given answers."""
        raise NotImplementedError(
            "tasks that compare likelihoods cannot be asked through a chat server"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: not implemented."""
        raise NotImplementedError("tasks of several rounds are not supported")

    def _answer(self, request: Any) -> str:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return self.client.answer([(m["role"], _parts(m, task)) for m in messages])


def _parts(message: Any, task: str) -> list[Part]:
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in content:
        field = "text" if part["type"] == "text" else "url"
        parts.append(Part(part["type"], part[field]))
    # Rules are for questions: system messages and examples of answers stay as they are.
    if message["role"] != "user":
        return parts
    found = benchmark_of(task)
    if found is None:
        return parts
    return long_vita_parts(parts, benchmark=found[0], kind=found[1])


MODEL_REGISTRY_V2.register_manifest(
    ModelManifest(model_id="vita", chat_class_path=f"{VitaChat.__module__}.{VitaChat.__name__}"),
    overwrite=True,
)

if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()
