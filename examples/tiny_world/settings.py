"""The settings of the tiny world: recipe.toml, or recipe-small.toml for a look at a new stack in seconds."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contracts.training import RewardModelConfig, SftConfig

HERE = Path(__file__).parent
FULL, SMALL = HERE / "recipe.toml", HERE / "recipe-small.toml"


@dataclass(frozen=True)
class TinyWorldSettings:
    """Of the services, of each training, and of the run, for one seed. `build` holds what differs from the defaults."""

    seed: int
    small: bool
    environment: dict[str, str]
    build: dict[str, Any]
    sft: SftConfig
    reward_model: RewardModelConfig
    run: dict[str, Any]

    @classmethod
    def read(cls, seed: int = 0, *, small: bool = False) -> TinyWorldSettings:
        """Read the file and put the seed into every part that draws."""
        data = tomllib.loads((SMALL if small else FULL).read_text(encoding="utf-8"))
        return cls(
            seed=seed,
            small=small,
            environment=data["environment"],
            build=data.get("build", {}),
            sft=SftConfig.model_validate({**data["sft"], "seed": seed}),
            reward_model=RewardModelConfig.model_validate({**data["reward_model"], "seed": seed}),
            run=data["run"],
        )

    @property
    def world_name(self) -> str:
        """Name of the folder of this world's files."""
        return f"world-{self.seed}{'-small' if self.small else ''}"
