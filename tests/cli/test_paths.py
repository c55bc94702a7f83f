from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mnp.cli.paths import expanded


def test_a_leading_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert Path(expanded("~/page.html")) == tmp_path / "page.html"
    assert Path(expanded("~")) == tmp_path


@pytest.mark.parametrize(
    "path", ["page.html", "a/~/b", "~no-such-user.pt", "hf://owner/name", "", "last"]
)
def test_other_words_stay_as_they_are(path: str) -> None:
    assert expanded(path) == path
