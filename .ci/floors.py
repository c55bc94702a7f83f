"""Print the lowest version that pyproject.toml allows of each dependency, as pip constraints."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(text: str) -> list[str]:
    """List `name==floor` for every quoted `name>=floor` requirement."""
    found = re.findall(r'^\s+"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', text, re.MULTILINE)
    return [f"{name}=={version}" for name, version in found]


if __name__ == "__main__":
    print("\n".join(floors(PROJECT.read_text("utf-8"))))
