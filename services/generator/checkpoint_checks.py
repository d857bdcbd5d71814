"""What a policy must be before the engine sees it. A bad folder would not be refused by vLLM: it would kill it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from services.contracts.checkpoints import Manifest
from services.platform.checkpoints import refusal, verify_checkpoint
from services.platform.store import ArtifactStore

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A policy that passed every check: its folder in the store, that folder on this machine, and its manifest."""

    folder: str
    local: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        """Name of these weights."""
        return self.manifest.version

    def swappable_with(self, other: Checkpoint) -> bool:
        """Whether an engine that runs `other` can load these weights in place."""
        ours, theirs = self.manifest, other.manifest
        return (ours.architecture, ours.config_hash, ours.tokenizer_hash) == (
            theirs.architecture,
            theirs.config_hash,
            theirs.tokenizer_hash,
        )


def check_policy(store: ArtifactStore, folder: str) -> Checkpoint:
    """Check a policy's folder completely (manifest, kind, every file's hash, no pickles, probes). Blocks: use a thread.

    Raises:
        CheckpointRefused: with the file or field at fault and the remedy.
    """
    manifest = verify_checkpoint(store, folder, "policy")
    if manifest.dtype not in DTYPES:
        raise refusal(
            folder, f"its weights are {manifest.dtype}; allowed are {', '.join(DTYPES)}: convert and import it"
        )
    if not manifest.logprob_probes:
        raise refusal(
            folder, "its manifest has no log-prob probes, so a swap to it could not be proven; import the model again"
        )
    if not all(math.isfinite(value) for probe in manifest.logprob_probes for value in probe.logprobs):
        raise refusal(folder, "a probe's log-prob in its manifest is not a finite number; train or import it again")
    if not any(name in manifest.files for name in TOKENIZER_FILES):
        raise refusal(folder, f"it has no tokenizer ({' or '.join(TOKENIZER_FILES)}); import a complete folder")
    return Checkpoint(folder, store.local_folder(folder), manifest)


def check_swappable(checkpoint: Checkpoint, served: Checkpoint) -> None:
    """Refuse weights that do not fit the running engine.

    Raises:
        CheckpointRefused: naming what differs; `allow_restart` is the remedy.
    """
    ours, theirs = checkpoint.manifest, served.manifest
    for what, new, old in (
        ("architecture", ours.architecture, theirs.architecture),
        ("model shape (config_hash)", ours.config_hash, theirs.config_hash),
        ("tokenizer (tokenizer_hash)", ours.tokenizer_hash, theirs.tokenizer_hash),
    ):
        if new != old:
            raise refusal(
                checkpoint.folder,
                f"its {what} is {new[:24]} and the served policy {served.version} has {old[:24]}, so it cannot be "
                "swapped in place; send allow_restart=true to restart the engine with it",
            )
