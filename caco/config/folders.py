"""Where options and components are looked for: conf/, and the user's own folder, which `--config-dir DIR` names.

DIR/method/mine.yaml is the option method=mine, and its `_target_: mine.Mine` is found in DIR/mine.py. A command that
starts from a run also searches the folder that the run recorded. The folders in use are module state, because the
import path is state of the process too; forked and spawned processes inherit both.
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

# conf/ is beside the package in a checkout and inside it in a wheel (pyproject.toml maps one to the other).
CONF = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if path.is_dir())
SUFFIXES = (".py", ".yaml", ".so")  # files that count as part of the user's folder; images and weights do not
_own: list[Path] = []  # the user's folders in use; the first is searched first
_gone: list[Path] = []  # folders that a run recorded and that no longer exist
_added: list[str] = []  # folders that were added to the import path


class _SearchPath(SearchPathPlugin):
    """Adds the folders to Hydra's search path for every composition."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _own:
            search_path.append("caco", f"file://{folder}")


def take(arguments: Sequence[str]) -> list[str]:
    """The command line without `--config-dir DIR`; from now on DIR and conf/ are searched, and no other folder.

    Raises:
        UserError: as in `use`; also if --config-dir names no folder, or is given several times.
    """
    rest, named = [], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):  # Hydra's own names of this flag
            named.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if len(named) > 1 or "" in named:
        raise UserError(f"--config-dir: expected one folder, got {', '.join(filter(None, named)) or 'none'}")
    use(*named)
    return rest


def flag() -> list[str]:
    """The command-line words that name the folder in use now; `take` accepts them."""
    return ["--config-dir", str(_own[0])] if _own else []


def use(*folders: str | Path) -> None:
    """Search these folders besides conf/, in this order, and no others.

    Raises:
        UserError: a folder does not exist, or one of its files would be ignored: its name is already taken, or its
            `# @package` is not in the first line.
    """
    chosen = [expanded(folder).absolute() for folder in folders]
    for folder in chosen:
        if not folder.is_dir():
            raise FileError(f"--config-dir: expected a folder, got {folder}, which does not exist")
    _forget()
    for folder in chosen:
        _refuse_what_would_be_ignored(folder, chosen)
    _own[:] = chosen
    if chosen:
        Plugins.instance().register(_SearchPath)
    _added[:] = [str(folder) for folder in chosen if str(folder) not in sys.path]
    sys.path.extend(_added)  # at the end, so that installed packages keep their meaning


def use_recorded(folder: str | None) -> None:
    """Search the folder that a run recorded, if it still exists, after the folder that the command line names.

    A folder that no longer exists is reported only when something from it is needed: not every command needs it.
    """
    if folder is None or Path(folder) in _own:
        return
    if Path(folder).is_dir():
        use(*_own, folder)
    else:
        _gone.append(Path(folder))


def _forget() -> None:
    """Undo `use`, and unload the modules that came from its folders: their files may be edited, or other folders may
    have modules of the same names.
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
    """The folders that are searched besides conf/."""
    return list(_own)


def config_dir() -> str | None:
    """The folder that a run records in its setting `config_dir`."""
    return str(_own[0]) if _own else None


def option_file(group: str, option: str) -> Path | None:
    """The YAML file behind group=option."""
    return next((file for root in (CONF, *_own) if (file := root / group / f"{option}.yaml").is_file()), None)


def groups() -> dict[str, list[str]]:
    """Every config group with its options, from conf/ and from the user's folder."""
    names = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    return {
        name: sorted({file.stem for root in (CONF, *_own) for file in (root / name).glob("*.yaml")}) for name in names
    }


def listed(names: Iterable[str] | None = None) -> str:
    """Groups and their options as `--help` shows them, wrapped at 118 columns: the named groups, or all with
    options.
    """
    known = groups()
    return "\n".join(
        textwrap.fill(f"  {name}: {', '.join(known[name])}", 118, subsequent_indent="      ", break_on_hyphens=False)
        for name in (known if names is None else names)
        if known[name]
    )


def files(folder: Path) -> list[Path]:
    """The files that count as part of a user's folder: those at its top, those directly in its subfolders, and all
    files in subfolders that hold Python, at any depth.

    So the folder may also hold runs or images, which do not count.
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
    """For environment.json: every file of these folders (None: all folders in use) with a digest of its content.

    It records the user's code as git_sha records caco's own. Neither the files' content nor their place is part of a
    run's identity.
    """
    used = _own if folders is None else folders
    listed = [f"{file.relative_to(folder)} {file_digest(str(file))}" for folder in used for file in files(folder)]
    return {"config_dir_files": ", ".join(listed)} if listed else {}


def code_of(modules: Iterable[str]) -> dict[str, str]:
    """`record` of the folders that hold one of these modules. Results that depend on a module are stale once it
    changes.
    """
    tops = {module.partition(".")[0] for module in modules}
    return record(folder for folder in _own if tops & _modules(folder).keys())


def lacks(module: str) -> str:
    """The end of a sentence about a module that was not found: where it was looked for, and the nearest name."""
    top = module.partition(".")[0]
    if _gone:
        return f"; the run had it from {_gone[0]}, which no longer exists: say --config-dir DIR with its present place"
    if not _own:
        return "; to use a file of your own, name its folder with --config-dir"
    near = difflib.get_close_matches(top, [name for folder in _own for name in _modules(folder)], n=1)
    wanted = " nor ".join(str(folder / f"{top}.py") for folder in _own)
    return f", and there is no {wanted}" + (f"; did you mean {near[0]}?" if near else "")


def misplaced(group: str, option: str) -> str:
    """The end of a sentence about an option that does not exist: where a file of that name lies instead."""
    if _gone:
        return f" Perhaps it was in {_gone[0]}, which no longer exists: say --config-dir DIR with its present place."
    near = [file for folder in _own for file in (*folder.glob(f"{option}.yaml"), *folder.glob(f"*/{option}.yaml"))]
    return f" {near[0]} would have to be in a folder {group}/ there." if near else ""


def _modules(folder: Path) -> dict[str, Path]:
    """The modules and packages at the top of a folder, by name."""
    paths = [*folder.glob("*.py"), *(file.parent for file in folder.glob("*/__init__.py"))]
    return {path.stem: path for path in sorted(paths) if path.stem.isidentifier() and not path.stem.startswith("__")}


def _refuse_what_would_be_ignored(folder: Path, ours: Sequence[Path]) -> None:
    for file in files(folder):
        if file.suffix != ".yaml":
            continue
        known = CONF / file.relative_to(folder)
        if known.is_file() and not known.samefile(file):
            raise UserError(
                f"{file}: caco has its own {known.relative_to(CONF)} and would use that one; give yours another name"
            )
        if re.search(r"\A(?!\s*#\s*@)[\s\S]*^\s*#\s*@package\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            raise UserError(f"{file}: # @package must be in the first line; further down it is an ordinary comment")
    for name, path in _modules(folder).items():
        spec = signatures.find_spec(name)
        origin = None if spec is None else spec.origin  # None: a folder without __init__.py, which a module overrides
        if name in sys.stdlib_module_names:
            origin = "its own"
        elif origin is None or any(Path(origin).resolve().is_relative_to(one.resolve()) for one in ours):
            continue
        raise UserError(f"{path}: Python would import {origin} under the name {name}; give yours another name")


def groups_chosen_by(file: Path) -> list[str]:
    """The groups whose options an option's file overrides in its defaults list: for conf/preset/demo.yaml method, bank,
    ...
    """
    return re.findall(r"^\s*- override /([\w/]+):", file.read_text(encoding="utf-8"), re.MULTILINE)
