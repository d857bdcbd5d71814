"""A URL that is shown holds no secret."""

import pytest

from services.platform.urls import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:p%40ss@h:1/0", "redis://h:1/0"),
        ("redis://:a@b@h:1", "redis://h:1"),
        ("redis://:sec@ret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host", "rediss://host"),
        ("redis://h:1/0?password=secret", "redis://h:1/0"),
        ("redis://h:1/0?password=a@secret", "redis://h:1/0"),
        ("redis://h?username=u&password=secret", "redis://h"),
        ("redis://:secret?x@h:1/0", "redis://..."),  # not escaped, so where the host begins is a guess
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("s3://bucket/ratchet", "s3://bucket/ratchet"),
        ("/srv/a@b/store", "/srv/a@b/store"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
