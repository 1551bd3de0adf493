"""A side feature of the training loop, by name."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_vita.config.fields import described, require


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:
    """One callback; its path alone may stand for it."""

    SHORT: ClassVar[str] = "path"

    path: str = described(
        doc="Module and class, my_module.MyCallback: installed, or in the working folder."
    )
    arguments: dict[str, Any] = described({}, "Keyword arguments of the class.")

    def __post_init__(self) -> None:
        parts = self.path.split(".")
        require(
            len(parts) > 1 and all(part.isidentifier() for part in parts),
            f"training.callbacks: path is {self.path!r}: my_module.MyCallback is needed",
        )
