"""URLs as they may be shown."""

from __future__ import annotations

from urllib.parse import urlsplit


def without_password(url: str) -> str:
    """A URL without user and password, nor a query, which may hold them too. A plain folder stays as it is."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return url
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        _ = parts.port  # raises when it is no number: a password with a '?' or '/' that was not escaped
    except ValueError:
        return f"{scheme}://..."
    return f"{scheme}://{host}{parts.path}"
