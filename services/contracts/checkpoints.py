"""Checkpoints: a Hugging Face folder, safetensors only, with a manifest written last."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.contracts.device import DeviceLease
from services.contracts.model import Contract, StorePath, TokenIds

MANIFEST_NAME = "MANIFEST.json"
CheckpointKind = Literal["policy", "reward_model"]


class FileEntry(Contract):
    """Size and hash of one file of a folder."""

    sha256: str
    bytes: int


class LogprobProbe(Contract):
    """A fixed token sequence with the log-prob of each token after the first, in nats, computed in fp32.

    The proof of a hot swap: the engine must give these log-probs afterwards.
    """

    token_ids: TokenIds = Field(min_length=2)
    logprobs: tuple[float, ...] = Field(description="`[seq - 1]`: log p(token_ids[i+1] | token_ids[:i+1]).")

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(
                f"{len(self.token_ids)} tokens need {len(self.token_ids) - 1} log-probs, not {len(self.logprobs)}"
            )
        return self


class ScoreProbe(Contract):
    """A fixed token sequence with the raw score the trained reward model gives it: the served scorer must agree."""

    token_ids: TokenIds = Field(min_length=1)
    score: float


class Lineage(Contract):
    """Where a checkpoint came from."""

    job_id: str
    start: str | None = Field(default=None, description="Version of the checkpoint training started from.")
    reference: str | None = Field(default=None, description="Version of the fixed DPO reference.")
    data: dict[str, str] = Field(default_factory=dict, description="Store path of each data file -> its SHA-256.")


class Manifest(Contract):
    """`MANIFEST.json` of a checkpoint folder. A folder without it does not exist for a reader."""

    schema_version: Literal[1] = 1
    kind: CheckpointKind
    version: str = Field(description="Unique name of these weights: `{run}/iter-{t}`, or `models/{name}`.")
    architecture: str = Field(description="`architectures[0]` of config.json, e.g. LlamaForCausalLM.")
    config_hash: str = Field(description="SHA-256 of the shape-giving part of config.json; equal for swappable models.")
    tokenizer_hash: str = Field(
        description="SHA-256 over the tokenizer's vocabulary, special tokens and chat template."
    )
    dtype: str = Field(description="dtype of the stored weights, e.g. float32.")
    parameters: int
    tied_embeddings: bool
    files: dict[str, FileEntry]
    logprob_probes: tuple[LogprobProbe, ...] = ()
    score_probes: tuple[ScoreProbe, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)
    lineage: Lineage
    created_at: str
    libraries: dict[str, str] = Field(default_factory=dict)


class PolicySpec(Contract):
    """Body of `PUT /v1/policy`."""

    checkpoint: StorePath = Field(description="Folder in the artifact store.")
    trial: bool = Field(default=False, description="Candidate on trial for the gate; see `trial_traffic`.")
    trial_traffic: Literal["wait", "serve"] = Field(
        default="wait", description="Outside requests during a trial: wait (bounded), or be answered by the candidate."
    )
    allow_restart: bool = Field(
        default=False,
        description="Restart the engine when this checkpoint has another shape or tokenizer than the served one.",
    )


class PolicyInfo(Contract):
    """Answer of `GET /v1/policy` and `PUT /v1/policy`."""

    state: Literal["empty", "starting", "serving", "swapping", "asleep", "waking", "failed"]
    version: str | None = None
    checkpoint: str | None = None
    trial: bool = False
    model: str | None = Field(default=None, description="Model name for the OpenAI routes.")
    engine_starts: int = Field(default=0, description="How often a vLLM process was started since the gateway started.")
    engine_pid: int | None = None
    swaps: int = 0
    last_swap_seconds: float | None = Field(default=None, description="Gate closed until gate open, seconds.")
    proof_deviation: float | None = Field(
        default=None, description="Largest |log-prob - manifest| of the last proof, nats."
    )
    detail: str | None = Field(default=None, description="Why the state is another than `serving`.")
    lease: DeviceLease | None = Field(default=None, description="Who holds the device while vLLM sleeps.")
