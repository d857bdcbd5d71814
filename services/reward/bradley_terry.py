"""Bradley-Terry reward models: a decoder with a one-label head, read at the last token of the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from services.contracts.scores import ScoreItem, ScorerInfo
from services.reward.scorers import TokenSequence
from services.reward.templates import ConversationTemplate


class BradleyTerryScorer:
    """Raw logits of a transformers sequence classifier (`…ForSequenceClassification` with a `score` head)."""

    def __init__(self, model: Any, template: ConversationTemplate, pad_token_id: int, info: ScorerInfo) -> None:
        self.model = model
        self.template = template
        self.info = info
        self.pad_token_id = pad_token_id

    def prepare(self, items: Sequence[ScoreItem]) -> list[TokenSequence]:
        """Every response as tokens; see `ConversationTemplate.prepare`."""
        return self.template.prepare(items)

    @torch.inference_mode()
    def evaluate(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """The raw logit of each sequence, at its last real token."""
        token_ids, last = pad_right(sequences, self.pad_token_id, self.model.device)
        hidden = last_hidden_state(self.model, token_ids)
        rows = torch.arange(len(sequences), device=hidden.device)
        return self.model.score(hidden[rows, last]).float().squeeze(-1).tolist()

    @torch.inference_mode()
    def evaluate_plainly(self, token_ids: Sequence[int]) -> float:
        """One sequence through transformers' own forward and pooling: what `evaluate` is proved against."""
        return float(self.model(torch.tensor([list(token_ids)], device=self.model.device)).logits[0, 0])


def pad_right(sequences: Sequence[TokenSequence], pad_token_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[batch, longest]`, padded on the right, and the index of each one's last real token `[batch]`."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    rows = [sequence.token_ids + [pad_token_id] * (longest - len(sequence.token_ids)) for sequence in sequences]
    last = [len(sequence.token_ids) - 1 for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(last, device=device)


def last_hidden_state(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states `[batch, seq, hidden]` of right-padded sequences, without an attention mask.

    Causal attention never looks at what comes after, so pads on the right change nothing before them; and without a
    mask attention takes its fast causal path. A model for which this does not hold fails the proof at load.
    """
    return model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
