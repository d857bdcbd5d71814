"""Plain forward passes without gradients: log-probs of token sequences, scores of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass: enough to fill a CPU, and what trains on a GPU has room for them there."""


def token_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    """Log-prob of each token after the first, `[seq - 1]`, nats, from fp32 logits; one sequence, no padding."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(token_ids)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    bf16: bool,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Sum of each response's token log-probs after its prompt, `[sequences]`, nats.

    Args:
        bf16: Compute in bf16 autocast, as the training that is compared with it does.
        on_batch: Called with the number of sequences done.
    """
    import torch
    from torch.nn.functional import cross_entropy

    sums = [0.0] * len(prompts)
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    done = 0
    for batch in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
        ids, mask = _padded([rows[i] for i in batch], 0, model.device)
        labels = ids.masked_fill(mask == 0, -100)
        for position, i in enumerate(batch):
            labels[position, : len(prompts[i])] = -100
        with torch.inference_mode(), _autocast(model, bf16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        # cross_entropy is 0 where the label is -100
        nll = cross_entropy(logits.float().transpose(1, 2), labels[:, 1:], reduction="none")
        for i, total in zip(batch, (-nll.sum(1)).tolist(), strict=True):
            sums[i] = total
        done += len(batch)
        on_batch(done)
    return sums


def scores(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], *, pad_token_id: int, padded: bool = True
) -> torch.Tensor:
    """Raw scores of a one-label sequence classifier, `[rows]`, fp64. `padded=False`: one row at a time."""
    import torch

    found = torch.zeros(len(rows), dtype=torch.float64)
    budget = BATCH_TOKENS if padded else 1
    for batch in batches_by_length([len(row) for row in rows], budget):
        ids, mask = _padded([list(rows[i]) for i in batch], pad_token_id, model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found[batch] = logits[:, 0].double().cpu()
    return found


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices cut into batches of similar length, at most `budget` padded tokens each (a longer row goes alone)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(rows: list[list[int]], pad_token_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _autocast(model: PreTrainedModel, bf16: bool) -> Any:
    import torch

    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()
