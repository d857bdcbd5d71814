"""Settings of the orchestrator, from the environment (`RATCHET_…`)."""

from __future__ import annotations

from pydantic import Field

from services.platform.settings import ServiceSettings


class OrchestratorSettings(ServiceSettings):
    """Where the other services are, how long each may take, and how much is done at once."""

    generator_url: str = Field(default="http://127.0.0.1:8001", description="The generator's gateway.")
    reward_url: str = Field(default="http://127.0.0.1:8002")
    trainer_url: str | None = Field(
        default=None,
        description="The trainer's API, for GET /v1/services and for the trackers a new run may report to: its jobs "
        "come from the queue.",
    )

    dashboard: bool = Field(default=True, description="Serve the dashboard at /ui/.")

    sweep_seconds: float = Field(
        default=30.0, gt=0.0, description="Plan again at least this often; bounds a lost message."
    )
    redis_seconds: float = Field(default=5.0, gt=0.0, description="Deadline of a request's calls to Redis; then 503.")
    store_seconds: float = Field(default=10.0, gt=0.0, description="Deadline of the store's readiness probe.")
    health_seconds: float = Field(
        default=3.0,
        gt=0.0,
        description="Deadline of each service asked by GET /v1/services; then it is unreachable. Also of the trainer, "
        "when POST /v1/runs asks for its trackers.",
    )
    health_age_seconds: float = Field(
        default=1.0, ge=0.0, description="Services that were asked less long ago are not asked again."
    )
    lease_seconds: float = Field(default=10.0, gt=0.0, description="A dead conductor's place is taken after this long.")
    stuck_seconds: float = Field(
        default=180.0, gt=0.0, description="Not alive when the conductor has not planned for so long."
    )
    control_seconds: float = Field(
        default=15.0,
        gt=0.0,
        description="How long `resume` waits for jobs that are being cancelled, and any change for the conductor.",
    )

    generate_concurrency: int = Field(
        default=2, ge=1, description="Chunks generated at once: one fills the other's tail."
    )
    score_concurrency: int = Field(default=2, ge=1, description="Chunks scored at once.")
    control_concurrency: int = Field(default=1, ge=1, description="Light jobs (prompts, pairs, load, decide) at once.")
    chunks_ahead: int = Field(
        default=3,
        ge=1,
        description="Chunks queued or running at once in a stage; `pause` waits for no more than these.",
    )

    policy_seconds: float = Field(
        default=900.0, gt=0.0, description="Deadline of one PUT /v1/policy: a cold engine start of a large model."
    )
    wait_seconds: float = Field(
        default=900.0,
        gt=0.0,
        description="How long a job waits for a service that is down or starting before it fails.",
    )
    wait_pause_seconds: float = Field(default=1.0, gt=0.0, description="Between two tries while waiting for a service.")
    rollout_silence_seconds: float = Field(
        default=600.0,
        gt=0.0,
        description="Longest silence of a rollout stream: one prompt with n responses of full length.",
    )
    prompt_rounds: int = Field(default=4, ge=1, description="Tries in a row that may bring no answer to any prompt.")
    score_seconds: float = Field(default=300.0, gt=0.0, description="Deadline of one scoring request.")
    scorer_load_seconds: float = Field(default=600.0, gt=0.0, description="Deadline of loading a scorer.")
    score_batch_prompts: int = Field(default=8, ge=1, description="Prompts (with all responses) per scoring request.")

    dataset_max_bytes: int = Field(
        default=512 * 1024 * 1024, ge=1, description="Largest upload of POST /v1/datasets, bytes."
    )
    keepalive_seconds: float = Field(
        default=15.0, gt=0.0, description="An event stream sends a comment after this silence."
    )
