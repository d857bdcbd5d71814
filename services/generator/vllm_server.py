"""vLLM's API server, with what depends on the platform: `python -m services.generator.vllm_server`.

On CPU vLLM spawns its processes, and each imports everything again, which is nearly all of the start-up time. vLLM
asks for it because OpenMP's threads do not survive a fork; with one OpenMP thread there are none. (On GPUs vLLM forks
by itself where it can, and this module leaves that as it is.)

Sleep mode is asked for by the gateway, which does not know the platform; on CPU vLLM would refuse to start with it.
"""

from __future__ import annotations

import os
import runpy
import sys

SLEEP_FLAG = "--enable-sleep-mode"


def fork_on_cpu() -> None:
    """Take back the `spawn` that vLLM's CPU platform sets, when the engine has one OpenMP thread."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    platform = type(current_platform)
    spawning = platform.check_and_update_config.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def check_and_update_config(cls: type, vllm_config: object) -> None:
        spawning(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)  # pyright: ignore[reportAttributeAccessIssue]


def keep_awake_where_sleep_is_unknown(arguments: list[str]) -> None:
    """Take the sleep flag out of the arguments when vLLM has no sleep mode on this platform, and say so in its log."""
    from vllm.platforms import current_platform

    if SLEEP_FLAG in arguments and not current_platform.is_sleep_mode_available():
        arguments.remove(SLEEP_FLAG)
        print(
            f"vLLM has no sleep mode on {current_platform.device_name or 'this platform'}: it will pause when the "
            "device is leased, and keep its memory",
            flush=True,
        )


if __name__ == "__main__":
    fork_on_cpu()
    keep_awake_where_sleep_is_unknown(sys.argv)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
