"""Folder of the example's data and runs, and the fields of the recipes that depend on it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.config import Recipe, load_recipe

HERE = Path(__file__).parent
FOLDER = "runs/four_stages"
"""Folder that the recipes name."""
STAGES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Places of a run. Data and material are shared by all seeds of a folder.

    `miniature`: the recipes of the folder of that name, for a laptop in a minute.
    """

    folder: Path = Path(FOLDER)
    seed: int = 0
    miniature: bool = False

    @property
    def data(self) -> Path:
        """JSONL files and media of all sets."""
        return self.folder / "data"

    @property
    def tests(self) -> Path:
        """Questions held out, and their media."""
        return self.folder / "tests"

    @property
    def start(self) -> Path:
        """Checkpoint that stage 1 starts from."""
        return self.folder / "start"

    @property
    def of_seed(self) -> Path:
        """Plans, checkpoints and scores of this seed."""
        if self.seed == 0:
            return self.folder
        return self.folder / f"seed_{self.seed}"

    def checkpoints(self, stage: int) -> Path:
        """Checkpoints of a stage, and the records of its run."""
        return self.of_seed / "checkpoints" / f"stage{stage}"

    def scores(self, stage: int) -> Path:
        """Answers and reports after a stage."""
        return self.of_seed / "scores" / f"stage{stage}"

    def statistics(self, stage: int) -> Path:
        """Page of statistics of a stage's data."""
        return self.of_seed / "statistics" / f"stage{stage}.html"

    def log(self, stage: int) -> Path:
        """Output of a stage's training."""
        return self.of_seed / "logs" / f"stage{stage}.log"

    def recipe_file(self, stage: int) -> Path:
        """Recipe of a stage."""
        folder = HERE / "miniature" if self.miniature else HERE
        return folder / f"stage{stage}.yaml"

    def recipe(self, stage: int, overrides: tuple[str, ...] = ()) -> Recipe:
        """Recipe of a stage in this folder."""
        return load_recipe(self.recipe_file(stage), [*self.overrides(stage), *overrides])

    def all_seeds(self) -> list["RunFolder"]:
        """This folder with each seed that has scores, in their order."""
        found = []
        if (self.folder / "scores").is_dir():
            found.append(0)
        names = (path.parent.name for path in self.folder.glob("seed_*/scores"))
        seeds = (name.removeprefix("seed_") for name in names)
        found += sorted(int(seed) for seed in seeds if seed.isdecimal())
        return [dataclasses.replace(self, seed=seed) for seed in found]

    def overrides(self, stage: int) -> list[str]:
        """Fields of a stage's recipe that depend on folder and seed."""
        recipe = load_recipe(self.recipe_file(stage))
        load = ""
        if stage > 1:
            load = str(self.checkpoints(stage - 1))
        elif recipe.checkpoint.load:
            load = self._moved(recipe.checkpoint.load)
        sets = [self._moved_set(dataclasses.asdict(dataset)) for dataset in recipe.data.train]
        return [
            f"data.train={json.dumps(sets)}",
            f"data.plan={self.of_seed / 'plans' / f'stage{stage}'}",
            f"data.seed={recipe.data.seed + self.seed}",
            f"text.tokenizer={self._moved(recipe.text.tokenizer)}",
            f"training.seed={recipe.training.seed + self.seed}",
            f"checkpoint.save={self.checkpoints(stage)}",
            f"checkpoint.load={load}",
        ]

    def steps_done(self, stage: int) -> int:
        """Steps of the newest complete checkpoint of a stage; 0 without one."""
        # Not through `checkpoint.store`, which takes seconds to import torch.
        latest = self.checkpoints(stage) / "latest"
        if not latest.exists():
            return 0
        return int(latest.read_text().strip().removeprefix("step_"))

    def _moved(self, path: str) -> str:
        """Path of a recipe, in this folder instead of the one that it names."""
        if path.startswith(f"{FOLDER}/"):
            return str(self.folder / path.removeprefix(f"{FOLDER}/"))
        return path

    def _moved_set(self, fields: dict[str, Any]) -> dict[str, Any]:
        moved: dict[str, Any] = {
            name: self._moved(fields[name]) for name in ("jsonl", "media", "shards")
        }
        if self.miniature:
            # A share of a dozen samples would be none.
            moved["ratio"] = 1.0
        return fields | moved
