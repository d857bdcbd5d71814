"""Where everything lives in the artifact store. Paths are derived from what they hold, never made up."""

from __future__ import annotations

import re

from services.contracts.checkpoints import MANIFEST_NAME

ALL_RUNS = "runs"
"""Topic of the events that tell of changes in any run. A run's own topic is its id, so no run may be called this."""

STORE_FORMAT = 1
"""Number of the layout that this page describes. Raise it when a release can no longer read what the last one wrote
(a path moved, a column changed its meaning), and say in the release notes how a store is brought over."""

FORMAT_FILE = "FORMAT.json"
"""Says which STORE_FORMAT a store has; see `platform.store_format`."""


def run_file(run: str) -> str:
    """`run.json` of a run."""
    return f"runs/{run}/run.json"


def control_file(run: str) -> str:
    """`control.json` of a run."""
    return f"runs/{run}/control.json"


def iteration_folder(run: str, iteration: int) -> str:
    """Folder of one iteration."""
    return f"runs/{run}/iter-{iteration}"


def prompts_file(run: str, iteration: int) -> str:
    """The prompts an iteration drew."""
    return f"{iteration_folder(run, iteration)}/prompts.parquet"


def heldout_file(run: str) -> str:
    """The run's held-out prompts, fixed when the run is created."""
    return f"runs/{run}/heldout.parquet"


def pool_file(run: str) -> str:
    """The run's whole prompt pool, normalised to messages."""
    return f"runs/{run}/pool.parquet"


def rollouts_file(run: str, iteration: int, chunk: int, *, evaluation: bool = False) -> str:
    """One chunk of rollouts, of sampling or of evaluation."""
    part = "evaluation/rollouts" if evaluation else "rollouts"
    return f"{iteration_folder(run, iteration)}/{part}/{chunk:05d}.parquet"


def scores_file(run: str, iteration: int, chunk: int, *, evaluation: bool = False) -> str:
    """One chunk of scores, beside its rollouts."""
    part = "evaluation/scores" if evaluation else "scores"
    return f"{iteration_folder(run, iteration)}/{part}/{chunk:05d}.parquet"


def pairs_file(run: str, iteration: int) -> str:
    """The iteration's preference pairs."""
    return f"{iteration_folder(run, iteration)}/pairs.parquet"


def checkpoint_folder(run: str, iteration: int) -> str:
    """The iteration's trained policy."""
    return f"{iteration_folder(run, iteration)}/checkpoint"


def iteration_file(run: str, iteration: int) -> str:
    """The iteration's record."""
    return f"{iteration_folder(run, iteration)}/iteration.json"


def judgements_folder(run: str, iteration: int) -> str:
    """What judges say of the iteration's policy, a file each."""
    return f"{iteration_folder(run, iteration)}/judgements"


def judgement_file(run: str, iteration: int, judge: str) -> str:
    """One judge's judgement."""
    return f"{judgements_folder(run, iteration)}/{judge}.json"


def manifest_file(folder: str) -> str:
    """Manifest of a checkpoint folder."""
    return f"{folder}/{MANIFEST_NAME}"


def version_of(folder: str) -> str:
    """Policy version of a checkpoint folder: `runs/r/iter-2/checkpoint` -> `r/iter-2`; `models/sft` -> `models/sft`."""
    match = re.fullmatch(r"runs/([^/]+)/(iter-\d+)/checkpoint", folder)
    return f"{match[1]}/{match[2]}" if match else folder
