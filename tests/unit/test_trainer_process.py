"""What a training process is given, and that it cannot hang in its end."""

import asyncio
import io
import sys
from typing import Any

import pytest

from services.trainer.child import PARENT_VARIABLE
from services.trainer.process import Launcher, TrainingChild, TrainingKilled
from services.trainer.settings import TrainerSettings

SETTINGS: dict[str, Any] = {"token": "t" * 32, "store_url": "/nowhere"}


@pytest.mark.parametrize(("given", "seen"), [(None, "0"), ("2,3", "2"), ("1", "1"), ("", "")])
def test_a_child_sees_one_gpu_since_one_process_trains_on_one(
    given: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert Launcher(TrainerSettings(**SETTINGS))._environment()["CUDA_VISIBLE_DEVICES"] == seen


def test_a_child_is_given_no_variable_of_ours_but_its_parent_and_those_of_trackers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RATCHET_TOKEN", "the-secret-token-of-this-stack-000")
    monkeypatch.setenv("RATCHET_REDIS_URL", "redis://:the-secret@host/0")
    monkeypatch.setenv("RATCHET_REDIS_PASSWORD", "the-secret")
    monkeypatch.setenv("RATCHET_SOMETHING_NEW", "the-secret")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    environment = Launcher(TrainerSettings(**SETTINGS))._environment()
    assert not [key for key, value in environment.items() if "the-secret" in value]
    assert {key for key in environment if key.startswith("RATCHET_")} == {PARENT_VARIABLE}
    assert environment["WANDB_PROJECT"] == "mine"


async def test_a_child_that_does_not_end_after_its_messages_is_named() -> None:
    class Endless:
        pid = 7

        async def wait(self) -> int:
            await asyncio.Event().wait()
            raise AssertionError

    process: Any = Endless()
    with pytest.raises(TrainingKilled, match=r"pid 7.* did not end within 0\.01 s") as caught:
        await TrainingChild(process, io.BytesIO()).ended(0.01)
    assert caught.value.retryable


async def test_a_child_is_gone_only_when_what_it_started_has_ended_too() -> None:
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "stdout=subprocess.DEVNULL)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    child = TrainingChild(process, io.BytesIO())
    await process.wait()
    assert not await child.gone(0.2)
    await child.stop(3)
    assert await child.gone(20)
