"""Small pure functions over log-probs and rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """DPO's loss per pair, `[pairs]` (Rafailov et al. 2023, eq. 7).

    Args:
        chosen_logratios: log pi(chosen) - log pi_ref(chosen), summed over the response's tokens, `[pairs]`, nats.
        rejected_logratios: The same of the rejected responses.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen_logratios - rejected_logratios))


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) per pair, `[pairs]` (Dong et al. 2024, eq. 3)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(chosen_rewards - rejected_rewards)


def accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Part of pairs in which the chosen side stands higher; a tie counts half."""
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())
