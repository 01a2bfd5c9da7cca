"""Paths and text files of real users: home folders, long names, folders without write access, files of any editor."""

import os
from pathlib import Path

import pytest

from caco.errors import UserError
from caco.runs.paths import expanded, make_folder, read_text, require_writable, with_home


def test_a_tilde_is_the_home_folder_also_where_no_shell_has_seen_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "o'home"))
    assert expanded("~/x") == tmp_path / "o'home" / "x"
    assert with_home(["seed=1", "hydra.run.dir='~/x'", "name=~"]) == [
        "seed=1",
        f"hydra.run.dir='{tmp_path}/o\\'home/x'",
        "name=~",
    ]
    with pytest.raises(UserError, match="~nobody-of-this-name/x: there is no such user here"):
        expanded("~nobody-of-this-name/x")


def test_every_commands_paths_have_their_tilde_replaced_where_a_shell_does_not(repo_root):
    """Of --csv=~/x and eval.domain.root=~/x no shell does."""
    own = {"experiments/compare/__main__.py", "experiments/demo.py"}  # for who works on caco itself
    for file in (file for part in ("caco", "experiments", "analysis") for file in (repo_root / part).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if str(file.relative_to(repo_root)) not in own:
            assert "type=Path" not in text, f"{file}: take caco.runs.paths.expanded"
        assert ".expanduser()" not in text, f"{file}: raises where there is no home; take caco.runs.paths.expanded"


def test_without_a_home_that_is_said(monkeypatch):
    # as for a container's user without an entry in /etc/passwd
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="~/x: this user has no home folder"):
        expanded("~/x")


def test_a_directory_that_cannot_be_is_refused_with_its_cause(tmp_path, monkeypatch):
    require_writable(tmp_path / "a" / "b", "to")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot be made: {tmp_path}/file is not a folder; choose another one with to"):
        require_writable(tmp_path / "file" / "x", "to")
    with pytest.raises(UserError, match="too long for a file system; choose another one with hydra.run.dir"):
        require_writable(tmp_path / ("x" * 300), "hydra.run.dir")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # because root may write everywhere
    with pytest.raises(UserError, match=f"this user may not write into {tmp_path}"):
        require_writable(tmp_path / "new", "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_folder_that_cannot_be_made_after_all_is_named():
    with pytest.raises(UserError, match=r"/proc/x/y cannot be made \(.*\); choose another one with to"):
        make_folder(Path("/proc/x/y"), "to")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_list_is_read_in_whatever_encoding_an_editor_writes(tmp_path, encoding):
    file = Path(tmp_path / "classes.txt")
    file.write_bytes("größe\r\nHündin\n".encode(encoding))
    assert read_text(file).split() == ["größe", "Hündin"]
    if encoding == "latin-1":
        file.write_bytes("größe\r\n1€\n".encode("cp1252"))
        assert read_text(file).split() == ["größe", "1€"]
