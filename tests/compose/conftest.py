"""One stack for all tests: built, brought up, and taken down with its volumes."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.compose.engine import BUILD_SECONDS, ROOT, SERVICES, TAG, ComposeStack, docker


@dataclass(frozen=True)
class Images:
    """How long it took to build them (seconds)."""

    seconds: float


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """The images, built from this checkout; without an engine this fails."""
    try:
        answer = docker("info", check=False)
    except FileNotFoundError:
        pytest.fail("docker is not installed: these tests need an engine and Compose v2 (make test-compose)")
    if answer.returncode:
        pytest.fail(f"the Docker engine does not answer: {answer.stderr.strip()}. Start it, or set DOCKER_HOST")
    began = time.monotonic()
    stack = ComposeStack(tmp_path_factory.mktemp("build"))
    stack.compose("--profile", "*", "build", seconds=BUILD_SECONDS)
    yield Images(time.monotonic() - began)
    subprocess.run(["docker", "image", "rm", *(f"ratchet-{name}:{TAG}" for name in SERVICES)], cwd=ROOT, check=False)


@dataclass(frozen=True)
class Started:
    """A running stack, and the seconds from `up` to all healthy."""

    stack: ComposeStack
    seconds: float


@pytest.fixture(scope="session")
def started(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """The stack, up."""
    stack = ComposeStack(tmp_path_factory.mktemp("stack"))
    try:
        began = time.monotonic()
        stack.compose("up", "--detach", "--wait")
        yield Started(stack, time.monotonic() - began)
    finally:
        stack.down()


@pytest.fixture
def stack(started: Started) -> ComposeStack:
    """The running stack."""
    return started.stack
