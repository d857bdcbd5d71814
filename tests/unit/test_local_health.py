"""What is said about a local stack never holds a secret."""

import pytest

from ratchet.local.stack import LocalStack, StackSettings
from services.contracts.errors import Unavailable


def test_an_unreachable_redis_is_named_without_its_password(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    monkeypatch.setattr("ratchet.local.stack.ping_redis", lambda url: "refused")
    with pytest.raises(Unavailable) as caught:
        LocalStack(tmp_path, StackSettings()).start()
    assert "redis://127.0.0.1:1/0" in caught.value.detail
    assert "secret" not in caught.value.detail
