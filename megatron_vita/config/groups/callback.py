"""A side feature of the training loop, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_vita.config.parsing.fields import Form, check_fields, described

PATH = Form(pattern=r"[^\W\d]\w*(\.[^\W\d]\w*)+", name="my_module.MyCallback")


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:
    """One callback; its path alone may stand for it."""

    SHORT: ClassVar[str] = "path"

    path: str = described(doc="Module and class, installed or in the working folder.", form=PATH)
    arguments: dict[str, Any] = described({}, "Keyword arguments of the class.")

    def __post_init__(self) -> None:
        check_fields(self, "training.callbacks: ")
