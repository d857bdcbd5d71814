"""Log-probs of exact responses under a fixed causal model: the reference of the KL estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from services.contracts.errors import InvalidInput
from services.contracts.scores import LogprobItem, ScorerInfo
from services.reward.bradley_terry import last_hidden_state, pad_right
from services.reward.scorers import TokenSequence
from services.reward.templates import too_long

LOGITS_AT_ONCE = 1 << 24
"""fp32 logits held at a time (64 MB): with a vocabulary of 128k that is 131 positions, not a whole batch."""


class LogprobScorer:
    """Sum of the response tokens' log-probs at temperature 1, in nats, computed in fp32."""

    def __init__(self, model: Any, pad_token_id: int, max_tokens: int, info: ScorerInfo) -> None:
        self.model = model
        self.info = info
        self._pad_token_id = pad_token_id
        self._max_tokens = max_tokens
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def prepare(self, items: Sequence[LogprobItem]) -> list[TokenSequence]:
        """Every response of every item behind its prompt, in order.

        Raises:
            InvalidInput: naming the item or response: empty, too long, or with an id outside the vocabulary.
        """
        sequences: list[TokenSequence] = []
        for i, item in enumerate(items):
            prompt = list(item.prompt_token_ids)
            self._check_vocabulary(prompt, f"items.{i}.prompt_token_ids")
            for j, response in enumerate(item.response_token_ids):
                place = f"items.{i}.response_token_ids.{j}"
                if not response:
                    raise InvalidInput("the response has no tokens; drop it before asking for log-probs", field=place)
                self._check_vocabulary(response, place)
                tokens = len(prompt) + len(response)
                if tokens > self._max_tokens:
                    raise too_long(
                        tokens, self._max_tokens, place, remedy="or load the scorer with a larger max_tokens"
                    )
                sequences.append(TokenSequence([*prompt, *response], place, response_start=len(prompt)))
        return sequences

    def _check_vocabulary(self, token_ids: Sequence[int], place: str) -> None:
        if min(token_ids) >= 0 and max(token_ids) < self._vocabulary:
            return
        wrong = next(k for k, token in enumerate(token_ids) if not 0 <= token < self._vocabulary)
        raise InvalidInput(
            f"token id {token_ids[wrong]} is outside the vocabulary of {self._vocabulary:,}; these tokens come from "
            "another tokenizer than the scorer's",
            field=f"{place}.{wrong}",
        )

    def evaluate(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """The summed log-prob of each sequence's response."""
        per_token = self.evaluate_tokens(sequences)
        return [float(values.double().sum()) for values in per_token]

    @torch.inference_mode()
    def evaluate_tokens(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """log p of each response token given all before it: one fp32 tensor `[response]` a sequence.

        The head is applied only where a response token is predicted, some positions at a time.
        """
        token_ids, _ = pad_right(sequences, self._pad_token_id, self.model.device)
        hidden = last_hidden_state(self.model, token_ids)
        positions = [range(s.response_start - 1, len(s.token_ids) - 1) for s in sequences]
        predicting = torch.cat([hidden[row, span.start : span.stop] for row, span in enumerate(positions)])
        targets = torch.cat([token_ids[row, span.start + 1 : span.stop + 1] for row, span in enumerate(positions)])
        head = self.model.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // self._vocabulary)
        chunks: list[torch.Tensor] = []
        for begin in range(0, len(targets), step):
            logits = head(predicting[begin : begin + step]).float()
            chosen = logits.gather(-1, targets[begin : begin + step, None]).squeeze(-1)
            chunks.append(chosen - logits.logsumexp(-1))
        return list(torch.cat(chunks).cpu().split([len(span) for span in positions]))
