"""Rules for every test: kept off the network, marked by folder, ended when it hangs."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.fixtures.redis", "tests.fixtures.real_generator"]

# Before any library is imported, and inherited by the processes a test starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
)

# Seconds one test may take, by folder. End to end: vLLM on CPU alone needs up to 110 s to start.
# Compose: images are built first, and each container is killed and comes back once.
TIMEOUT_S = {"unit": 60, "integration": 180, "browser": 180, "e2e": 900, "compose": 2400}
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in TIMEOUT_S:
            raise pytest.UsageError(
                f"{item.nodeid}: tests belong to one of the folders {', '.join(TIMEOUT_S)} of tests/"
            )
        item.add_marker(folder)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S[folder]))
