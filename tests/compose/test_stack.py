"""The stack as `docker compose up` gives it: small, confined, closed where it should be, and back after any death."""

import json
import re
import time

import pytest

from tests.compose.conftest import Images, Started
from tests.compose.engine import CONTAINERS, SERVICES, TAG, ComposeStack, docker, wait_until

BASE = "python:3.11-slim"
READY_SECONDS = 180
BUILD_SECONDS = 600
ORCHESTRATOR_BYTES = 250e6
"""Over its base image."""
STOP_SECONDS = 25
"""Below the 30 s after which the engine kills."""
CONNECT = "import socket; socket.create_connection(({host!r}, {port}), 3)"


def size(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image).stdout)


def address(stack: ComposeStack, service: str, network: str) -> str:
    return stack.inspect(service)["NetworkSettings"]["Networks"][f"{stack.project}_{network}"]["IPAddress"]


def test_the_images_are_built_in_under_ten_minutes(images: Images) -> None:
    assert images.seconds < BUILD_SECONDS


def test_the_stack_is_ready_in_under_three_minutes(started: Started) -> None:
    assert started.seconds < READY_SECONDS
    for name in CONTAINERS:
        assert started.stack.healthy(name), name


def test_the_orchestrator_s_image_is_small_and_carries_no_torch(images: Images) -> None:
    image = f"ratchet-orchestrator:{TAG}"
    assert size(image) - size(BASE) < ORCHESTRATOR_BYTES
    code = "import importlib.util as u; print([n for n in ('torch', 'vllm', 'transformers', 'trl') if u.find_spec(n)])"
    assert docker("run", "--rm", "--entrypoint", "python", image, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_process_of_a_container_is_root_or_could_become_it(stack: ComposeStack, name: str) -> None:
    status = stack.exec(name, "sh", "-c", "cat /proc/[0-9]*/status")
    users = set(re.findall(r"^Uid:\s+(\d+)\s+(\d+)", status, re.M))
    assert users
    assert ("0", "0") not in users
    # Permitted and bounding sets; `cat` itself is among the processes.
    assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)", status, re.M)) == {"0" * 16}


def test_only_three_ports_are_published_and_only_on_loopback(stack: ComposeStack) -> None:
    published = {
        (name, binding["HostIp"], int(binding["HostPort"]))
        for name in CONTAINERS
        for bindings in stack.inspect(name)["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    assert published == {(name, "127.0.0.1", port) for name, port in stack.ports.items()}


def test_redis_and_the_trainer_cannot_be_reached_from_outside_their_network(stack: ComposeStack) -> None:
    for name, port in (("redis", 6379), ("trainer", 8003)):
        inner = CONNECT.format(host=address(stack, name, "inner"), port=port)
        assert stack.run_python("inner", inner).returncode == 0, "the way that is open, or this test shows nothing"
        for network in ("edge", "bridge"):
            assert stack.run_python(network, inner).returncode != 0, f"{name} from {network}"
        assert stack.run_python("edge", CONNECT.format(host=name, port=port)).returncode != 0, f"{name} by its name"


def test_redis_refuses_whoever_has_no_password(stack: ComposeStack) -> None:
    code = (
        "import socket; s = socket.create_connection(('redis', 6379), 3); "
        "s.sendall(b'KEYS *\\r\\n'); print(s.recv(100).decode())"
    )
    assert "NOAUTH" in stack.run_python("inner", code).stdout


def test_redis_has_no_way_out_of_its_network(stack: ComposeStack) -> None:
    outside = CONNECT.format(host=address(stack, "reward", "edge"), port=8002)
    assert stack.run_python("edge", outside).returncode == 0
    assert stack.inspect("redis")["NetworkSettings"]["Networks"].keys() == {f"{stack.project}_inner"}
    assert stack.run_python("inner", outside).returncode != 0


@pytest.mark.parametrize(
    ("service", "method", "path"),
    [
        ("orchestrator", "POST", "/v1/runs"),
        ("orchestrator", "POST", "/v1/datasets"),
        ("orchestrator", "POST", "/v1/runs/any/cancel"),
        ("generator", "PUT", "/v1/policy"),
        ("generator", "POST", "/v1/rollouts"),
        ("reward", "PUT", "/v1/scorers/default"),
        ("reward", "DELETE", "/v1/scorers/default"),
    ],
)
def test_a_control_route_refuses_whoever_has_no_token(
    stack: ComposeStack, service: str, method: str, path: str
) -> None:
    answer = stack.call(service, method, path, token=False, json={} if method != "DELETE" else None)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_trainer_refuses_a_job_without_a_token(stack: ComposeStack) -> None:
    code = (
        "import urllib.request as r, urllib.error as e\n"
        "try: r.urlopen(r.Request('http://trainer:8003/v1/jobs', b'{}', {'Content-Type': 'application/json'}))\n"
        "except e.HTTPError as error: print(error.code)"
    )
    assert stack.run_python("inner", code).stdout.strip() == "401"


def test_up_a_second_time_changes_nothing(stack: ComposeStack) -> None:
    before = {name: stack.inspect(name)["State"]["StartedAt"] for name in CONTAINERS}
    stack.compose("up", "--detach", "--wait")
    assert {name: stack.inspect(name)["State"]["StartedAt"] for name in CONTAINERS} == before


def test_the_command_line_works_inside_the_stack(stack: ComposeStack) -> None:
    told = stack.compose("run", "--rm", "-T", "ratchet", "runs").stdout
    assert "Traceback" not in told


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_whose_process_dies_is_started_again_by_the_engine(stack: ComposeStack, name: str) -> None:
    before = stack.inspect(name)
    wait_until("health before", lambda: stack.healthy(name), READY_SECONDS)
    # The child of the container's init; a kill from inside is no wish to have the container stopped.
    stack.exec(name, "sh", "-c", "kill -9 $(cut -d' ' -f1 /proc/1/task/1/children)")
    wait_until("the restart", lambda: stack.inspect(name)["RestartCount"] > before["RestartCount"], READY_SECONDS)
    wait_until("health after it", lambda: stack.healthy(name), READY_SECONDS)


def test_stopping_is_clean_and_starting_again_finds_everything(stack: ComposeStack) -> None:
    answer = stack.call(
        "orchestrator", "POST", "/v1/datasets", params={"kind": "prompts", "format": "jsonl"},
        content=b'{"prompt": "What is kept?"}\n',
    )  # fmt: skip
    assert answer.status_code < 300, answer.text
    began = time.monotonic()
    stack.compose("stop")
    assert time.monotonic() - began < STOP_SECONDS
    for name in CONTAINERS:
        state = stack.inspect(name)["State"]
        # 143: ended by the SIGTERM it was sent, after it had closed everything. 137 would be the engine's SIGKILL.
        assert state["ExitCode"] in (0, 143), f"{name} ended with {state['ExitCode']}"
        assert not state["OOMKilled"]
    stack.compose("up", "--detach", "--wait")
    path = answer.json()["path"]
    assert stack.exec("orchestrator", "test", "-f", f"/store/{path}") == ""


@pytest.mark.parametrize("name", SERVICES)
def test_logs_are_json_line_by_line(stack: ComposeStack, name: str) -> None:
    lines = [line for line in stack.logs(name).splitlines() if line.strip()]
    assert lines
    for line in lines:
        record = json.loads(line)
        assert record["service"] == name
        assert record["level"]
