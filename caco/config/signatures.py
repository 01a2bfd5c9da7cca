"""The arguments that a `_target_` takes, read from its source, because importing it would import torch: seconds of
waiting before a typing mistake is reported.

Names are looked up as Python would look them up (through imports, re-exports, aliases and base classes), by parsing
instead of running. Where the source cannot be read, for example in a C extension, nothing is refused.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from caco.errors import UserError

MAX_HOPS = 12  # the number of re-exports followed before giving up, which also ends circular imports


@dataclass(frozen=True)
class Parameter:
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """A callable's parameters by name. `open`: it also takes others (**kwargs, or a base class that cannot be read)."""

    parameters: dict[str, Parameter]
    open: bool
    module: "Module"


class Module:
    """The names that a source file defines at its top level."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.is_package = path.name == "__init__.py"
        self.nodes: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str]] = {}  # local name -> (module, name in that module)
        self.stars: list[str] = []
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise UserError(f"{path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
        self._collect(tree.body)

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.nodes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.nodes[node.targets[0].id] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.nodes[node.target.id] = node
            elif type(node).__name__ == "TypeAlias":  # `type A = ...`, Python 3.12
                self.nodes[node.name.id] = node  # type: ignore[attr-defined]
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(node)
                for alias in node.names:
                    if alias.name == "*":
                        self.stars.append(source)
                    else:
                        self.imports[alias.asname or alias.name] = (source, alias.name)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                for field in ("body", "orelse", "finalbody"):
                    self._collect(getattr(node, field, []))

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        kept = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])


def find_spec(name: str, search: Sequence[str] | None = None) -> ModuleSpec | None:
    """Where Python would import a module from, whether or not it is already imported.

    Args:
        search: the search path of the parent package; None for a top-level module.
    """
    specs = (finder.find_spec(name, search) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next(filter(None, specs), None)


@lru_cache(maxsize=None)
def load(name: str) -> Module | None:
    """The module's parsed source; None if no Python source is found. Parent packages are found without importing them.

    Raises:
        UserError: the file is not valid Python; names the file and the line.
    """
    spec: ModuleSpec | None = None
    search = None
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        full = ".".join(parts[:length])
        spec = find_spec(full, search)
        if spec is None:
            return None
        search = spec.submodule_search_locations
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Module(name, Path(spec.origin))


def lookup(module: Module, name: str, hops: int = MAX_HOPS) -> tuple[Module, ast.stmt] | None:
    """The definition of `name` as seen in `module`: the module that defines it and the statement; None if not found."""
    if hops == 0:
        return None
    if name in module.nodes:
        node = module.nodes[name]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id != name:
            return lookup(module, node.value.id, hops - 1) or (module, node)
        return module, node
    sources = [module.imports[name]] if name in module.imports else [(star, name) for star in module.stars]
    for source, original in sources:
        elsewhere = load(source)
        found = lookup(elsewhere, original, hops - 1) if elsewhere else None
        if found:
            return found
    return None


@lru_cache(maxsize=None)
def find(target: str) -> Signature | None:
    """The signature of the dotted path `target`; None if its source cannot be found or read."""
    module_name, _, name = target.rpartition(".")
    module = load(module_name) if module_name else None
    found = lookup(module, name) if module else None
    return signature(*found) if found else None


def forget() -> None:
    """Drop all cached sources: a file may have been edited, or the import path may now lead to another file."""
    load.cache_clear()
    find.cache_clear()


def signature(module: Module, node: ast.stmt) -> Signature | None:
    """The parameters of a function or a class; for a TypedDict its keys. None for any other statement."""
    if isinstance(node, ast.FunctionDef):
        return _of_function(module, node)
    if not isinstance(node, ast.ClassDef):
        return None
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is not None:
        return _of_function(module, init, skip=1)
    inherited: dict[str, Parameter] = {}
    is_open = False
    fields = _is_dataclass(node)
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in ("TypedDict", "NamedTuple"):
            fields = True
            continue
        found = lookup(module, base.id) if isinstance(base, ast.Name) else None
        elsewhere = signature(*found) if found else None
        if elsewhere is None:
            is_open = is_open or not (isinstance(base, ast.Name) and base.id in ("object", "Protocol"))
        else:
            inherited |= elsewhere.parameters
            is_open = is_open or elsewhere.open
            fields = fields or (found is not None and is_typed_dict(*found))
    return Signature(inherited | dict(_fields(node)) if fields else inherited, is_open, module)


def declared(target: str, name: str) -> Any:
    """The plain value of a class attribute, such as `package = "mlflow"`, of the class at the dotted path `target` or
    of its base classes. For a call, such as `needs = Needs(patches="shuffled")`, its plain keyword arguments as a dict;
    for a dict its plain items; None if the attribute is not set or cannot be read."""
    module_name, _, class_name = str(target).rpartition(".")  # str: components.py refuses a target that is no text
    module = load(module_name) if module_name else None
    return _declared(lookup(module, class_name), name) if module else None


def _declared(found: tuple[Module, ast.stmt] | None, name: str) -> Any:
    module, node = found or (None, None)
    if module is None or not isinstance(node, ast.ClassDef):
        return None
    for item in node.body:
        if isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return _plain_value(item.value)
    bases = (_declared(lookup(module, base.id), name) for base in node.bases if isinstance(base, ast.Name))
    return next((value for value in bases if value is not None), None)


def _plain_value(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call):
        return {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
    if isinstance(node, ast.Dict):
        keys, values = (
            [part.value if isinstance(part, ast.Constant) else None for part in parts]
            for parts in (node.keys, node.values)
        )
        return dict(zip(keys, values, strict=True))
    return node.value if isinstance(node, ast.Constant) else None


def is_typed_dict(module: Module, node: ast.stmt) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id == "TypedDict":
            return True
        found = lookup(module, base.id) if isinstance(base, ast.Name) else None
        if found and is_typed_dict(*found):
            return True
    return False


def is_group(module: Module, node: ast.stmt) -> bool:
    """Whether the class is a group of settings that YAML can hold: a dataclass or a TypedDict."""
    return is_typed_dict(module, node) or (isinstance(node, ast.ClassDef) and _is_dataclass(node))


def _of_function(module: Module, node: ast.FunctionDef, *, skip: int = 0) -> Signature:
    positional = [*node.args.posonlyargs, *node.args.args]
    first_default = len(positional) - len(node.args.defaults)
    parameters = {
        arg.arg: Parameter(arg.annotation, required=index < first_default) for index, arg in enumerate(positional)
    }
    for name in list(parameters)[:skip]:
        del parameters[name]
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        parameters[arg.arg] = Parameter(arg.annotation, required=default is None)
    return Signature(parameters, node.args.kwarg is not None, module)


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return any(getattr(item, "id", getattr(item, "attr", "")) == "dataclass" for item in names)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Parameter]]:
    """The fields of a dataclass, or the keys of a TypedDict, with their parameters."""
    total = not any(item.arg == "total" and getattr(item.value, "value", True) is False for item in node.keywords)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation, required = item.annotation, item.value is None and total
            wrapper = getattr(annotation.value, "id", "") if isinstance(annotation, ast.Subscript) else ""
            if wrapper == "ClassVar":
                continue
            if wrapper in ("NotRequired", "Required") and isinstance(annotation, ast.Subscript):
                annotation, required = annotation.slice, wrapper == "Required"
            if isinstance(item.value, ast.Call):  # field(...)
                required = not any(word.arg in ("default", "default_factory") for word in item.value.keywords)
            yield item.target.id, Parameter(annotation, required)
