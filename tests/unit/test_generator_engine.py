"""The supervised process: what it is started with, and that nothing outlives it."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.generator import vllm_server
from services.generator.engine import SLEEP_FLAG, Engine, EngineDied, engine_arguments, engine_environment
from tests.fixtures.generator import eventually, group_members, make_settings

TREE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
SLEEPER = TREE + "print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
FAILING = "import sys; print('ValueError: no such thing'); sys.exit(3)"


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_vllm_listens_on_loopback_only_and_never_sees_our_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_TOKEN", "secret-secret-secret")
    settings = make_settings(tmp_path)
    arguments = engine_arguments(settings, tmp_path, 1234)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    environment = engine_environment(settings)
    assert "secret-secret-secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_every_engine_setting_reaches_the_command_line(tmp_path: Path) -> None:
    settings = make_settings(
        tmp_path,
        generator_dtype="bfloat16",
        generator_max_model_len=128,
        generator_kv_cache_gib=0.5,
        generator_enforce_eager=True,
        generator_engine_args=("--max-num-seqs", "8"),
        generator_model_name="mine",
    )
    line = " ".join(engine_arguments(settings, tmp_path, 1))
    for part in (
        "--dtype bfloat16",
        "--max-model-len 128",
        f"--kv-cache-memory-bytes {1 << 29}",
        "--enforce-eager",
        "--max-num-seqs 8",
        "--served-model-name mine",
    ):
        assert part in line


@pytest.mark.parametrize("sleep", [False, True])
def test_sleep_mode_is_asked_for_exactly_when_the_device_is_shared(tmp_path: Path, sleep: bool) -> None:
    assert (SLEEP_FLAG in engine_arguments(make_settings(tmp_path, generator_sleep=sleep), tmp_path, 1)) is sleep


@pytest.mark.parametrize(("known", "left"), [(True, ["--enable-sleep-mode", "--port", "1"]), (False, ["--port", "1"])])
def test_sleep_mode_is_taken_back_where_vllm_would_refuse_to_start_with_it(
    known: bool, left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platform = SimpleNamespace(device_name="cpu", is_sleep_mode_available=lambda: known)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    assert vllm_server.SLEEP_FLAG == SLEEP_FLAG
    arguments = [SLEEP_FLAG, "--port", "1"]
    vllm_server.keep_awake_where_sleep_is_unknown(arguments)
    assert arguments == left
    assert ("no sleep mode on cpu" in capsys.readouterr().out) is not known


async def test_stopping_ends_the_whole_tree_even_when_it_ignores_sigterm(tmp_path: Path) -> None:
    engine = await Engine.start(make_settings(tmp_path, generator_engine_command=command(STUBBORN)), tmp_path)
    await eventually(lambda: "up" in engine.tail() and len(group_members(engine.pid)) == 3)
    await engine.stop(0.1)
    assert engine.died.is_set()
    await eventually(lambda: not group_members(engine.pid))


async def test_a_process_that_ends_is_noticed_with_the_end_of_its_log(tmp_path: Path) -> None:
    engine = await Engine.start(make_settings(tmp_path, generator_engine_command=command(FAILING)), tmp_path)
    with pytest.raises(EngineDied, match="ValueError: no such thing"):
        await engine.wait_ready(20)
    await engine.stop(0.1)


async def test_a_process_that_never_answers_is_given_up_at_its_deadline(tmp_path: Path) -> None:
    engine = await Engine.start(make_settings(tmp_path, generator_engine_command=command(SLEEPER)), tmp_path)
    with pytest.raises(EngineDied, match=r"did not answer within 0\.3 s"):
        await engine.wait_ready(0.3)
    await engine.stop(0.1)


async def test_killing_a_child_ends_its_grandchildren(tmp_path: Path) -> None:
    engine = await Engine.start(make_settings(tmp_path, generator_engine_command=command(SLEEPER)), tmp_path)
    await eventually(lambda: "up" in engine.tail() and len(group_members(engine.pid)) == 3)
    for pid in group_members(engine.pid):
        if pid != engine.pid:
            os.kill(pid, signal.SIGKILL)
            break
    async with asyncio.timeout(10):
        await engine.died.wait()
    await eventually(lambda: not group_members(engine.pid))
    await engine.stop(0.1)


def test_a_gateway_killed_with_sigkill_leaves_no_orphan(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom services.generator.engine import Engine\n"
        "from tests.fixtures.generator import make_settings\n"
        "async def main():\n"
        f"    engine = await Engine.start(make_settings(Path({str(tmp_path)!r}), "
        f"generator_engine_command={command(SLEEPER)!r}), Path('.'))\n"
        "    while 'up' not in engine.tail():\n        await asyncio.sleep(0.05)\n"
        "    print('engine', engine.pid, flush=True)\n    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[2]
    gateway = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert gateway.stdout is not None
        line = next(line for line in gateway.stdout if line.startswith("engine "))
        group = int(line.split()[1])
        assert len(group_members(group)) == 3
    finally:
        gateway.kill()
        gateway.wait()
        if gateway.stdout:
            gateway.stdout.close()
    asyncio.run(eventually(lambda: not group_members(group)))


@pytest.mark.parametrize("log_file", ["/dev/full", "/proc/no/such/log"])
async def test_a_log_that_cannot_be_written_neither_stops_nor_hides_vllm(tmp_path: Path, log_file: str) -> None:
    settings = make_settings(tmp_path, generator_engine_command=command(SLEEPER), generator_engine_log=Path(log_file))
    engine = await Engine.start(settings, tmp_path)
    await eventually(lambda: "up" in engine.tail())
    assert not engine.died.is_set()
    await engine.stop(0.1)
    assert engine.died.is_set()
