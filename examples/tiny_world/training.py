"""The tiny world's models: an untrained base, SFT on it, and a reward model from that; made by the trainer's jobs."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_world.files import BuiltWorld
from examples.tiny_world.progress import Progress
from examples.tiny_world.settings import TinyWorldSettings
from ratchet.client import RatchetClient
from services.contracts.checkpoints import PolicyInfo
from services.contracts.training import NOT_IDENTITY, ImportModelJob, RewardModelJob, SftJob, TrainingJob

ENGINE_SECONDS = 600.0
"""The first policy starts vLLM."""
JOB_SECONDS = 900.0
SHOWN_METRICS = ("loss", "accuracy", "heldout_accuracy")


@dataclass(frozen=True)
class Models:
    """Store paths of the models. They are named by the content of what they are made from: made once, found again."""

    base: str
    sft: str
    reward_model: str

    @classmethod
    def of(cls, world: BuiltWorld, settings: TinyWorldSettings) -> Models:
        """The names of this world's models."""
        base = content_hash(*sorted(world.base.glob("*")))
        sft = content_hash(world.sft, extra=base + settings.sft.model_dump_json(exclude=set(NOT_IDENTITY)))
        config = settings.reward_model.model_dump_json(exclude=set(NOT_IDENTITY))
        reward_model = content_hash(world.preferences, extra=sft + config)
        return cls(f"models/tiny-base-{base}", f"models/tiny-sft-{sft}", f"models/tiny-rm-{reward_model}")


def train_models(
    client: RatchetClient, world: BuiltWorld, models: Models, settings: TinyWorldSettings, progress: Progress
) -> dict[str, float]:
    """Have the three models made; returns the seconds each took (near 0 when it was there already).

    vLLM starts with the SFT model while the reward model trains, unless it serves something already.
    """
    seconds: dict[str, float] = {}

    def train(name: str, job: TrainingJob) -> None:
        began = time.monotonic()
        with progress.job(name) as watch:
            result = client.wait_job(client.submit_job(job).id, watch, JOB_SECONDS)
        seconds[name] = time.monotonic() - began
        figures = ", ".join(f"{key} {result.metrics[key]:.3g}" for key in SHOWN_METRICS if key in result.metrics)
        progress.remark(f"{name}: {seconds[name]:.1f} s, {result.version}  {figures}".rstrip())

    source = client.stage_model(world.base)
    train("import", ImportModelJob(model_kind="policy", source=f"store:{source}", output=models.base))
    sft_data = client.upload_dataset(world.sft, kind="any").path
    train("sft", SftJob(start=models.base, data=sft_data, config=settings.sft, output=models.sft))
    with ThreadPoolExecutor(1) as background:
        engine = _start_engine(client, models.sft, background)
        train(
            "reward model",
            RewardModelJob(
                start=models.sft,
                data=client.upload_dataset(world.preferences, kind="any").path,
                heldout=client.upload_dataset(world.preferences_heldout, kind="any").path,
                config=settings.reward_model,
                output=models.reward_model,
            ),
        )
        if engine is not None:
            if not engine.done():
                progress.remark("waiting for vLLM to start with the SFT model")
            engine.result()
    return seconds


def _start_engine(client: RatchetClient, sft: str, background: ThreadPoolExecutor) -> Future[PolicyInfo] | None:
    """Load the SFT model in the background; None when a policy is served, which may be another run's."""
    if client.policy().state != "empty":
        return None
    return background.submit(client.set_policy, sft, timeout_seconds=ENGINE_SECONDS)


def content_hash(*files: Path, extra: str = "") -> str:
    """Twelve hex digits that change when a file or `extra` does."""
    digest = hashlib.sha256(extra.encode())
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
