"""One vLLM process: started on a free loopback port, watched, and killed with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import IO

import structlog

from services.contracts.errors import Unavailable
from services.generator.engine_client import EngineClient
from services.generator.settings import GeneratorSettings
from services.platform.logs import get_logger
from services.platform.service import free_port

log = get_logger(__name__)
vllm_log = get_logger("vllm")

TAIL_LINES = 40
"""Lines of vLLM's log kept for an error message."""
LINE_BYTES = 1 << 20
READY_POLL_SECONDS = 0.25
GIB = 1 << 30
EXTENSION = "services.generator.worker_extension.PolicyWorkerExtension"
SLEEP_FLAG = "--enable-sleep-mode"
"""`vllm_server` takes it away where vLLM knows no sleep mode and would refuse to start."""
LOOPBACK_ONLY = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
LAUNCHER = Path(__file__).with_name("launcher.py")


class EngineDied(Unavailable):
    """The vLLM process ended, or did not become ready; the message has the last lines of its log."""


def engine_arguments(settings: GeneratorSettings, model: Path, port: int) -> list[str]:
    """Command line of vLLM's API server (`vllm_server` runs `vllm.entrypoints.openai.api_server`)."""
    command = list(settings.generator_engine_command) or [sys.executable, "-m", "services.generator.vllm_server"]
    arguments = [
        *command,
        "--model", str(model),
        "--served-model-name", settings.generator_model_name,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", settings.generator_dtype,
        "--logprobs-mode", "raw_logprobs",
        "--enable-prefix-caching",
        "--worker-extension-cls", EXTENSION,
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if settings.generator_max_model_len is not None:
        arguments += ["--max-model-len", str(settings.generator_max_model_len)]
    if settings.generator_kv_cache_gib is not None:
        # not VLLM_CPU_KVCACHE_SPACE, which knows whole GiB only
        arguments += ["--kv-cache-memory-bytes", str(int(settings.generator_kv_cache_gib * GIB))]
    if settings.generator_enforce_eager:
        arguments.append("--enforce-eager")
    if settings.generator_sleep:
        arguments.append(SLEEP_FLAG)
    return [*arguments, *settings.generator_engine_args]


def engine_environment(settings: GeneratorSettings) -> dict[str, str]:
    """Environment of vLLM. Our token is not in it, nor anything else of ours."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RATCHET_")}
    root = str(Path(__file__).parents[2])  # the worker extension is imported by name
    inherited = environment.get("PYTHONPATH")
    environment.update(
        VLLM_SERVER_DEV_MODE="1",  # collective_rpc, pause, reset_prefix_cache: loopback only, behind the gateway
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
        PYTHONPATH=f"{root}{os.pathsep}{inherited}" if inherited else root,
        OMP_NUM_THREADS=str(settings.generator_threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # binding takes core 0 of every replica and every container
    )
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # The sockets by which vLLM's ranks find each other ask for no password, and would listen on the network's address.
    for name, value in LOOPBACK_ONLY.items():
        environment.setdefault(name, value)
    if settings.generator_single_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


class Engine:
    """A running vLLM. Make one with `Engine.start`; it is never started twice."""

    def __init__(self, process: asyncio.subprocess.Process, client: EngineClient, log_file: Path | None) -> None:
        self.client = client
        self.died = asyncio.Event()
        """Set once the process has ended."""
        self.pid = process.pid
        self._process = process
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pump = asyncio.create_task(self._forward_log(log_file))

    @classmethod
    async def start(cls, settings: GeneratorSettings, model: Path) -> Engine:
        """Start the process. It is not ready yet: see `wait_ready`."""
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(LAUNCHER), *engine_arguments(settings, model, port),
            stdin=asyncio.subprocess.PIPE,  # its end tells the launcher that we are gone
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=engine_environment(settings),
            start_new_session=True,
            limit=LINE_BYTES,
        )  # fmt: skip
        log.info("engine_starting", pid=process.pid, port=port, model=str(model))
        return cls(process, EngineClient(f"http://127.0.0.1:{port}", settings), settings.generator_engine_log)

    async def wait_ready(self, seconds: float) -> None:
        """Wait until vLLM answers.

        Raises:
            EngineDied: it ended, or did not answer in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while loop.time() < deadline:
            if self.died.is_set():
                raise EngineDied(f"vLLM ended while it started; the last lines of its log:\n{self.tail()}")
            if await self.client.healthy(READY_POLL_SECONDS * 4):
                return
            await asyncio.sleep(READY_POLL_SECONDS)
        raise EngineDied(
            f"vLLM did not answer within {seconds:g} s (RATCHET_GENERATOR_START_SECONDS); the last lines of its log:\n"
            f"{self.tail()}"
        )

    def tail(self, lines: int = 15) -> str:
        """The last lines of vLLM's log."""
        return "\n".join(list(self._tail)[-lines:]) or "(no output)"

    async def stop(self, grace_seconds: float) -> None:
        """End the process and everything it started, by force after the grace."""
        if not self.died.is_set():
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_seconds):
                    await self.died.wait()
            except TimeoutError:
                log.warning("engine_killed", pid=self.pid, after_seconds=grace_seconds)
        self._kill_group()
        await self._process.wait()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await self.client.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _forward_log(self, log_file: Path | None) -> None:
        assert self._process.stdout is not None
        structlog.contextvars.unbind_contextvars("request_id", "trace_id")  # of the request that started vLLM
        sink = _open_log(log_file)
        try:
            while True:
                try:
                    line = await self._process.stdout.readline()
                except ValueError:  # a line above LINE_BYTES; the reader has dropped it
                    continue
                if not line:
                    break
                text = line.decode(errors="replace").rstrip("\n")
                self._tail.append(text[:500])
                with contextlib.suppress(OSError):  # a full disk must not look like a dead vLLM
                    if sink is sys.stdout:
                        vllm_log.log(level_of(text), text)  # stdout is JSON, line by line
                    else:
                        print(text, file=sink, flush=True)
            await self._process.wait()
            self._kill_group()
        finally:
            self.died.set()
            if sink is not sys.stdout:
                with contextlib.suppress(OSError):
                    sink.close()


def level_of(line: str) -> int:
    """Level of a line of vLLM's log: `(EngineCore pid=7) WARNING 11-24 10:40:51 [model.py:1] …`."""
    start = line[:40]
    return logging.ERROR if "ERROR " in start else logging.WARNING if "WARNING " in start else logging.INFO


def _open_log(log_file: Path | None) -> IO[str]:
    """Where vLLM's log goes. Without a reader vLLM would stand still at a full pipe, so stdout takes it at least."""
    if log_file is None:
        return sys.stdout
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return log_file.open("a", buffering=1)
    except OSError as error:
        log.error("engine_log_unwritable", path=str(log_file), problem=str(error), then="vLLM's log goes to stdout")
        return sys.stdout
