"""Imports run one way: equations, distributed -> nn, banks -> methods -> trainer -> train; data, evals, tracking are leaves."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "caco").rglob("*.py"))
}
RANKS = {"equations": 0, "distributed": 0, "schedules": 0, "nn": 1, "banks": 1, "methods": 2, "trainer": 3, "build": 4, "train": 5, "evaluate": 6, "export": 7}
COMMANDS = {"caco.data.write"}  # ways in, as caco.train is: they read a configuration, and nothing imports them
# An evaluator that trains needs what any training needs, but never the trainer.
NEEDED_TO_TRAIN = {"distributed", "checkpoint", "optimizers", "schedules", "nn"}
LEAVES = {"data": {"data"}, "evals": {"evals", "data", "tracking", *NEEDED_TO_TRAIN}, "tracking": {"tracking"}}
FOR_ALL = {"errors", "installed", "instructions"}  # of this installation and this processor: they import nothing of caco


def imported(path: Path) -> set[str]:
    """Modules of caco that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
    return {name for name in names if name.split(".")[0] == "caco"}


IMPORTS = {module: imported(path) - {module} for module, path in MODULES.items()}


def part(module: str) -> str:
    """trainer for caco.trainer, banks for caco.banks.rows."""
    return (module.split(".") + [""])[1]


def edges() -> list[tuple[str, str]]:
    return [(module, other) for module, others in IMPORTS.items() for other in others]


def test_the_walk_sees_the_package():
    assert {"caco", "caco.equations", "caco.trainer", "caco.evals.knn"} <= set(MODULES)
    assert ("caco.evals.knn", "caco.evals.features") in edges()


def test_layers_import_only_downwards():
    wrong = [
        (module, other)
        for module, other in edges()
        if part(module) in RANKS
        and part(other) in RANKS
        and part(module) != part(other)
        and RANKS[part(module)] <= RANKS[part(other)]
    ]
    assert wrong == []


def test_leaves_import_no_more_than_leaves():
    wrong = [
        (module, other)
        for module, other in edges()
        if part(module) in LEAVES and part(other) not in LEAVES[part(module)] | FOR_ALL and module not in COMMANDS
    ]
    assert wrong == []
    assert not [edge for edge in edges() if part(edge[0]) in FOR_ALL]
    assert not [edge for edge in edges() if edge[1] in COMMANDS]


def test_only_the_way_in_knows_the_trainer():
    assert {module for module, other in edges() if part(other) == "trainer"} <= {"caco.build", "caco.train"}


def test_nothing_is_imported_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("module", ["caco", "caco.config", "caco.runs"])
def test_configuration_comes_without_torch(module):
    loaded = f"import sys, {module}; print([name for name in ('torch', 'torchvision', 'mlflow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_only_a_docstring_but_for_what_comes_before_torch():
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            content = [ast.unparse(node) for node in ast.parse(path.read_text()).body[1:]]
            assert content == (["from caco import instructions", "instructions.apply()"] if module == "caco" else []), module
    assert not any(IMPORTS[f"caco.{name}"] for name in FOR_ALL)
