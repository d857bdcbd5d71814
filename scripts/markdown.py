"""What the two writers of documents share: pieces of Markdown, and writing pages or comparing them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by `make docs` from the code. A change made here is lost. -->"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text on one line, safe inside a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def anchor(heading: str) -> str:
    """What GitHub calls a heading in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def write(pages_of: Callable[[], dict[Path, str]], arguments: list[str]) -> int:
    """Write the pages, or with --check compare them. 0 when all is as it should be."""
    stale: list[str] = []
    for path, text in pages_of().items():
        if "--check" in arguments:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(str(path.relative_to(ROOT)))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not what the code says: {', '.join(stale)}. Run `make docs`.", file=sys.stderr)
    return 1 if stale else 0


def shown(value: Any) -> str:
    """A default as it is written in JSON."""
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 80 else "see the code"
