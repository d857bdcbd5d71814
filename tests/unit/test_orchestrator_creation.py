"""What is checked before a run exists: the trackers it reports to, which an existing recipe cannot change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.contracts import layout
from services.contracts.errors import InvalidInput
from services.contracts.recipes import ResolvedModels
from services.contracts.runs import RunRecord, RunRequest
from services.contracts.trackers import InstalledTrackers
from services.orchestrator.creation import check_report_to
from services.orchestrator.runbook import Runbook
from services.platform.http import ServiceClient
from services.platform.store import ArtifactStore
from tests.fixtures.orchestrator_stack import recipe

Answer = Callable[[httpx.Request], Awaitable[httpx.Response] | httpx.Response]


def request(*names: str) -> RunRequest:
    dpo = {"learning_rate": 5e-7, "train_batch_size": 4, "max_length": 128, "report_to": names}
    return RunRequest(id="r", recipe=recipe("datasets/a.jsonl", "datasets/b.jsonl", dpo=dpo))


@pytest.fixture
def runbook(tmp_path: Path) -> Runbook:
    return Runbook(ArtifactStore(str(tmp_path / "store")))


def trainer(answer: Any) -> ServiceClient:
    return ServiceClient("trainer", "http://trainer:8003", retry=False, transport=httpx.MockTransport(answer))


def having(*names: Any) -> ServiceClient:
    body = InstalledTrackers(trackers=names).model_dump_json()
    paths = {"/v1/trackers": httpx.Response(200, text=body)}
    return trainer(lambda asked: paths[asked.url.path])


async def test_a_tracker_the_trainer_does_not_have_is_refused_with_field_and_remedies(runbook: Runbook) -> None:
    with pytest.raises(InvalidInput) as refused:
        await check_report_to(runbook, request("tensorboard", "mlflow"), having("tensorboard"), 3.0)
    assert refused.value.field == "recipe.dpo.report_to"
    for says in ("mlflow, which the trainer", "pip install mlflow-skinny", 'RATCHET_TRACKERS="tensorboard mlflow-'):
        assert says in refused.value.detail


async def test_trackers_the_trainer_has_are_taken_without_a_word(runbook: Runbook) -> None:
    assert await check_report_to(runbook, request("wandb"), having("tensorboard", "wandb"), 3.0) == ()


async def test_a_run_without_trackers_asks_nobody(runbook: Runbook) -> None:
    def never(asked: httpx.Request) -> httpx.Response:
        raise AssertionError(f"{asked.url} was asked")

    assert await check_report_to(runbook, request(), trainer(never), 3.0) == ()


async def test_a_run_that_exists_is_found_whatever_the_trainer_has_now(runbook: Runbook) -> None:
    record = RunRecord(
        id="r", created_at="2026-11-24", recipe=request("wandb").recipe, prompts_total=24, heldout_total=6,
        models=ResolvedModels(policy="models/sft", reward_model="models/reward"),
    )  # fmt: skip
    runbook.store.publish_model(layout.run_file("r"), record)
    assert await check_report_to(runbook, request("wandb"), having("tensorboard"), 3.0) == ()


async def refuses(asked: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("All connection attempts failed")


async def hangs(asked: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def of_an_older_version(asked: httpx.Request) -> httpx.Response:
    return httpx.Response(404, json={"detail": "Not Found"})


@pytest.mark.parametrize("answer", [refuses, hangs, of_an_older_version])
async def test_a_trainer_that_does_not_answer_is_a_warning_and_no_refusal(runbook: Runbook, answer: Answer) -> None:
    (warning,) = await check_report_to(runbook, request("wandb"), trainer(answer), 0.1)
    assert warning.startswith("recipe.dpo.report_to names wandb, and whether the trainer has them is not known: ")


async def test_a_trainer_nobody_named_is_a_warning_that_names_the_setting(runbook: Runbook) -> None:
    (warning,) = await check_report_to(runbook, request("wandb"), None, 3.0)
    assert "RATCHET_TRAINER_URL" in warning
