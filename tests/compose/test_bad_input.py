"""What a user gets wrong is told, with the remedy, before anything has started."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.compose.conftest import Images
from tests.compose.engine import CONTAINERS, ROOT, ComposeStack, docker

pytestmark = pytest.mark.usefixtures("images")


@pytest.fixture
def stack(images: Images, tmp_path: Path) -> Iterator[ComposeStack]:
    """A stack that is not up."""
    stack = ComposeStack(tmp_path)
    yield stack
    stack.down()


def refused(stack: ComposeStack, *files: str) -> str:
    """What `docker compose logs preflight` says after an `up` that failed; nothing else may have started."""
    done = stack.compose(*files, "up", "--detach", "--wait", check=False)
    assert done.returncode != 0
    assert "preflight" in done.stderr
    for name in CONTAINERS:
        found = docker("inspect", "--format", "{{.State.StartedAt}}", stack.container(name), check=False)
        assert found.returncode != 0 or found.stdout.startswith("0001-"), f"{name} was started"
    return stack.logs("preflight")


@pytest.mark.parametrize("files", [(), ("-f", "docker-compose.yml", "-f", "compose.gpu.yml")])
def test_without_an_env_file_one_line_says_to_make_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    for file in ROOT.glob("*compose*.yml"):
        shutil.copy(file, tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
    done = subprocess.run(
        ["docker", "compose", *files, "up", "--detach"], cwd=tmp_path, env=clean, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "RATCHET_" in line
    assert "make env" in line


def test_a_taken_port_is_named_with_the_variable_that_moves_it(stack: ComposeStack) -> None:
    port = stack.ports["reward"]
    with closing(socket.create_server(("127.0.0.1", port))):
        told = refused(stack)
    assert f"port {port} of 127.0.0.1, for the reward" in told
    assert "RATCHET_REWARD_PORT" in told


@pytest.mark.parametrize(
    ("content", "expected"),
    [("mkdir /store/runs", "written by an older version"), ("echo '{\"format\": 999}' >/store/FORMAT.json", "a newer")],
)
def test_a_volume_of_another_version_is_refused_untouched(stack: ComposeStack, content: str, expected: str) -> None:
    stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "sh", "preflight", "-c",
                  f"chown 10001:10001 /store; {content}")  # fmt: skip
    told = refused(stack)
    assert expected in told
    assert "RATCHET_STORE=" in told


def test_a_store_from_before_formats_can_be_taken_over(stack: ComposeStack) -> None:
    stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "sh", "preflight", "-c", "mkdir /store/runs")
    stack.compose("run", "--rm", "--no-deps", "-T", "preflight", "--adopt")
    assert "all is well" in stack.compose("run", "--rm", "--no-deps", "-T", "preflight").stdout


def test_a_misspelt_setting_is_refused_with_what_was_meant(stack: ComposeStack) -> None:
    with stack.env_file.open("a") as file:
        file.write("RATCHET_GENERATOR_DTYP=float32\n")
    assert "did you mean RATCHET_GENERATOR_DTYPE" in refused(stack)


def test_gpus_that_nobody_has_looked_for_are_refused_with_the_command_that_looks(stack: ComposeStack) -> None:
    done = stack.compose("-f", "docker-compose.yml", "-f", "compose.gpu.yml", "up", "--detach", check=False)
    assert done.returncode != 0
    assert "make env GPU=1" in done.stderr
    assert not docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={stack.project}").stdout


def test_gpus_claimed_where_there_are_none_stop_the_first_container_and_start_no_other(stack: ComposeStack) -> None:
    with stack.env_file.open("a") as file:
        file.write("RATCHET_GPUS=1\n")
    files = ("-f", "docker-compose.yml", "-f", "compose.gpu.yml")
    done = stack.compose(*files, "up", "--detach", "--no-build", "preflight", check=False)
    runtimes = json.loads(docker("info", "--format", "{{json .Runtimes}}").stdout)
    if "nvidia" in runtimes:  # the claim may be true here; then preflight itself must be content
        assert "all is well" in stack.logs("preflight")
    else:
        assert done.returncode != 0
        assert "could not select device driver" in done.stderr
