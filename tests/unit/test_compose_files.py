"""What the compose files and Dockerfiles promise, read from the files: no engine is needed."""

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.tiny_world.remote import parse
from services.orchestrator.preflight import (
    COMPOSE_VARIABLES,
    INTERPOLATED,
    OBSERVED,
    STACK_VARIABLES,
    check_env_file,
    check_settings,
)
from services.platform.settings import known_variables

ROOT = Path(__file__).parents[2]
OBSERVABILITY = "deploy/compose.observability.yml"
FILES = ("docker-compose.yml", "compose.gpu.yml", "compose.single-gpu.yml", OBSERVABILITY)
SERVICES = ("generator", "reward", "trainer", "orchestrator")
COMPOSE: dict[str, dict[str, Any]] = {name: yaml.safe_load((ROOT / name).read_text()) for name in FILES}
STACK: dict[str, dict[str, Any]] = COMPOSE["docker-compose.yml"]["services"]
ALWAYS = {name: service for name, service in STACK.items() if "profiles" not in service and name != "preflight"}


def dockerfile(service: str) -> str:
    return (ROOT / "services" / service / "Dockerfile").read_text()


def test_the_stack_is_redis_the_four_services_and_the_look_before() -> None:
    assert set(ALWAYS) == {"redis", *SERVICES}
    assert {name for name, service in STACK.items() if "profiles" in service} == {"ratchet", "tiny-world"}


def test_only_orchestrator_generator_and_reward_publish_a_port_and_on_loopback_unless_told_otherwise() -> None:
    assert {name for name, service in STACK.items() if service.get("ports")} == {"orchestrator", "generator", "reward"}
    for name in ("orchestrator", "generator", "reward"):
        inside = STACK[name]["environment"]["RATCHET_PORT"]
        (published,) = STACK[name]["ports"]
        assert published == f"${{RATCHET_BIND:-127.0.0.1}}:${{RATCHET_{name.upper()}_PORT:-{inside}}}:{inside}"


def test_redis_can_be_reached_from_inside_only_by_those_who_need_it() -> None:
    networks = COMPOSE["docker-compose.yml"]["networks"]
    assert STACK["redis"]["networks"] == ["inner"]
    assert networks["inner"]["internal"] is True
    assert {name for name in SERVICES if "inner" in STACK[name]["networks"]} == {"orchestrator", "trainer"}
    assert "edge" not in STACK["trainer"]["networks"]


def test_no_secret_has_a_default_and_a_missing_one_is_told_with_its_remedy() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for variable in ("RATCHET_TOKEN", "RATCHET_REDIS_PASSWORD"):
        uses = re.findall(rf"\$\{{{variable}([^}}]*)\}}", text)
        assert uses
        assert all(use.startswith(":?") for use in uses), uses
        assert all("make env" in use for use in uses), "which of them compose finds first is chance"


def test_redis_asks_for_a_password_and_keeps_every_write() -> None:
    (command,) = STACK["redis"]["command"]
    assert "requirepass $$RATCHET_REDIS_PASSWORD" in command
    assert "appendonly yes" in command
    assert STACK["redis"]["volumes"] == ["redis:/data"]


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_a_service_is_confined_restarted_and_does_not_fill_the_disk_with_logs(name: str) -> None:
    service = ALWAYS[name]
    assert not re.match(r"(0|root)\b", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"]["max-size"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_nothing_starts_before_the_look_at_ports_and_volumes_went_well(name: str) -> None:
    assert ALWAYS[name]["depends_on"]["preflight"] == {"condition": "service_completed_successfully"}


def test_the_orchestrator_waits_for_the_health_of_all_it_needs() -> None:
    needs = ALWAYS["orchestrator"]["depends_on"]
    for name in ("redis", "generator", "reward", "trainer"):
        assert needs[name] == {"condition": "service_healthy"}


def test_the_store_is_one_volume_that_can_lie_elsewhere() -> None:
    for name in (*SERVICES, "preflight", "ratchet", "tiny-world"):
        assert "${RATCHET_STORE:-store}:/store" in STACK[name]["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_runs_as_a_user_of_its_own_with_a_healthcheck_and_hears_sigterm(name: str) -> None:
    last_stage = dockerfile(name).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last_stage, re.M) == ["ratchet"]
    assert 'CMD ["python", "-m", "services.platform.healthcheck"]' in last_stage
    assert f'CMD ["python", "-m", "services.{name}"]' in last_stage  # exec form: no shell swallows the signal
    assert f"COPY services/{name} services/{name}" in last_stage


@pytest.mark.parametrize("name", SERVICES)
def test_code_comes_after_packages_so_that_a_change_of_it_rebuilds_no_package(name: str) -> None:
    text = dockerfile(name)
    assert text.rindex("image_packages.sh") < text.index("COPY services/__init__.py")


def test_images_with_torch_share_its_layers() -> None:
    def until_torch(text: str) -> str:
        end = text.index("image_packages.sh reward")
        return "\n".join(line for line in text[:end].splitlines() if not line.startswith("#"))

    assert (
        until_torch(dockerfile("generator")) == until_torch(dockerfile("reward")) == until_torch(dockerfile("trainer"))
    )


def test_the_orchestrator_s_image_installs_its_own_extra_only() -> None:
    assert re.findall(r"image_packages\.sh (.*?)(?: \\)?$", dockerfile("orchestrator"), re.M) == ["orchestrator"]


def test_no_secret_and_no_store_enters_an_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed <= {"pyproject.toml", "requirements", "services", "ratchet", "recipes", "examples",
                       "scripts/image_packages.sh", "scripts/package_sources.py"}  # fmt: skip
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_gpus_are_refused_with_a_remedy_until_they_were_seen() -> None:
    services = COMPOSE["compose.gpu.yml"]["services"]
    claim = services["preflight"]["environment"]["RATCHET_GPUS"]
    assert claim.startswith("${RATCHET_GPUS:?")
    assert "make env GPU=1" in claim
    for name in ("preflight", "generator", "reward", "trainer"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]


def test_on_gpus_vllm_is_another_build_and_its_images_have_another_name() -> None:
    for name in ("generator", "reward", "trainer"):
        service = COMPOSE["compose.gpu.yml"]["services"][name]
        assert service["build"]["args"] == {"DEVICE": "gpu"}
        assert service["image"] != STACK[name]["image"]


def test_on_one_gpu_the_generator_sleeps_while_the_trainer_works() -> None:
    services = COMPOSE["compose.single-gpu.yml"]["services"]
    sleep = services["generator"]["environment"]["RATCHET_GENERATOR_SLEEP"]
    assert sleep == "${RATCHET_GENERATOR_SLEEP:-true}", "what .env says counts"
    assert services["trainer"]["environment"]["RATCHET_TRAINER_GENERATOR_URL"] == "http://generator:8001"
    assert services["trainer"]["networks"] == ["edge"], "the generator has to be reachable from the trainer"


def test_there_is_no_compose_file_that_these_tests_do_not_know() -> None:
    found = {*ROOT.glob("*compose*.y*ml"), *(ROOT / "deploy").rglob("*compose*.y*ml")}
    assert {str(file.relative_to(ROOT)) for file in found} == set(FILES)


def test_every_setting_in_the_compose_files_is_one_that_a_service_reads() -> None:
    known = known_variables() | COMPOSE_VARIABLES | set(STACK_VARIABLES) | set(INTERPOLATED.values()) | {OBSERVED}
    for name in FILES:
        used = set(re.findall(r"RATCHET_[A-Z_]+", (ROOT / name).read_text()))
        assert used <= known, used - known


def test_preflight_lets_through_every_variable_that_a_compose_file_reads() -> None:
    read = {name for file in FILES for name in re.findall(r"\$\{(RATCHET_[A-Z_]+)", (ROOT / file).read_text())}
    good = {"RATCHET_TOKEN": "t" * 32, "RATCHET_UID": "1", "RATCHET_GID": "1"}
    assert check_settings({**dict.fromkeys(read, "x"), **good}) == []
    assert read >= COMPOSE_VARIABLES, "and none is let through that no file reads"


def test_redis_s_password_is_given_to_nobody_who_does_not_ask_redis() -> None:
    for name in (*SERVICES, "ratchet", "tiny-world"):
        environment = STACK[name]["environment"]
        assert environment["RATCHET_REDIS_PASSWORD"] == "", "the env file has it, so leaving it out is not enough"
        assert ("RATCHET_REDIS_URL" in environment) == (name in ("orchestrator", "trainer"))


def test_the_temporary_folder_which_is_main_memory_has_a_limit() -> None:
    for name in (*SERVICES, "preflight", "ratchet", "tiny-world"):
        for folder in STACK[name]["tmpfs"]:
            assert re.search(r"\bsize=\d+[mg]\b", folder), folder


def test_the_tiny_world_s_report_stays_when_its_container_is_gone() -> None:
    options = parse(STACK["tiny-world"]["entrypoint"][3:])
    assert options.folder.is_relative_to("/store/.work")
    assert "${RATCHET_STORE:-store}:/store" in STACK["tiny-world"]["volumes"]


def test_trackers_can_be_chosen_for_the_trainer_s_image_and_are_packages_of_the_lock() -> None:
    for name in ("trainer", "tiny-world"):
        assert STACK[name]["build"]["args"] == {"TRACKERS": "${RATCHET_TRACKERS-tensorboard}"}
    text = dockerfile("trainer")
    assert re.findall(r"^ARG TRACKERS=(.*)$", text, re.M) == ["tensorboard"]
    assert "image_packages.sh $TRACKERS" in text
    (named,) = re.findall(r'as the lock spells it: "(.*)"\.', text)
    for lock in (ROOT / "requirements").glob("*.lock"):
        pinned = set(re.findall(r"^([\w-]+)==", lock.read_text(), re.M))
        assert set(named.split()) <= pinned, lock.name


def test_the_restore_of_the_documents_leaves_nothing_of_what_was_there(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"preflight -c '(.*) && tar -C / -xf -' < ratchet-backup", text)
    for file in (
        "store/FORMAT.json",
        "store/.work/train/state",
        "store/.scratch/x",
        "redis/appendonlydir/a",
        "redis/.b",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    here = command.replace("/store", f"{tmp_path}/store").replace("/redis", f"{tmp_path}/redis")
    subprocess.run(["sh", "-c", here], check=True)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "redis", tmp_path / "store"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `make env` needs."""
    for file in ("scripts/compose-env.sh", "services/generator/Dockerfile"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    return tmp_path


def make_env(
    checkout: Path, *arguments: str, path: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/compose-env.sh", *arguments], cwd=checkout, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path or os.environ["PATH"], **variables},
    )  # fmt: skip


def settings(checkout: Path, file: str = ".env") -> dict[str, str]:
    lines = (checkout / file).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_make_env_writes_two_secrets_for_the_owner_s_eyes_only(checkout: Path) -> None:
    assert make_env(checkout).returncode == 0
    made = settings(checkout)
    assert set(made) == {"RATCHET_TOKEN", "RATCHET_REDIS_PASSWORD"}
    assert len(set(made.values())) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{40,}", value) for value in made.values()), "they stand in URLs too"
    assert stat.S_IMODE((checkout / ".env").stat().st_mode) == 0o600


def test_make_env_writes_another_file_that_names_itself_and_says_how_to_use_it(checkout: Path) -> None:
    done = make_env(checkout, RATCHET_ENV_FILE="prod.env")
    assert done.returncode == 0, done.stderr
    assert "docker compose --env-file prod.env up -d --wait" in done.stdout
    made = settings(checkout, "prod.env")
    assert set(made) == {"RATCHET_ENV_FILE", "RATCHET_TOKEN", "RATCHET_REDIS_PASSWORD"}
    assert not (checkout / ".env").exists()
    assert check_env_file({**made, **{own: made[name] for name, own in INTERPOLATED.items()}}) == []


def test_make_env_keeps_what_is_there_and_adds_what_is_missing(checkout: Path) -> None:
    (checkout / ".env").write_text("RATCHET_TOKEN=my-own-token-of-some-length\nRATCHET_LOG_LEVEL=debug")
    assert make_env(checkout).returncode == 0
    first = (checkout / ".env").read_text()
    assert first.startswith(
        "RATCHET_TOKEN=my-own-token-of-some-length\nRATCHET_LOG_LEVEL=debug\nRATCHET_REDIS_PASSWORD="
    )
    assert "left as it is" in make_env(checkout).stdout
    assert (checkout / ".env").read_text() == first


def with_docker(checkout: Path, run: str) -> str:
    """A PATH with a `docker` that answers `run` as told."""
    folder = checkout / "bin"
    folder.mkdir()
    (folder / "docker").write_text(f'#!/bin/sh\ntest "$1" = info && exit 0\n{run}\n')
    (folder / "docker").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_make_env_writes_nothing_when_gpus_are_asked_for_and_containers_reach_none(checkout: Path) -> None:
    path = with_docker(checkout, "echo 'could not select device driver \"\" with capabilities: [[gpu]]' >&2; exit 125")
    done = make_env(checkout, "gpu", path=path)
    assert done.returncode == 1
    assert "could not select device driver" in done.stderr
    assert "NVIDIA Container Toolkit" in done.stderr.replace("\n          ", " ")
    assert not (checkout / ".env").exists()


@pytest.mark.parametrize(("count", "used"), [(1, "0 0 0"), (2, "0 1 1"), (4, "0 1 2")])
def test_make_env_shares_out_the_gpus_that_a_container_saw(checkout: Path, count: int, used: str) -> None:
    path = with_docker(checkout, f'for i in $(seq {count}); do echo "GPU $i: NVIDIA"; done')
    done = make_env(checkout, "gpu", path=path)
    assert done.returncode == 0, done.stderr
    made = settings(checkout)
    assert made["RATCHET_GPUS"] == str(count)
    assert [made[f"RATCHET_{name}_GPUS"] for name in ("GENERATOR", "REWARD", "TRAINER")] == used.split()
    assert ("compose.single-gpu.yml" in done.stdout) == (count == 1)
