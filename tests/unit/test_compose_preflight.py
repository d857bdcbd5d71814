"""The look at ports, volumes and settings before a stack starts; and when a container counts as healthy."""

import json
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr

from services.contracts.errors import StoreError
from services.contracts.layout import FORMAT_FILE, STORE_FORMAT
from services.orchestrator.preflight import (
    OBSERVABILITY_PORTS,
    OBSERVED,
    PORTS,
    PublishedPort,
    Volume,
    check_env_file,
    check_ports,
    check_settings,
    check_volumes,
    main,
)
from services.platform import healthcheck
from services.platform.healthcheck import check
from services.platform.identity import is_proven, new_nonce, prove
from services.platform.store_format import StoreFormat, check_format

TOKEN = "the-token-of-this-stack"
Answer = Callable[[BaseHTTPRequestHandler], tuple[int, object]]


@contextmanager
def http_server(answer: Answer) -> Iterator[int]:
    """A server on loopback whose every answer `answer` makes; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answer(self)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def own_service(request: BaseHTTPRequestHandler) -> tuple[int, object]:
    """The generator of the stack with our token."""
    url = urlsplit(request.path)
    if url.path != "/health/identity":
        return 404, {}
    return 200, prove(SecretStr(TOKEN), "generator", parse_qs(url.query)["nonce"][0]).model_dump()


def free_ports() -> dict[str, str]:
    ports_of_all = (*PORTS, *OBSERVABILITY_PORTS)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in ports_of_all]
    ports = {port.variable: str(s.getsockname()[1]) for port, s in zip(ports_of_all, sockets, strict=True)}
    for each in sockets:
        each.close()
    return ports


def environment(**changed: str) -> dict[str, str]:
    return {"RATCHET_TOKEN": TOKEN, "RATCHET_BIND": "127.0.0.1", "RATCHET_UID": "10001", "RATCHET_GID": "10001",
            **free_ports(), **changed}  # fmt: skip


# -- ports ------------------------------------------------------------------------------------------------------------


def test_free_ports_are_fine() -> None:
    assert check_ports(environment()) == []


def test_a_port_that_another_program_holds_is_named_with_the_variable_that_moves_it() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        port = str(holder.getsockname()[1])
        (problem,) = check_ports(environment(RATCHET_REWARD_PORT=port), starting_seconds=0)
    assert f"port {port} of 127.0.0.1" in problem
    assert "address already in use" in problem
    assert "set RATCHET_REWARD_PORT in .env" in problem


def test_a_port_that_this_stack_s_own_service_holds_is_not_taken() -> None:
    with http_server(own_service) as port:
        assert check_ports(environment(RATCHET_GENERATOR_PORT=str(port)), starting_seconds=0) == []


def test_a_service_of_another_stack_holds_a_port_like_any_program() -> None:
    with http_server(own_service) as port:
        other = environment(RATCHET_GENERATOR_PORT=str(port), RATCHET_TOKEN="the-token-of-another-stack")
        (problem,) = check_ports(other, starting_seconds=0)
    assert "RATCHET_GENERATOR_PORT" in problem


def test_a_service_of_this_stack_on_the_port_of_another_does_not_count_as_that_one() -> None:
    with http_server(own_service) as port:
        (problem,) = check_ports(environment(RATCHET_REWARD_PORT=str(port)), starting_seconds=0)
    assert "RATCHET_REWARD_PORT" in problem


@pytest.mark.parametrize(
    "answer", [(200, {}), (422, {}), (401, {}), (200, {"service": "generator", "proof": "0" * 64})]
)
def test_whoever_holds_the_port_is_not_sent_the_token_and_is_not_believed(answer: tuple[int, object]) -> None:
    seen: list[str] = []

    def listener(request: BaseHTTPRequestHandler) -> tuple[int, object]:
        seen.append(f"{request.requestline}\n{request.headers}")
        return answer

    with http_server(listener) as port:
        (problem,) = check_ports(environment(RATCHET_GENERATOR_PORT=str(port)), starting_seconds=0)
    assert "RATCHET_GENERATOR_PORT" in problem
    assert len(seen) == 1
    assert TOKEN not in seen[0]
    assert "authorization" not in seen[0].lower()


def test_each_question_has_a_nonce_of_its_own() -> None:
    asked: list[str] = []

    def listener(request: BaseHTTPRequestHandler) -> tuple[int, object]:
        asked.append(request.path)
        return own_service(request)

    with http_server(listener) as port:
        for _ in range(2):
            assert check_ports(environment(RATCHET_GENERATOR_PORT=str(port)), starting_seconds=0) == []
    assert len(set(asked)) == 2


@pytest.mark.parametrize("published", OBSERVABILITY_PORTS, ids=lambda port: port.service)
def test_ports_of_prometheus_and_grafana_are_looked_at_when_they_are_to_be_published(published: PublishedPort) -> None:
    with http_server(lambda _: (200, {"another": "program"})) as port:
        settings = environment(**{published.variable: str(port)})
        assert check_ports(settings, starting_seconds=0) == []
        (problem,) = check_ports({**settings, OBSERVED: "true"}, starting_seconds=0)
    assert f"for the {published.service}" in problem
    assert f"set {published.variable} in .env" in problem


@pytest.mark.parametrize("published", OBSERVABILITY_PORTS, ids=lambda port: port.service)
def test_prometheus_and_grafana_of_a_stack_that_is_up_hold_their_own_ports(published: PublishedPort) -> None:
    body = {"dashboard": {"uid": "ratchet"}, "rules": [{"name": "NobodyConducts"}]}

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, object]:
        return (200, body) if request.path == published.route else (404, {})

    with http_server(answer) as port:
        settings = environment(**{published.variable: str(port), OBSERVED: "true"})
        assert check_ports(settings, starting_seconds=0) == []


def test_what_prometheus_and_grafana_are_known_by_is_in_what_they_are_given() -> None:
    deploy = Path(__file__).parents[2] / "deploy"
    assert json.loads((deploy / "grafana" / "ratchet.json").read_text())["uid"] == "ratchet"
    assert "alert: NobodyConducts\n" in (deploy / "prometheus" / "alerts.yml").read_text()


def test_an_address_that_this_machine_does_not_have_is_told() -> None:
    problems = check_ports(environment(RATCHET_BIND="192.0.2.1"), starting_seconds=0)
    assert len(problems) == len(PORTS)
    assert all("192.0.2.1" in problem and "cannot assign" in problem for problem in problems)


@pytest.mark.parametrize("text", ["0", "65536", "http", "-1", ""])
def test_what_is_no_port_is_refused(text: str) -> None:
    (problem,) = check_ports(environment(RATCHET_ORCHESTRATOR_PORT=text))
    assert problem.startswith(f"RATCHET_ORCHESTRATOR_PORT={text} is not a port")


def test_two_services_cannot_share_a_port() -> None:
    ports = free_ports()
    same = ports["RATCHET_ORCHESTRATOR_PORT"]
    (problem,) = check_ports(environment(**{**ports, "RATCHET_REWARD_PORT": same}))
    assert "RATCHET_REWARD_PORT and RATCHET_ORCHESTRATOR_PORT" in problem


@pytest.mark.parametrize("published", PORTS, ids=lambda port: port.service)
def test_every_service_with_a_port_proves_itself_without_being_sent_the_token(
    published: PublishedPort, tmp_path: Path
) -> None:
    app = APPS[published.service](tmp_path)
    from starlette.testclient import TestClient

    client = TestClient(app)  # not entered: no worker starts
    nonce = new_nonce()
    answer = client.get("/health/identity", params={"nonce": nonce})
    assert is_proven(SecretStr(TOKEN), published.service, nonce, answer.content)
    assert not is_proven(SecretStr("the-token-of-another-stack"), published.service, nonce, answer.content)


def _orchestrator(store: Path):
    from services.orchestrator.app import create_app
    from services.orchestrator.settings import OrchestratorSettings

    return create_app(OrchestratorSettings(token=TOKEN, store_url=str(store)))  # pyright: ignore[reportArgumentType]


def _generator(store: Path):
    from services.generator.app import create_app
    from services.generator.settings import GeneratorSettings

    return create_app(GeneratorSettings(token=TOKEN, store_url=str(store)))  # pyright: ignore[reportArgumentType]


def _reward(store: Path):
    from services.reward.app import create_app
    from services.reward.settings import RewardSettings

    return create_app(RewardSettings(token=TOKEN, store_url=str(store)))  # pyright: ignore[reportArgumentType]


APPS = {"orchestrator": _orchestrator, "generator": _generator, "reward": _reward}


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_that_a_service_reads_are_fine() -> None:
    assert check_settings(environment(RATCHET_GENERATOR_DTYPE="float32", RATCHET_STORE="/data", HOME="/root")) == []


def test_a_misspelt_setting_is_refused_with_what_was_meant() -> None:
    (problem,) = check_settings(environment(RATCHET_GENERATOR_DTYP="float32"))
    assert "RATCHET_GENERATOR_DTYP" in problem
    assert "did you mean RATCHET_GENERATOR_DTYPE" in problem


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("RATCHET_PORT", "9000", "RATCHET_ORCHESTRATOR_PORT"),
        ("RATCHET_STORE_URL", "/data", "RATCHET_STORE:"),
        ("RATCHET_HOST", "127.0.0.1", "RATCHET_BIND"),
        ("RATCHET_REDIS_URL", "redis://elsewhere", "own Redis"),
    ],
)
def test_a_setting_that_the_stack_makes_itself_is_refused_with_the_one_to_use(
    name: str, value: str, instead: str
) -> None:
    (problem,) = check_settings(environment(**{name: value}))
    assert instead in problem


def test_what_the_image_itself_sets_is_no_mistake() -> None:
    assert check_settings(environment(RATCHET_PORT="8000", RATCHET_HOST="0.0.0.0", RATCHET_STORE_URL="/store")) == []


def test_a_guessable_token_is_refused_without_showing_it() -> None:
    (problem,) = check_settings(environment(RATCHET_TOKEN="hunter2"))
    assert "make env" in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize("user", ["0", "root", ""])
def test_services_may_not_run_as_root(user: str) -> None:
    (problem,) = check_settings(environment(RATCHET_UID=user))
    assert problem.startswith(f"RATCHET_UID={user}")


# -- the env file -----------------------------------------------------------------------------------------------------


def read_by_compose(file: str = ".env", token: str = TOKEN, password: str = "p" * 32) -> dict[str, str]:
    return {
        "RATCHET_COMPOSE_ENV_FILE": file,
        "RATCHET_COMPOSE_TOKEN": token,
        "RATCHET_COMPOSE_REDIS_PASSWORD": password,
    }


def test_one_env_file_for_compose_and_containers_is_fine_under_any_name() -> None:
    given = {"RATCHET_TOKEN": TOKEN, "RATCHET_REDIS_PASSWORD": "p" * 32}
    assert check_env_file({**given, **read_by_compose()}) == []
    assert check_env_file({**given, "RATCHET_ENV_FILE": "prod.env", **read_by_compose("prod.env")}) == []
    assert check_env_file(read_by_compose()) == [], "secrets may come from the shell alone"


@pytest.mark.parametrize(("name", "composed"), [("RATCHET_TOKEN", {"token": "another"}),
                                                ("RATCHET_REDIS_PASSWORD", {"password": "another"})])  # fmt: skip
def test_secrets_of_two_env_files_are_refused_with_the_way_to_use_one_and_without_showing_them(
    name: str, composed: dict[str, str]
) -> None:
    given = {"RATCHET_TOKEN": TOKEN, "RATCHET_REDIS_PASSWORD": "p" * 32}
    (problem,) = check_env_file({**given, **read_by_compose(**composed)})
    assert problem.startswith(f"{name} in .env")
    assert "docker compose --env-file NAME" in problem
    assert not [secret for secret in (TOKEN, "p" * 32) if secret in problem]


def test_an_env_file_that_does_not_name_itself_is_refused() -> None:
    given = {"RATCHET_TOKEN": TOKEN, "RATCHET_REDIS_PASSWORD": "p" * 32}
    (problem,) = check_env_file({**given, **read_by_compose("prod.env")})
    assert "prod.env" in problem
    assert "let it name itself" in problem


def test_the_look_before_a_start_refuses_a_half_given_env_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**environment(), **read_by_compose(token="another-token-of-compose")}.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 1
    assert "ERROR: RATCHET_TOKEN in .env" in capsys.readouterr().out


# -- volumes ----------------------------------------------------------------------------------------------------------


def volume(folder: Path, name: str = "store", uid: int | None = None) -> Volume:
    return Volume(folder, name, os.getuid() if uid is None else uid, os.getgid())


def test_an_empty_store_is_marked_with_the_format_that_this_version_writes(tmp_path: Path) -> None:
    problems, done = check_volumes((volume(tmp_path),))
    assert problems == []
    assert done == [f"the store is marked as of format {STORE_FORMAT}"]
    assert StoreFormat.model_validate_json((tmp_path / FORMAT_FILE).read_bytes()).format == STORE_FORMAT
    assert check_volumes((volume(tmp_path),)) == ([], []), "the second time there is nothing to do"


def test_a_store_from_before_formats_is_refused_untouched_and_can_be_adopted(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (problem,), done = check_volumes((volume(tmp_path),))
    assert "written by an older version" in problem
    assert "preflight --adopt" in problem
    assert "RATCHET_STORE=" in problem
    assert done == []
    assert not (tmp_path / FORMAT_FILE).exists()
    assert check_volumes((volume(tmp_path),), adopt=True)[0] == []
    assert check_volumes((volume(tmp_path),)) == ([], [])


@pytest.mark.parametrize(("number", "who"), [(STORE_FORMAT + 1, "a newer"), (STORE_FORMAT + 7, "a newer")])
def test_a_store_of_another_format_is_refused_even_when_told_to_adopt(tmp_path: Path, number: int, who: str) -> None:
    (tmp_path / FORMAT_FILE).write_text(json.dumps({"format": number}))
    for adopt in (False, True):
        (problem,), _ = check_volumes((volume(tmp_path),), adopt=adopt)
        assert f"format {number}" in problem
        assert f"format {STORE_FORMAT}" in problem
        assert who in problem


def test_a_format_file_that_is_no_such_file_is_told(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text("1.0")
    with pytest.raises(StoreError, match=FORMAT_FILE):
        check_format(tmp_path)


def test_a_fresh_disk_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert check_volumes((volume(tmp_path),))[0] == []


def test_a_fresh_volume_is_given_to_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda *arguments: given.append(arguments))
    other = os.getuid() + 1
    problems, done = check_volumes((volume(tmp_path, "redis", uid=other),))
    assert problems == []
    assert given == [(tmp_path, other, os.getgid())]
    assert done == [f"the volume 'redis' is given to user {other}"]


def test_somebody_else_s_files_are_not_taken_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(os, "chown", lambda *_: pytest.fail("a folder with files was given away"))
    other = os.getuid() + 1
    (problem,), _ = check_volumes((volume(tmp_path, uid=other),))
    assert f"its service runs as user {other}" in problem
    assert f"chown preflight -R {other}:" in problem


# -- healthcheck ------------------------------------------------------------------------------------------------------


def service(name: str, ready: int, model: object = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> tuple[int, object]:
        if request.path == "/health/ready":
            return ready, {"service": name, "detail": None if ready == 200 else "the detail"}
        return 200, model

    return answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (service("orchestrator", 200), (True, "ready")),
        (service("orchestrator", 503), (False, "the detail")),
        (service("generator", 503, {"state": "empty"}), (True, "waiting for a policy")),
        (service("generator", 503, {"state": "asleep"}), (True, "asleep: a training has the GPU")),
        (service("generator", 503, {"state": "failed"}), (False, "the detail")),
        (service("generator", 503, {"state": "starting"}), (True, "the detail")),
        (service("generator", 503, {"state": "swapping"}), (True, "the detail")),
        (service("generator", 503, {"state": "serving"}), (False, "the detail")),
        (service("reward", 503, []), (True, "waiting for a scorer")),
        (service("reward", 503, [{"name": "default"}]), (False, "the detail")),
        (service("trainer", 503, []), (False, "the detail")),
    ],
)
def test_a_container_is_healthy_when_it_serves_or_a_model_is_all_that_it_waits_for(
    answer: Answer, expected: tuple[bool, str]
) -> None:
    with http_server(answer) as port:
        assert check(f"http://127.0.0.1:{port}") == expected


def test_a_service_that_does_not_answer_is_unhealthy() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    up, why = check(f"http://127.0.0.1:{port}")
    assert not up
    assert "does not answer" in why


def test_all_questions_together_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends a health check after 5 s and tells nobody why."""
    clock = {"now": 100.0}
    given: list[float] = []
    monkeypatch.setattr(healthcheck.time, "monotonic", lambda: clock["now"])
    real = urllib.request.OpenerDirector.open

    def slow(opener: urllib.request.OpenerDirector, url: str, data: None = None, timeout: float = 0.0) -> Any:
        given.append(timeout)
        clock["now"] += 3.0
        return real(opener, url, data, timeout)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", slow)
    with http_server(service("generator", 503, {"state": "empty"})) as port:
        assert check(f"http://127.0.0.1:{port}") == (True, "waiting for a policy")
    assert given == [4.0, 1.0]


def test_a_first_answer_that_took_all_the_time_is_told_and_no_more_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 4.5])
    monkeypatch.setattr(healthcheck.time, "monotonic", lambda: next(times))
    with http_server(service("generator", 503, {"state": "empty"})) as port:
        up, why = check(f"http://127.0.0.1:{port}")
    assert not up
    assert "not within 4 s" in why


def test_something_else_on_the_port_is_unhealthy() -> None:
    with http_server(lambda _: (503, ["not", "ours"])) as port:
        assert check(f"http://127.0.0.1:{port}") == (False, "/health/ready answered 503")
