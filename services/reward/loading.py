"""From a spec to a proven scorer: check the files, check the configuration, load, prove. One function a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from services.contracts.checkpoints import CheckpointKind, Manifest
from services.contracts.errors import InvalidInput
from services.contracts.scores import ScorerInfo, ScorerKind, ScorerSpec
from services.platform.checkpoints import refusal, verify_checkpoint
from services.platform.store import ArtifactStore
from services.reward.bradley_terry import BradleyTerryScorer
from services.reward.logprobs import LogprobScorer
from services.reward.proofs import TOLERANCES, prove_bradley_terry, prove_logprobs
from services.reward.scorers import Scorer
from services.reward.settings import RewardSettings
from services.reward.templates import ConversationTemplate, exact_tokens_hash


@dataclass(frozen=True)
class Source:
    """A checked checkpoint, about to be loaded."""

    spec: ScorerSpec
    manifest: Manifest
    path: str
    config: Any
    tokenizer: Any
    settings: RewardSettings


def make_loader(store: ArtifactStore, settings: RewardSettings) -> Callable[[str, ScorerSpec], Scorer]:
    """The registry's loader over a store."""
    transformers.utils.logging.disable_progress_bar()  # it would write over the JSON log

    def load(name: str, spec: ScorerSpec) -> Scorer:
        return LOADERS[spec.kind](name, open_source(store, spec, settings))

    return load


def open_source(store: ArtifactStore, spec: ScorerSpec, settings: RewardSettings) -> Source:
    """Verify the files, then read configuration and tokenizer. Raises CheckpointRefused."""
    manifest = verify_checkpoint(store, spec.checkpoint, KINDS[spec.kind])
    path = str(store.local_folder(spec.checkpoint))
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise refusal(spec.checkpoint, f"transformers cannot read its config or tokenizer: {error}") from error
    return Source(spec, manifest, path, config, tokenizer, settings)


def load_bradley_terry(name: str, source: Source) -> BradleyTerryScorer:
    """A proven Bradley-Terry scorer. Raises CheckpointRefused, InvalidInput (max_tokens)."""
    folder, config, tokenizer = source.spec.checkpoint, source.config, source.tokenizer
    if config.num_labels != 1:
        raise refusal(folder, f"it has {config.num_labels} labels; a Bradley-Terry reward model has num_labels = 1")
    if not tokenizer.chat_template:
        raise refusal(folder, "its tokenizer has no chat template; add the one it was trained with and import it again")
    pad = _distinct_pad(source)
    max_tokens = _max_tokens(source)
    template = ConversationTemplate(tokenizer, max_tokens=max_tokens, truncate=source.spec.truncate)
    model = _load_model(source, transformers.AutoModelForSequenceClassification)
    if not hasattr(model, "score"):
        raise refusal(
            folder, f"{type(model).__name__} has no `score` head on a decoder; use a …ForSequenceClassification"
        )
    scorer = BradleyTerryScorer(model, template, pad, _info(name, source, model, template.hash))
    proofs = prove_bradley_terry(scorer, source.manifest.score_probes)
    scorer.info = scorer.info.model_copy(update={"proofs": proofs})
    return scorer


def load_logprob(name: str, source: Source) -> LogprobScorer:
    """A proven log-prob scorer. Raises CheckpointRefused, InvalidInput (truncate, max_tokens)."""
    if source.spec.truncate != "refuse":
        raise InvalidInput(
            "a log-prob scorer takes exact token ids, and behind a cut prompt they have other log-probs; use 'refuse'",
            field="truncate",
        )
    max_tokens = _max_tokens(source)
    model = _load_model(source, transformers.AutoModelForCausalLM)
    pad = source.config.pad_token_id
    info = _info(name, source, model, exact_tokens_hash(max_tokens))
    # Any id will do as a pad that nothing looks at: positions are known from the lengths
    scorer = LogprobScorer(model, pad if isinstance(pad, int) else 0, max_tokens, info)
    scorer.info = info.model_copy(update={"proofs": prove_logprobs(scorer, source.manifest.logprob_probes)})
    return scorer


KINDS: dict[ScorerKind, CheckpointKind] = {"bradley_terry": "reward_model", "logprob": "policy"}
"""What kind of checkpoint each kind of scorer is loaded from."""
LOADERS: dict[ScorerKind, Callable[[str, Source], Scorer]] = {
    "bradley_terry": load_bradley_terry,
    "logprob": load_logprob,
}


def _distinct_pad(source: Source) -> int:
    folder, config, tokenizer = source.spec.checkpoint, source.config, source.tokenizer
    pad = config.pad_token_id
    remedy = "give it a pad token of its own, set pad_token_id in config.json, and train or import it again"
    if pad is None or tokenizer.pad_token_id is None:
        raise refusal(folder, f"config.json or its tokenizer has no pad token; {remedy}")
    if pad != tokenizer.pad_token_id:
        raise refusal(
            folder, f"config.json has pad_token_id {pad} and the tokenizer {tokenizer.pad_token_id}; {remedy}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if pad in [*ends, tokenizer.eos_token_id]:
        raise refusal(
            folder, f"its pad token is its eos token ({tokenizer.pad_token!r}, id {pad}), so each engine reads the "
            f"score at another token; {remedy}"
        )  # fmt: skip
    return pad


def _max_tokens(source: Source) -> int:
    limits = [getattr(source.config, "max_position_embeddings", None), source.tokenizer.model_max_length]
    longest = min(int(limit) for limit in limits if limit)
    asked = source.spec.max_tokens
    if asked is not None and asked > longest:
        raise InvalidInput(
            f"max_tokens is {asked:,} and the model of {source.spec.checkpoint!r} takes at most {longest:,}; "
            "lower or leave it out",
            field="max_tokens",
        )
    return asked or longest


def _load_model(source: Source, auto_class: Any) -> Any:
    folder, setting = source.spec.checkpoint, source.settings.reward_dtype
    stored = source.manifest.dtype.removeprefix("torch.")
    dtype = stored if setting == "stored" else setting
    if dtype not in TOLERANCES:
        raise refusal(
            folder, f"its weights are {dtype}, and {', '.join(TOLERANCES)} are supported; set RATCHET_REWARD_DTYPE"
        )
    device = source.settings.reward_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, report = auto_class.from_pretrained(
            source.path,
            config=source.config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise refusal(folder, f"transformers cannot load it: {str(error)[:500]}") from error
    # transformers fills what is missing with random numbers and only warns
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(what):
            names = ", ".join(sorted(str(key) for key in report[what])[:5])
            raise refusal(
                folder, f"its weights do not fit {type(model).__name__} ({what}: {names}); train or import it again"
            )
    return model.eval().requires_grad_(False).to(device)


def _info(name: str, source: Source, model: Any, template_hash: str) -> ScorerInfo:
    return ScorerInfo(
        name=name,
        spec=source.spec,
        revision=source.manifest.version,
        template_hash=template_hash,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        proofs={},
    )
