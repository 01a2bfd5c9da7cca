"""Where options and components come from: conf/, and a folder of the user's own, which `--config-dir DIR` names.

DIR/method/mine.yaml is the option method=mine, and its `_target_: mine.Mine` is found in DIR/mine.py. A command that
starts from a run looks besides into the folder that the run recorded. What a command looks into is one state of its
process: the import path is one, too, and forked and spawned processes inherit that.
"""

import difflib
import importlib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from caco.config import signatures
from caco.errors import FileError, UserError
from caco.runs.identity import file_digest
from caco.runs.paths import expanded

# Beside the package in a checkout, inside it in a wheel (pyproject.toml maps the one to the other).
CONF = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if path.is_dir())
SUFFIXES = (".py", ".yaml", ".so")  # of what belongs to a folder of the user's own; images and weights beside it do not
_own: list[Path] = []  # the first is looked into first
_gone: list[Path] = []  # what a run recorded and is not there any more
_added: list[str] = []  # to the import path


class _SearchPath(SearchPathPlugin):
    """How Hydra hears of the folders, whichever way something is composed."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _own:
            search_path.append("caco", f"file://{folder}")


def take(arguments: Sequence[str]) -> list[str]:
    """The command line without `--config-dir DIR`; from here on that folder is looked into, and no other but conf/.

    Raises:
        UserError: as `use`; or no folder is named, or several are.
    """
    rest, named = [], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):  # Hydra's own names of it
            named.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if len(named) > 1 or "" in named:
        raise UserError(f"--config-dir: expected one folder, got {', '.join(filter(None, named)) or 'none'}")
    use(*named)
    return rest


def flag() -> list[str]:
    """The words that `take` would take for what is looked into now."""
    return ["--config-dir", str(_own[0])] if _own else []


def use(*folders: str | Path) -> None:
    """Look into these folders besides conf/, the first of them first, and no longer into others.

    Raises:
        UserError: one is not there, or something in it would be ignored: a file whose name is taken, a # @package
            further down.
    """
    chosen = [expanded(folder).absolute() for folder in folders]
    for folder in chosen:
        if not folder.is_dir():
            raise FileError(f"--config-dir: expected a folder, got {folder}, which is not there")
    _forget()
    for folder in chosen:
        _refuse_what_would_be_ignored(folder, chosen)
    _own[:] = chosen
    if chosen:
        Plugins.instance().register(_SearchPath)
    _added[:] = [str(folder) for folder in chosen if str(folder) not in sys.path]
    sys.path.extend(_added)  # last: what is installed keeps its meaning for everybody else


def use_recorded(folder: str | None) -> None:
    """Look, after the folder that the command line names, into the one that a run recorded, if it is still there.

    If not, that is said once something is missing: not every command needs what lies in it.
    """
    if folder is None or Path(folder) in _own:
        return
    if Path(folder).is_dir():
        use(*_own, folder)
    else:
        _gone.append(Path(folder))


def _forget() -> None:
    """As if no folder had been used; modules of theirs may be edited before they are used again, or others have their
    names.
    """
    for folder in _added:
        sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        if any((getattr(module, "__file__", None) or "").startswith(f"{folder}/") for folder in _added):
            del sys.modules[name]
    for known in (_own, _gone, _added):
        known.clear()
    importlib.invalidate_caches()
    signatures.forget()


def own() -> list[Path]:
    """The folders that are looked into besides conf/."""
    return list(_own)


def config_dir() -> str | None:
    """The folder that a run records as `config_dir`."""
    return str(_own[0]) if _own else None


def option_file(group: str, option: str) -> Path | None:
    """The YAML file behind group=option."""
    return next((file for root in (CONF, *_own) if (file := root / group / f"{option}.yaml").is_file()), None)


def groups() -> dict[str, list[str]]:
    """Every config group and its options, as they lie in conf/ and in the user's folder."""
    names = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    return {
        name: sorted({file.stem for root in (CONF, *_own) for file in (root / name).glob("*.yaml")}) for name in names
    }


def listed(names: Iterable[str] | None = None) -> str:
    """The groups and their options as `--help` shows them, as wide as a terminal: those named, or all that have any."""
    known = groups()
    return "\n".join(
        textwrap.fill(f"  {name}: {', '.join(known[name])}", 118, subsequent_indent="      ", break_on_hyphens=False)
        for name in (known if names is None else names)
        if known[name]
    )


def files(folder: Path) -> list[Path]:
    """What belongs to a folder of the user's own: at its top, in the folders there, and at any depth of those that hold
    Python.

    So a folder that holds runs or images as well can be used; they are no part of it.
    """
    found = [path for path in folder.iterdir() if path.is_file()]
    for part in folder.iterdir():
        if part.is_dir():
            top = list(part.iterdir())
            is_python = any(path.suffix == ".py" for path in top)
            found += part.rglob("*") if is_python else top
    hidden = (".", "__pycache__")
    return sorted(
        path
        for path in found
        if path.suffix in SUFFIXES
        and path.is_file()
        and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    )


def record(folders: Iterable[Path] | None = None) -> dict[str, str]:
    """For environment.json: each file of these folders (None: all that are used) with a digest of its content.

    What git_sha is for caco's own code. The files' content is no part of a run's identity, and where they lie neither.
    """
    used = _own if folders is None else folders
    listed = [f"{file.relative_to(folder)} {file_digest(str(file))}" for folder in used for file in files(folder)]
    return {"config_dir_files": ", ".join(listed)} if listed else {}


def code_of(modules: Iterable[str]) -> dict[str, str]:
    """`record` of the folders that hold one of these modules: what is known of them holds no longer when it changes."""
    tops = {module.partition(".")[0] for module in modules}
    return record(folder for folder in _own if tops & _modules(folder).keys())


def lacks(module: str) -> str:
    """Where a module that is nowhere was looked for, to go on a sentence with; and what comes nearest."""
    top = module.partition(".")[0]
    if _gone:
        return f"; the run had it from {_gone[0]}, which is not there any more: say --config-dir DIR, where that is now"
    if not _own:
        return "; a file of your own is found in the folder that --config-dir names"
    near = difflib.get_close_matches(top, [name for folder in _own for name in _modules(folder)], n=1)
    wanted = " nor ".join(str(folder / f"{top}.py") for folder in _own)
    return f", and there is no {wanted}" + (f"; did you mean {near[0]}?" if near else "")


def misplaced(group: str, option: str) -> str:
    """Of an option that is not there: a file of its name that lies elsewhere, to go on a sentence with."""
    if _gone:
        return f" Perhaps it was in {_gone[0]}, which is not there any more: say --config-dir DIR, where that is now."
    near = [file for folder in _own for file in (*folder.glob(f"{option}.yaml"), *folder.glob(f"*/{option}.yaml"))]
    return f" {near[0]} would have to lie in a folder {group}/ there." if near else ""


def _modules(folder: Path) -> dict[str, Path]:
    """Modules and packages at a folder's top."""
    paths = [*folder.glob("*.py"), *(file.parent for file in folder.glob("*/__init__.py"))]
    return {path.stem: path for path in sorted(paths) if path.stem.isidentifier() and not path.stem.startswith("__")}


def _refuse_what_would_be_ignored(folder: Path, ours: Sequence[Path]) -> None:
    for file in files(folder):
        if file.suffix != ".yaml":
            continue
        known = CONF / file.relative_to(folder)
        if known.is_file() and not known.samefile(file):
            raise UserError(
                f"{file}: caco has {known.relative_to(CONF)} already and would take its own; give yours another name"
            )
        if re.search(r"\A(?!\s*#\s*@)[\s\S]*^\s*#\s*@package\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            raise UserError(f"{file}: # @package has to be its first line; further down it is a mere comment")
    for name, path in _modules(folder).items():
        spec = signatures.find_spec(name)
        origin = None if spec is None else spec.origin  # a mere folder elsewhere has none, and gives way to a module
        if name in sys.stdlib_module_names:
            origin = "its own"
        elif origin is None or any(Path(origin).resolve().is_relative_to(one.resolve()) for one in ours):
            continue
        raise UserError(f"{path}: Python would import {origin} by the name {name}; give yours another one")


def groups_chosen_by(file: Path) -> list[str]:
    """The groups whose option the defaults of an option's file choose anew: of conf/preset/demo.yaml method, bank,
    ...
    """
    return re.findall(r"^\s*- override /([\w/]+):", file.read_text(encoding="utf-8"), re.MULTILINE)
