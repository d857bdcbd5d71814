"""Pure parts: figures from the log, order of the data, probes, keys, losses."""

import math

import pytest
import torch

from services.contracts.errors import InvalidInput
from services.contracts.training import DpoConfig
from services.trainer.forward import batches_by_length
from services.trainer.loop import check_config, epoch_order, trl_arguments
from services.trainer.losses import accuracy, bradley_terry_loss, sigmoid_loss
from services.trainer.probes import PROBE_TOKENS, candidate_windows, most_changed, probe_window
from services.trainer.progress import curve_of, metrics_of
from services.trainer.reference import reference_key, reference_path
from services.trainer.task import drop_too_long
from services.trainer.workspace import Workspace


def entry(step: int, loss: float, epoch: float, **more: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "epoch": epoch, **more}


def test_metrics_weigh_each_entry_by_its_steps_and_take_the_last_epoch() -> None:
    history = [
        entry(1, 4.0, 0.5), entry(2, 3.0, 1.0), entry(3, 2.0, 1.5, **{"rewards/margins": 1.0}),
        entry(6, 1.0, 2.0, **{"rewards/margins": 2.0}),
    ]  # fmt: skip
    found = metrics_of(history, 2.0)
    assert found["loss"] == pytest.approx((2.0 + 3 * 1.0) / 4)
    assert found["margin"] == pytest.approx((1.0 + 3 * 2.0) / 4)
    assert found["mean_loss"] == pytest.approx((4 + 3 + 2 + 3) / 6)
    assert (found["first_loss"], found["steps"]) == (4.0, 6.0)


def test_the_curve_is_thinned_and_keeps_both_ends() -> None:
    curve = curve_of([entry(step, 1.0, step / 100) for step in range(1, 1001)], 1000)
    assert len(curve) == 200
    assert (curve[0].step, curve[-1].step) == (1, 1000)
    assert curve_of([], 0) == ()


def test_an_epoch_holds_every_example_once_and_its_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [(i * 37) % 50 + 1 for i in range(203)]
    order = epoch_order(lengths, 8, seed=3, epoch=1)
    assert sorted(order) == list(range(203))
    torch.manual_seed(999)
    assert epoch_order(lengths, 8, seed=3, epoch=1) == order
    assert epoch_order(lengths, 8, seed=3, epoch=2) != order
    assert epoch_order(lengths, 8, seed=4, epoch=1) != order


def test_batches_of_an_epoch_pad_less_than_a_shuffle() -> None:
    lengths = [(i * 37) % 50 + 1 for i in range(400)]

    def padding(order: list[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, 400, 8)]
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    assert padding(epoch_order(lengths, 8, 0, 0)) < 0.4 * padding(shuffled)


def test_batches_by_length_keep_the_token_budget() -> None:
    lengths = [5, 100, 7, 7, 30, 1]
    batches = list(batches_by_length(lengths, 40))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4, 5]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 40 for b in batches)


def test_a_probe_shows_the_end_of_the_prompt_and_the_beginning_of_the_response() -> None:
    prompt, response = list(range(100)), list(range(1000, 1100))
    window = probe_window(prompt, response)
    assert len(window) == PROBE_TOKENS
    assert window[:24] == tuple(range(76, 100))
    assert window[24] == 1000
    assert probe_window([1, 2], [3]) == (1, 2, 3)
    assert probe_window(prompt, [7]) == (*range(37, 100), 7)


def test_probes_are_distinct_and_those_that_training_moved_most() -> None:
    windows = candidate_windows([([1, 2, 3], [4, 5])] * 3 + [([1, 2, 3], [6, 7])])
    assert windows == [(1, 2, 3, 4, 5), (1, 2, 3, 6, 7)]
    many = [(i, i, i, i) for i in range(10)]
    before = [[0.0, 0.0, 0.0]] * 10
    after = [[0.0, -float(i), 0.0] for i in range(10)]
    assert most_changed(many, before, after) == ([4, 5, 6, 7, 8, 9], 9.0)


def test_the_reference_key_names_all_it_depends_on() -> None:
    key = reference_key(["a", "b"], "w", 64, "float32")
    others = [
        reference_key(["b", "a"], "w", 64, "float32"),
        reference_key(["a", "b"], "v", 64, "float32"),
        reference_key(["a", "b"], "w", 65, "float32"),
        reference_key(["a", "b"], "w", 64, "bfloat16"),
    ]
    assert len({key, *others}) == 5
    assert reference_path("runs/r/iter-1/pairs.parquet", key) == f"runs/r/iter-1/reference-{key[:16]}.parquet"


def test_losses_are_those_of_the_papers() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    expected = [-math.log(1 / (1 + math.exp(-0.1))), -math.log(1 / (1 + math.exp(0.3)))]
    assert sigmoid_loss(chosen, rejected, 0.1).tolist() == pytest.approx(expected)
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(
        [-math.log(1 / (1 + math.exp(-1))), -math.log(1 / (1 + math.exp(3)))]
    )
    assert accuracy(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])) == 0.5


def test_examples_that_do_not_fit_are_counted_and_none_fitting_is_an_error() -> None:
    assert drop_too_long([3, 9, 5], 5, "pairs") == ([0, 2], 1)
    with pytest.raises(InvalidInput, match="the shortest has 3 tokens, the longest 9"):
        drop_too_long([3, 9], 2, "pairs")


def config(**changes: object) -> DpoConfig:
    return DpoConfig.model_validate({"learning_rate": 1e-5, "train_batch_size": 8, "max_length": 64} | changes)


class _Model:
    max_position_embeddings = 64

    def get_text_config(self) -> "_Model":
        return self


def test_a_length_beyond_the_model_s_positions_is_refused() -> None:
    model: object = _Model()
    with pytest.raises(InvalidInput) as caught:
        check_config(config(max_length=65), model)  # pyright: ignore[reportArgumentType]
    assert caught.value.field == "config.max_length"


def test_a_constant_schedule_keeps_its_warm_up(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    arguments = trl_arguments(config(lr_scheduler_type="constant", warmup_fraction=0.1), workspace)
    assert (arguments["lr_scheduler_type"], arguments["warmup_steps"]) == ("constant_with_warmup", 0.1)
    arguments = trl_arguments(config(micro_batch_size=2), workspace)
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (2, 4)
