"""What a scorer must show before it serves. Each proof gives its measured deviation, or refuses with what was seen."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from services.contracts.checkpoints import LogprobProbe, ScoreProbe
from services.contracts.errors import CheckpointRefused
from services.reward.bradley_terry import BradleyTerryScorer
from services.reward.logprobs import LogprobScorer
from services.reward.scorers import TokenSequence

TOLERANCES = {"float32": (1e-3, 1e-4), "float16": (2e-2, 5e-3), "bfloat16": (1e-1, 2e-2)}
"""dtype -> absolute and relative tolerance: some 10 times the rounding seen. A wrong pooling or a stale head is off by
far more (2.93 instead of -8.10, 0.66 nats a token)."""
PROOF_LENGTHS = (1, 2, 7, 31, 120, 256)
"""Tokens of the sequences of the padding proof: very different, so that padding is most of the batch."""
PROOF_TOKENS = 20_000
"""The proof's sequences are drawn from this many first ids of the vocabulary."""


def prove_bradley_terry(scorer: BradleyTerryScorer, probes: Sequence[ScoreProbe]) -> dict[str, float]:
    """All proofs of a Bradley-Terry scorer.

    Returns:
        `padded_batch`: largest |batched - one by one|; `score_probes`: largest |served - manifest|;
        `leading_bos`: BOS tokens at the start of a templated conversation (0 or 1).

    Raises:
        CheckpointRefused: a proof failed.
    """
    name = scorer.info.spec.checkpoint
    if not probes:
        raise _failed(
            name, "the manifest has no score_probes, so nothing shows that it scores as trained; import it again"
        )
    leading_bos = scorer.template.leading_bos()
    if leading_bos > 1:
        raise _failed(
            name,
            f"the chat template writes BOS {leading_bos} times; remove one from the template, as in training",
        )
    sequences = _proof_sequences(scorer)
    batched = scorer.evaluate(sequences)
    alone = [scorer.evaluate_plainly(sequence.token_ids) for sequence in sequences]
    padded = _deviation(name, scorer.info.dtype, "a padded batch", batched, "one by one", alone)
    probed = [TokenSequence(list(probe.token_ids), f"score_probes.{i}") for i, probe in enumerate(probes)]
    reproduced = _deviation(
        name,
        scorer.info.dtype,
        "the loaded model",
        scorer.evaluate(probed),
        "manifest",
        [probe.score for probe in probes],
    )
    return {"padded_batch": padded, "score_probes": reproduced, "leading_bos": float(leading_bos)}


def prove_logprobs(scorer: LogprobScorer, probes: Sequence[LogprobProbe]) -> dict[str, float]:
    """All proofs of a log-prob scorer, per token.

    Returns:
        `padded_batch`: largest |batched - one by one|; `logprob_probes`: largest |served - manifest|, nats a token.

    Raises:
        CheckpointRefused: a proof failed.
    """
    name = scorer.info.spec.checkpoint
    if not probes:
        raise _failed(
            name, "the manifest has no logprob_probes, so nothing shows that it is the model; import it again"
        )
    sequences = [
        TokenSequence(list(probe.token_ids), f"logprob_probes.{i}", response_start=1) for i, probe in enumerate(probes)
    ]
    shorter = [
        TokenSequence(s.token_ids[: max(2, len(s.token_ids) // 4)], s.place, response_start=1) for s in sequences
    ]
    mixed = [*sequences, *shorter]
    batched = [value for values in scorer.evaluate_tokens(mixed) for value in values.tolist()]
    alone = [value for one in mixed for value in scorer.evaluate_tokens([one])[0].tolist()]
    padded = _deviation(name, scorer.info.dtype, "a padded batch", batched, "one by one", alone)
    expected = [value for probe in probes for value in probe.logprobs]
    reproduced = _deviation(name, scorer.info.dtype, "the loaded model", batched[: len(expected)], "manifest", expected)
    return {"padded_batch": padded, "logprob_probes": reproduced}


def _proof_sequences(scorer: BradleyTerryScorer) -> list[TokenSequence]:
    chance = random.Random(0)
    vocabulary = int(scorer.model.config.vocab_size)
    # transformers takes a pad token at the end of a text for padding, so there is none in these
    allowed = [token for token in range(min(vocabulary, PROOF_TOKENS)) if token != scorer.pad_token_id]
    lengths = sorted({min(length, scorer.template.max_tokens) for length in PROOF_LENGTHS})
    return [TokenSequence(chance.choices(allowed, k=length), f"proof.{length}") for length in lengths]


def _deviation(checkpoint: str, dtype: str, seen_as: str, seen: Sequence[float], expected_as: str,
               expected: Sequence[float]) -> float:  # fmt: skip
    """Largest |seen - expected|. NaN and infinity never pass: every comparison is written so that NaN fails it."""
    absolute, relative = TOLERANCES[dtype]
    largest = 0.0
    for a, b in zip(seen, expected, strict=True):
        allowed = absolute + relative * abs(b)
        if not (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= allowed):
            raise _failed(
                checkpoint,
                f"{seen_as} gives {a:.6g} where {expected_as} gives {b:.6g} (allowed in {dtype}: {allowed:.2g}); the "
                "weights or the engine are others: import it again, or set RATCHET_REWARD_DTYPE=float32",
            )
        largest = max(largest, abs(a - b))
    return largest


def _failed(checkpoint: str, reason: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"checkpoint {checkpoint!r} failed its self-proof and does not serve: {reason}", field="checkpoint"
    )
