"""The files that `build` writes, by name. Apart from `build`, so that who only reads them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BuiltWorld:
    """Where `build` wrote everything."""

    base: Path
    sft: Path
    preferences: Path
    preferences_heldout: Path
    prompts: Path
    heldout: Path
    settings: Path

    @classmethod
    def under(cls, out: Path) -> BuiltWorld:
        """The files of the world in this folder."""
        return cls(
            base=out / "base",
            sft=out / "sft.jsonl",
            preferences=out / "preferences.jsonl",
            preferences_heldout=out / "preferences_heldout.jsonl",
            prompts=out / "prompts.jsonl",
            heldout=out / "heldout.jsonl",
            settings=out / "build_settings.json",
        )
