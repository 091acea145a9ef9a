"""The commit that a run was trained by, read from git's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.storage.run_directory import commit

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """`src/sfumato` of a checkout."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    place = tmp_path / "src" / "sfumato"
    place.mkdir(parents=True)
    return place


@pytest.mark.parametrize("packed", [False, True])
def test_a_branch_is_followed_to_its_commit(package: Path, packed: bool) -> None:
    git = package.parents[1] / ".git"
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    if packed:
        (git / "packed-refs").write_text(
            f"# pack-refs with: peeled\n{'9' * 40} refs/heads/not-main\n{HASH} refs/heads/main\n"
        )
    else:
        (git / "refs" / "heads" / "main").write_text(f"{HASH}\n")
    assert commit(package) == HASH


def test_a_detached_head_is_its_own_commit(package: Path) -> None:
    (package.parents[1] / ".git" / "HEAD").write_text(f"{HASH}\n")
    assert commit(package) == HASH


def test_a_worktree_has_the_branches_of_its_repository(package: Path, tmp_path: Path) -> None:
    git = package.parents[1] / ".git"
    (git / "refs" / "heads" / "mine").write_text(f"{HASH}\n")
    own = git / "worktrees" / "wt"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/mine\n")
    (own / "commondir").write_text("../..\n")
    checkout = tmp_path / "wt"
    (checkout / "src" / "sfumato").mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    (checkout / ".git").write_text(f"gitdir: {own}\n")
    assert commit(checkout / "src" / "sfumato") == HASH


def test_where_there_is_no_checkout_there_is_no_commit(package: Path, tmp_path: Path) -> None:
    assert commit(package) is None  # no HEAD
    (package.parents[1] / ".git" / "HEAD").write_text("ref: refs/heads/unborn\n")
    assert commit(package) is None
    # as in site-packages, which may lie inside somebody's repository
    (package.parents[1] / "pyproject.toml").unlink()
    (package.parents[1] / ".git" / "HEAD").write_text(f"{HASH}\n")
    assert commit(package) is None
