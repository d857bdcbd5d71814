"""A run of two iterations through the published APIs, in which every container is killed once."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.compose.engine import CONTAINERS, ComposeStack, wait_until

pytestmark = pytest.mark.timeout(1500)

SETUP_SECONDS = 600.0
RUN_SECONDS = 900.0
STAGE_SECONDS = 300.0
PROMPTS, N, HELDOUT = 24, 4, 24
ITERATIONS = 2
ENDED = ("idle", "failed", "cancelled")


@pytest.fixture(scope="module")
def recipe(started: Any) -> dict[str, Any]:
    """A recipe with models and prompts that lie in the store: the tiny world's, made by the documented command."""
    stack: ComposeStack = started.stack
    stack.compose(
        "run", "--rm", "-T", "tiny-world", "--small", "--iterations", "1", "--run-id", "first", seconds=SETUP_SECONDS
    )
    made = stack.read("orchestrator", "/v1/runs/first")["recipe"]
    made["iterations"] = ITERATIONS
    made["sampling"] |= {"prompts_per_iteration": PROMPTS, "chunk_size": 6}
    made["dpo"] |= {"num_train_epochs": 4}
    return made


class Follower:
    """Reads a run again and again; a service that is just restarting is asked again."""

    def __init__(self, stack: ComposeStack, run: str) -> None:
        self.stack, self.run = stack, run

    def view(self) -> dict[str, Any]:
        return self.stack.read("orchestrator", f"/v1/runs/{self.run}")

    def working(self, iteration: int, stage: str) -> bool:
        """Whether a stage has begun and not ended; fails when the run has ended before."""
        view = self.view()
        assert view["status"] not in ENDED, (
            f"the run is {view['status']} before {stage} of {iteration}: {view['problem']}"
        )
        stages = {
            found["stage"]: found for each in view["iterations"] if each["iteration"] == iteration
            for found in each["stages"]
        }  # fmt: skip
        return stage in stages and stages[stage]["state"] == "running"

    def all_rows(self, path: str, **params: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while True:
            page = self.stack.read("orchestrator", path, offset=len(rows), limit=100, **params)
            rows += page["rows"]
            if len(rows) >= page["total"]:
                assert len(rows) == page["total"]
                return rows


def test_a_run_of_two_iterations_ends_right_although_each_container_is_killed_once(
    stack: ComposeStack, recipe: dict[str, Any]
) -> None:
    created = stack.call("orchestrator", "POST", "/v1/runs", json={"recipe": recipe, "id": "killed"})
    assert created.status_code < 300, created.text
    follower = Follower(stack, "killed")
    moments: dict[str, Callable[[], bool]] = {
        "generator": lambda: follower.working(1, "sample"),
        "reward": lambda: follower.working(1, "score"),
        "trainer": lambda: follower.working(1, "train"),
        "redis": lambda: follower.working(2, "sample"),
        "orchestrator": lambda: follower.working(2, "train"),
    }
    assert set(moments) == set(CONTAINERS)
    for name, moment in moments.items():
        wait_until(f"the moment to kill {name}", moment, STAGE_SECONDS, poll_seconds=0.02)
        stack.kill(name)
    deadline = time.monotonic() + RUN_SECONDS
    while (view := follower.view())["status"] not in ENDED:
        assert time.monotonic() < deadline, view
        time.sleep(1)

    assert view["status"] == "idle", view["problem"]
    assert view["iterations_decided"] == ITERATIONS
    assert [each["iteration"] for each in view["iterations"]] == list(range(ITERATIONS + 1))
    served = stack.read("generator", "/v1/policy", seconds=180)
    assert served["state"] == "serving"
    assert served["version"] == view["incumbent"]

    drawn: list[str] = []
    for each in view["iterations"]:
        iteration, record = each["iteration"], each["record"]
        assert record is not None
        assert all(stage["state"] == "succeeded" for stage in each["stages"])
        path = f"/v1/runs/killed/iterations/{iteration}"
        heldout = [row["rollout"] for row in follower.all_rows(f"{path}/rollouts", evaluation=True)]
        assert len({row["prompt_id"] for row in heldout}) == len(heldout) == HELDOUT
        if iteration == 0:
            continue
        rows = follower.all_rows(f"{path}/rollouts")
        ids = [row["rollout"]["prompt_id"] for row in rows]
        assert len(set(ids)) == len(ids) == PROMPTS, "a prompt is lost, or there twice"
        drawn += ids
        assert {row["rollout"]["policy_version"] for row in rows} == {record["incumbent"]}, "two policies met"
        assert all(len(row["rollout"]["responses"]) == N for row in rows)
        assert all(row["rewards"] is not None for row in rows), "a response has no score"
        pairs = follower.all_rows(f"{path}/pairs")
        assert len({pair["prompt_id"] for pair in pairs}) == len(pairs) == record["metrics"]["pairs"]
        assert {pair["prompt_id"] for pair in pairs} <= set(ids)
        assert record["metrics"]["prompts"] == PROMPTS
        assert record["metrics"]["responses"] == PROMPTS * N
    assert len(set(drawn)) == len(drawn), "an iteration drew a prompt of another"


def test_curl_generates_scores_and_triggers_an_iteration(stack: ComposeStack, recipe: dict[str, Any]) -> None:
    question = [{"role": "user", "content": "Hello"}]
    served = wait_until(
        "a served policy",
        lambda: (policy := stack.read("generator", "/v1/policy"))["state"] == "serving" and policy["version"],
        STAGE_SECONDS,
    )
    chat = stack.call("generator", "POST", "/v1/chat/completions", token=False,
                      json={"model": "policy", "messages": question, "max_tokens": 8})  # fmt: skip
    assert chat.status_code == 200, chat.text
    assert chat.headers["x-policy-version"] == served
    scores = stack.call("reward", "POST", "/v1/score", token=False,
                        json={"items": [{"messages": question, "responses": ["Hi!", "Go away."]}]})  # fmt: skip
    assert scores.status_code == 200, scores.text
    assert [len(each) for each in scores.json()["scores"]] == [2]

    before = stack.read("orchestrator", "/v1/runs/first")["iterations_decided"]
    triggered = stack.call("orchestrator", "POST", "/v1/runs/first/iterations", json={"count": 1})
    assert triggered.status_code < 300, triggered.text
    wait_until(
        "the triggered iteration",
        lambda: stack.read("orchestrator", "/v1/runs/first")["iterations_decided"] == before + 1,
        RUN_SECONDS,
    )


def test_vllm_listens_on_its_container_s_loopback_only(stack: ComposeStack, recipe: dict[str, Any]) -> None:
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in stack.exec("generator", "cat", f"/proc/net/{table}").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                host, port = local.split(":")
                listening.add((host, int(port, 16)))
    outside = {(host, port) for host, port in listening if not host.endswith("7F")}  # 127.x, little-endian
    assert {port for _, port in outside} == {8001}, "neither vLLM's API nor the sockets of its ranks"
    engine = {port for host, port in listening if host == "0100007F"}  # 127.0.0.11 is Docker's resolver
    assert engine, "vLLM is not there, and this test would show nothing"
    ip = stack.inspect("generator")["NetworkSettings"]["Networks"][f"{stack.project}_edge"]["IPAddress"]
    for port in engine:
        code = f"import socket; socket.create_connection(({ip!r}, {port}), 3)"
        for network in ("edge", "host"):
            assert stack.run_python(network, code).returncode != 0
        assert stack.run_python("edge", code.replace(str(port), "8001")).returncode == 0


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/update_weights"]
)
def test_vllm_s_control_routes_do_not_pass_the_gateway(stack: ComposeStack, path: str) -> None:
    assert stack.call("generator", "POST", path, json={}).status_code == 404
