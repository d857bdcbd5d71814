"""Training jobs: what the trainer is asked to do. Names are those of TRL and transformers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from services.contracts.model import Contract, StorePath

Schedule = Literal["constant", "linear", "cosine"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""Where training curves can go besides the event stream; transformers' names."""
NOT_IDENTITY = frozenset({"report_to"})
"""Settings that change what is told of a training and nothing of what comes out of it. What names or compares jobs
and models (ids, work folders, content hashes) leaves them out, so that observing a training never repeats it."""


class TrainingConfig(Contract):
    """Settings that every kind of training has."""

    model_config = ConfigDict(allow_inf_nan=False)

    learning_rate: float = Field(gt=0.0, description="Peak; AdamW. The paper: 5e-7 for DPO of 8B.")
    lr_scheduler_type: Schedule = Field(default="cosine", description="After the warm-up.")
    warmup_fraction: float = Field(default=0.03, ge=0.0, lt=1.0, description="Part of all steps (the paper: 0.03).")
    num_train_epochs: float = Field(default=1.0, gt=0.0, description="Passes over the data.")
    train_batch_size: int = Field(ge=1, description="Examples (pairs) per optimiser step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="Examples per forward pass; must divide train_batch_size. Default: all at once."
    )
    max_length: int = Field(ge=2, description="Most tokens of prompt and response together.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="AdamW's.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradients are scaled down to this norm.")
    bf16: bool = Field(default=False, description="Train in bf16 autocast; weights stay in their stored dtype.")
    gradient_checkpointing: bool = Field(default=False, description="Less memory, more time.")
    save_steps: int = Field(default=50, ge=1, description="Optimiser steps between resumable trainer checkpoints.")
    seed: int | None = Field(default=None, ge=0, lt=2**31, description="Default: the recipe's seed in a run, else 0.")
    report_to: tuple[Tracker, ...] = Field(
        default=(),
        description="Trackers that get the training curves, each installed at the trainer and set up by its own "
        "environment variables there; one that is not installed is refused at once. Not part of a job's identity: a "
        "job that exists keeps the trackers it was first sent with.",
    )

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: a tracker is named twice; name each once")
        return value

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.train_batch_size % micro:
            raise ValueError(
                f"micro_batch_size {micro} does not divide train_batch_size {self.train_batch_size}, so the last micro "
                "batch of each step would be lost; choose a divisor"
            )
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on the assistant's turns."""

    num_train_epochs: float = Field(default=1.0, gt=0.0)
    assistant_only_loss: bool = Field(default=True, description="Learn the assistant's turns, not the user's.")


class RewardModelConfig(TrainingConfig):
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected) (Dong et al. 2024, eq. 3)."""


class DpoConfig(TrainingConfig):
    """DPO (Rafailov et al. 2023, eq. 7) against a fixed reference."""

    beta: float = Field(default=0.1, gt=0.0, description="Strength of the tie to the reference (the paper's eta).")
    loss_type: Literal["sigmoid"] = Field(default="sigmoid", description="DPO's own loss.")
    num_train_epochs: float = Field(default=2.0, gt=0.0, description="Passes over the pairs (the paper: 2).")


class ImportModelJob(Contract):
    """Bring a Hugging Face folder or hub model into the store: checked, safetensors only, with probes and manifest."""

    kind: Literal["import_model"] = "import_model"
    model_kind: Literal["policy", "reward_model"]
    source: str = Field(description="`store:staging/…` (a folder put into the store) or `hub:owner/name[@revision]`.")
    output: StorePath


class SftJob(Contract):
    """Train a policy by imitation."""

    kind: Literal["sft"] = "sft"
    start: StorePath = Field(description="Checkpoint folder training starts from.")
    data: StorePath = Field(description="JSONL or Parquet with `messages`, or `prompt` and `completion`.")
    config: SftConfig
    output: StorePath


class RewardModelJob(Contract):
    """Train a Bradley-Terry reward model from a policy checkpoint or another reward model."""

    kind: Literal["reward_model"] = "reward_model"
    start: StorePath
    data: StorePath = Field(description="JSONL or Parquet with TRL's `prompt`, `chosen`, `rejected` (conversational).")
    heldout: StorePath | None = Field(
        default=None, description="Same columns; its accuracy is reported in the manifest."
    )
    config: RewardModelConfig
    output: StorePath


class DpoJob(Contract):
    """One DPO training: start (warm start), reference (fixed) and pairs are all explicit."""

    kind: Literal["dpo"] = "dpo"
    start: StorePath = Field(description="Checkpoint training starts from; default of a run: the incumbent.")
    reference: StorePath = Field(
        description="Checkpoint of the fixed reference; default of a run: the initial policy, always."
    )
    pairs: tuple[StorePath, ...] = Field(min_length=1, description="pairs.parquet files.")
    config: DpoConfig
    output: StorePath


TrainingJob = Annotated[ImportModelJob | SftJob | RewardModelJob | DpoJob, Field(discriminator="kind")]


class TrainingProgress(Contract):
    """One progress event of a training job."""

    phase: Literal["starting", "preparing", "reference", "training", "saving"]
    waiting: str | None = Field(default=None, description="What a job that has not started waits for: the device.")
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    accuracy: float | None = Field(default=None, description="Part of pairs with a positive implicit (or real) margin.")
    margin: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    warning: str | None = Field(
        default=None, description="What went wrong beside the training: a tracker of report_to that was given up."
    )


class TrainingResult(Contract):
    """Result of a finished training job."""

    checkpoint: str
    version: str
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Last and mean figures: loss, accuracy, margin, …"
    )
    curve: tuple[TrainingProgress, ...] = Field(default=(), description="The logged steps, thinned to at most 200.")
    seconds: float
    resumed_from_step: int | None = None
