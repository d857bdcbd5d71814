"""The commands of the documents for a stack of containers, as they stand and in the order they are read."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compose.conftest import Images
from tests.compose.engine import ROOT, TAG
from tests.fixtures.doc_commands import check_blocks

pytestmark = pytest.mark.timeout(1500)

DOWN_SECONDS = 180
GIVEN = ("Makefile", "scripts", "services", "deploy")
SMALL = 'services: { tiny-world: { command: ["--small", "--iterations", "2"] } }\n'
"""The command of the README without an option takes minutes; with these it takes one, and does the same."""


@dataclass(frozen=True)
class Checkout:
    """A folder like the root of a checkout, whose `.env` is the reader's and not ours."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture
def checkout(images: Images, tmp_path: Path) -> Iterator[Checkout]:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    for name in GIVEN:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "small.yml").write_text(SMALL)
    clean = {name: value for name, value in os.environ.items() if not re.match(r"(RATCHET|COMPOSE|REDIS)_", name)}
    environment = clean | {
        "COMPOSE_PROJECT_NAME": f"ratchet-docs-{secrets.token_hex(4)}",
        "COMPOSE_FILE": "docker-compose.yml:small.yml",
        "RATCHET_TAG": TAG,  # the images that were built for these tests
    }
    yield Checkout(tmp_path, environment)
    subprocess.run(
        ["docker", "compose", "--profile", "*", "down", "--volumes", "--timeout", "20"],
        cwd=tmp_path, env=environment, timeout=DOWN_SECONDS, check=False,
    )  # fmt: skip


def test_every_command_for_a_stack_of_containers_works_as_it_stands(checkout: Checkout) -> None:
    check_blocks("compose", checkout.folder, checkout.environment)
