"""A local stack: started, watched, restarted, and ended without leaving anything, whoever is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ratchet.local import processes as system
from ratchet.local.records import StackRecord
from ratchet.local.stack import LocalStack, StackSettings
from services.contracts.errors import Conflict, InvalidInput, JobFailed, NotFound, Unavailable

STAND_IN = Path(__file__).with_name("stand_in_service.py")
ROOT = Path(__file__).parents[2]
READY_SECONDS = 90.0
NAMES = ("generator", "orchestrator")


@pytest.fixture(autouse=True)
def own_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("RATCHET_TOKEN", raising=False)


def settings(*names: str, **more: object) -> StackSettings:
    commands = {name: (sys.executable, str(STAND_IN), name) for name in names}
    return StackSettings(services=names, commands=commands, **more)  # pyright: ignore[reportArgumentType]


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def held_ports(record: StackRecord) -> list[str]:
    return [p.name for p in record.processes if p.port and system.listens("127.0.0.1", p.port)]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    with LocalStack(tmp_path / "stack", settings(*NAMES)) as started:
        started.wait_ready(READY_SECONDS)
        yield started


def test_a_stack_comes_up_restarts_what_dies_and_leaves_nothing(stack: LocalStack) -> None:
    record = stack.record
    states = {status.name: status.state for status in stack.status()}
    assert states == {"redis": "ready", "generator": "waiting", "orchestrator": "ready"}
    assert stack.files.token_file.stat().st_mode & 0o777 == 0o600
    assert stack.files.supervisor.stat().st_mode & 0o777 == 0o700
    usage = {one.name: one for one in stack.processes()}
    assert len(usage["generator"].pids) == 2, "the child in its own session belongs to the tree"
    assert usage["generator"].pss_bytes > 10 * 2**20

    with pytest.raises(Conflict, match="a stack is running"):
        LocalStack(stack.files.path, settings(*NAMES)).start()
    assert LocalStack.attach(stack.files.path).record == record

    orphan = psutil.Process(usage["generator"].pids[1])
    os.kill(usage["generator"].pid, signal.SIGKILL)
    wait_for(lambda: any(death.name == "generator" for death in stack.deaths()))
    statuses = {status.name: status for status in stack.wait_ready(READY_SECONDS)}
    assert statuses["generator"].pid != usage["generator"].pid
    assert "terminated by SIGKILL" in statuses["generator"].detail
    wait_for(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)

    stack.restart("orchestrator")
    stack.wait_ready(READY_SECONDS)
    assert [death.name for death in stack.deaths()] == ["generator"], "a restart that was asked for is no death"

    stack.stop()
    assert system.members(record.id) == []
    assert held_ports(record) == []
    assert not stack.files.record_file.exists()
    stack.stop()  # idempotent
    with pytest.raises(NotFound, match="no stack is running"):
        LocalStack.attach(stack.files.path)


def test_a_killed_supervisor_takes_everything_with_it(stack: LocalStack) -> None:
    record = stack.record
    os.kill(int((stack.files.supervisor / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not system.members(record.id) and not held_ports(record))
    with pytest.raises(Unavailable, match="was stopped"):
        stack.wait_ready(5)
    assert stack.files.record_file.exists(), "stale: nobody was there to remove it"
    stack.start()
    assert stack.record.id != record.id, "a dead stack's record does not hinder the next"


def test_a_killed_keeper_stops_the_services(stack: LocalStack) -> None:
    record = stack.record
    os.kill(record.keeper_pid, signal.SIGKILL)
    wait_for(lambda: held_ports(record) == [])
    stack.stop()
    assert system.members(record.id) == []


def test_a_killed_owner_s_stack_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ratchet.local.stack import LocalStack, StackSettings\n"
        "command = (sys.executable, sys.argv[2], 'orchestrator')\n"
        "s = LocalStack(sys.argv[1], StackSettings(services=('orchestrator',), commands={'orchestrator': command}))\n"
        "print(s.start().model_dump_json(), flush=True); input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "stack"), str(STAND_IN)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout
    record = StackRecord.model_validate_json(owner.stdout.readline())
    assert len(system.members(record.id)) >= 2
    owner.kill()
    owner.communicate()
    wait_for(lambda: not system.members(record.id) and not held_ports(record))


def test_ctrl_c_on_ratchet_up_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    folder = tmp_path / ("long-folder-name-" * 6)  # a socket path in it would be too long
    up = subprocess.Popen(
        [sys.executable, "-m", "ratchet", "up", "--dir", str(folder), "--services", "orchestrator"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert up.stdout
    assert up.stdout.readline().startswith("service"), up.communicate()
    record = LocalStack.attach(folder).record
    assert not record.supervisor_socket.startswith(str(folder))
    up.send_signal(signal.SIGINT)
    _, said = up.communicate(timeout=60)
    assert up.returncode == 0, said
    assert "nothing is left running" in said
    assert system.members(record.id) == []
    assert held_ports(record) == []
    assert not Path(record.supervisor_socket).parent.exists()


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        stack = LocalStack(tmp_path / "stack", settings(*NAMES, ports={"generator": port}))
        with pytest.raises(Conflict, match=rf"port {port} for generator is in use by pid {os.getpid()}"):
            stack.start()
    assert not stack.files.record_file.exists()
    assert not stack.files.running


def test_a_service_that_cannot_start_is_named_with_its_exit_code_and_last_words(tmp_path: Path) -> None:
    command = ("sh", "-c", "echo this service cannot start; exit 7")
    with (
        LocalStack(tmp_path / "stack", StackSettings(services=("broken",), commands={"broken": command})) as stack,
        pytest.raises(JobFailed, match=r"broken died \(exit status 7.*(?s:.*)this service cannot start"),
    ):
        stack.wait_ready(READY_SECONDS)


def test_a_redis_that_is_named_and_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    with pytest.raises(Unavailable, match=r"REDIS_URL is redis://127.0.0.1:1/0"):
        LocalStack(tmp_path, settings(*NAMES)).start()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"environment": {"RATCHET_GENERATOR_DTYP": "x"}}, "did you mean RATCHET_GENERATOR_DTYPE"),
        ({"environment": {"RATCHET_PORT": "1"}}, "use --generator-port"),
        ({"ports": {"reward": 8000}}, "reward is given port 8000 but is not started"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path: Path, more: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LocalStack(tmp_path, settings(*NAMES, **more)).start()
