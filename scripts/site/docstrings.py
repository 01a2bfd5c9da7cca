"""Read the descriptions of arguments from docstrings, without importing the modules."""

import ast
import functools
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def arguments(target: str) -> dict[str, str]:
    """{argument: its description} from the Args section of a class or function, given by its dotted name.

    Descriptions from base classes in the same file are included. Empty if there is no such section.
    """
    module, _, name = target.rpartition(".")
    if not module:
        return {}
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return {}
    return _of(ast.parse(file.read_text(encoding="utf-8")), name)


def _of(tree: ast.Module, name: str) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            bases = [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]
            inherited = {key: text for base in bases for key, text in _of(tree, base).items()}
            return inherited | _described(ast.get_docstring(node) or "")
    return {}


def _described(docstring: str) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else ():
        if begun := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = begun[1].split(", ")
            found |= dict.fromkeys(names, begun[2])
        elif names and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
