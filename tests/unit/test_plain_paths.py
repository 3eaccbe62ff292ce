"""Which paths Triton gets as they are, and the links that it gets in place of the others."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

import pytest

from quire.errors import StartupError
from quire.launcher.plain_paths import plain_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache"


def test_a_plain_path_is_given_as_it_is(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "Models_1.0" / "a+b@c%d=e,f:g-h"
    assert plain_path(path) == path
    assert not cache.exists()


@pytest.mark.parametrize("character", [*" \t\n'\"$;&()`\\*?[]{}!#~<>|^", "é", "日", "\u00a0", "\udcff"])
def test_any_other_path_is_given_as_a_link(tmp_path: Path, cache: Path, character: str) -> None:
    path = tmp_path / f"a{character}b" / f"repo{character}1"
    path.mkdir(parents=True)
    link = plain_path(path)
    assert link.parent == cache / "quire" / "links"
    assert shlex.quote(str(link)) == str(link)
    assert str(link).isascii()
    assert link.readlink() == path
    assert plain_path(path) == link


def test_folders_of_the_same_name_have_links_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / "a b" / "repository", tmp_path / "c d" / "repository"]
    assert [plain_path(path).readlink() for path in paths] == paths


def test_a_link_that_was_bent_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    path.mkdir()
    link = plain_path(path)
    link.unlink()
    link.symlink_to(tmp_path)
    assert plain_path(path) == link
    assert link.readlink() == path


def test_links_that_lead_nowhere_go_when_the_next_is_made(tmp_path: Path) -> None:
    gone, kept, new = (tmp_path / f"a {name}" for name in ("gone", "kept", "new"))
    for path in (gone, kept, new):
        path.mkdir()
    links = {plain_path(gone), plain_path(kept)}
    gone.rmdir()
    assert set(plain_path(new).parent.iterdir()) == links - {plain_path(gone)} | {
        plain_path(new),
        plain_path(kept),
    }


@pytest.fixture
def spaced_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "a cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def test_links_lie_among_temporary_files_for_nobody_else_if_the_caches_path_is_not_plain(
    tmp_path: Path, spaced_cache: Path
) -> None:
    link = plain_path(spaced_cache / "backends")
    assert link.parent == tmp_path / f"quire-links-{os.geteuid()}"
    assert link.parent.stat().st_mode & 0o777 == 0o700
    assert link.readlink() == spaced_cache / "backends"


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, spaced_cache: Path) -> None:
    folder = tmp_path / f"quire-links-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StartupError, match=rf"{folder} is not a folder that only user .* remove it"):
        plain_path(spaced_cache)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StartupError, match="is not a folder"):
        plain_path(spaced_cache)


def test_without_a_place_for_links_the_sentence_names_path_character_and_remedy(
    tmp_path: Path, spaced_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary (files)"))
    path = tmp_path / "it's here"
    with pytest.raises(StartupError) as refusal:
        plain_path(path)
    sentence = str(refusal.value)
    assert sentence.startswith(f'{path} has the character "\'" in it')
    assert "set XDG_CACHE_HOME to a folder with such a path" in sentence


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(StartupError, match="Not a directory"):
        plain_path(tmp_path / "a b")
