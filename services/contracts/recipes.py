"""A recipe: everything a run is told. One TOML file per way of running it (`recipes/`)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from services.contracts.model import Contract, Name, StorePath
from services.contracts.pairs import PairRules
from services.contracts.rollouts import Sampling, SamplingGroup
from services.contracts.training import DpoConfig


class PromptSource(Contract):
    """A prompt set: JSONL or Parquet with `prompt`, `messages`, `context_messages` or MT-Bench's `turns`."""

    path: str = Field(description="Local file (the command line uploads it) or store path `datasets/…`.")
    on_error: Literal["refuse", "skip"] = Field(
        default="refuse", description="A broken line: refuse the file, or skip and count."
    )


class SamplingRecipe(Contract):
    """How an iteration samples."""

    prompts_per_iteration: int = Field(ge=1, description="Fresh prompts an iteration draws (the paper: 20,000).")
    groups: tuple[SamplingGroup, ...] = Field(
        default=(SamplingGroup(n=4, temperature=1.0), SamplingGroup(n=4, temperature=0.7)),
        min_length=1,
        description="The paper: n = 8, half at 1.0 and half at 0.7.",
    )
    max_tokens: int = Field(default=2048, ge=1, description="Most new tokens of a response.")
    chunk_size: int = Field(default=32, ge=1, description="Prompts per job; what a killed worker can lose.")

    def sampling(self) -> Sampling:
        """As sent to the generator."""
        return Sampling(groups=self.groups, max_tokens=self.max_tokens)


class EvaluationRecipe(Contract):
    """How a candidate is judged: on held-out prompts, with the same seeds as the incumbent."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_prompts: int = Field(default=512, ge=2, description="Held-out prompts used (the first ones of the file).")
    n: int = Field(default=1, ge=1, le=1024, description="Responses per held-out prompt; their mean is compared.")
    temperature: float = Field(
        default=1.0, ge=0.0, le=10.0, description="KL is unbiased at temperature 1 and top_p 1 only."
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus sampling; 1: off.")
    max_tokens: int | None = Field(default=None, ge=1, description="Default: as in sampling.")
    chunk_size: int = Field(default=64, ge=1, description="Held-out prompts per job.")
    measure_kl: bool = Field(
        default=True, description="Load the reference beside the scorer and estimate KL(policy || reference)."
    )


class GateRecipe(Contract):
    """When a candidate is promoted."""

    model_config = ConfigDict(allow_inf_nan=False)

    alpha: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="One-sided level of the paired test on held-out rewards."
    )
    min_improvement: float = Field(default=0.0, description="The mean paired reward difference must be above it.")
    max_kl: float | None = Field(
        default=None, gt=0.0, description="Reject above this KL to the reference, nats per response."
    )
    max_length_ratio: float | None = Field(
        default=None, gt=0.0, description="Reject when responses grow beyond this multiple."
    )


class GeneratorRecipe(Contract):
    """What the run asks of the generator."""

    trial_traffic: Literal["wait", "serve"] = Field(
        default="wait",
        description="Outside requests while a candidate is on trial: wait (bounded), or be answered by it.",
    )


class Recipe(Contract):
    """A run. Unknown keys are refused, here and in every table."""

    name: Name = Field(default="run", description="First part of the run's id, when no id is given.")
    policy: str = Field(
        description="Local folder, hub name, or store checkpoint `models/…`: the SFT model, the fixed reference."
    )
    reward_model: str = Field(description="Local folder, hub name, or store checkpoint `models/…`.")
    iterations: int = Field(default=3, ge=0, description="Iterations triggered at once when the run is created.")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="The same recipe and seed draw the same prompts and sampling seeds."
    )
    prompts: PromptSource
    heldout: PromptSource
    sampling: SamplingRecipe
    reward_max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of a conversation that is scored. Default: the reward model's own."
    )
    reward_truncate: Literal["refuse", "left"] = Field(
        default="refuse", description="A conversation longer than that: an error that names it, or cut from the left."
    )
    pairs: PairRules = PairRules()
    dpo: DpoConfig
    start_from: Literal["incumbent", "reference"] = Field(
        default="incumbent", description="Weights each DPO training starts from."
    )
    evaluation: EvaluationRecipe = EvaluationRecipe()
    gate: GateRecipe = GateRecipe()
    generator: GeneratorRecipe = GeneratorRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = sum(group.n for group in self.sampling.groups)
        if n < 2:
            raise ValueError(
                f"sampling.groups: {n} response per prompt cannot make a pair; rule {self.pairs.rule!r} needs n >= 2"
            )
        if all(group.temperature == 0.0 for group in self.sampling.groups):
            raise ValueError(
                "sampling.groups: at temperature 0 all responses are the same; at least one group must be above 0"
            )
        if self.gate.max_kl is not None and not self.evaluation.measure_kl:
            raise ValueError("gate.max_kl needs evaluation.measure_kl = true; without it there is no KL to compare")
        if self.sampling.max_tokens >= self.dpo.max_length:
            raise ValueError(
                f"dpo.max_length ({self.dpo.max_length}) must be above sampling.max_tokens "
                f"({self.sampling.max_tokens}): it has to hold the prompt and the longest response"
            )
        return self


class ResolvedModels(Contract):
    """Store folders a recipe's `policy` and `reward_model` resolve to, and whether a job must still import them."""

    policy: StorePath
    reward_model: StorePath
    policy_import: str | None = Field(
        default=None, description="Source of the import job, when the folder has to be made."
    )
    reward_model_import: str | None = None
