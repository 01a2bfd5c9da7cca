"""The layers of the code ("floors" with "rooms", the packages): imports go only to lower floors, never in a circle, and
configuration works without torch.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for part in ("caco", "experiments", "analysis", "hydra_plugins")
    for path in sorted((ROOT / part).rglob("*.py"))
}
# The floors, the lowest first. Each name is a room (a package) or a single module. Rooms on the same floor do not
# import each other.
FLOORS = [
    ["caco.installed", "caco.redaction"],
    [
        "caco.devices",
        "caco.errors",
        "caco.instructions",
        "caco.equations",
        "caco.metrics",
        "caco.saying",
        "caco.sheets",
    ],
    ["caco.distributed", "caco.ranges", "caco.schedules", "caco.runs"],
    ["caco.data", "caco.nn", "caco.banks", "caco.tracking", "caco.config"],
    ["caco.methods", "caco.evals", "caco.launch"],
    ["caco.engine", "hydra_plugins"],
    ["caco.checking"],
    [
        "caco.train",
        "caco.evaluate",
        "caco.export",
        "caco.embed",
        "caco.plan",
        "caco.doctor",
        "caco.write",
        "caco.results",
        "caco.library",
    ],
    ["experiments"],
    ["analysis"],
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# Exceptions: rooms on the same floor of which one imports the other, with the reason.
NEIGHBOURS = {
    ("caco.export", "caco.evaluate"): "both start from a run or from weights, and share that part of a command",
    ("caco.embed", "caco.evaluate"): "the same",
}


def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
    return {name for name in names if name in MODULES}


IMPORTS = {module: imported(path) - {module} for module, path in MODULES.items()}


def room(module: str) -> str:
    """The room of a module: caco.banks for caco.banks.rows, caco.train for itself, experiments for experiments.run."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "caco" else 1])


def edges() -> list[tuple[str, str]]:
    return [(module, other) for module, others in IMPORTS.items() for other in others if "caco" not in (module, other)]


def test_the_walk_sees_the_house():
    assert {
        "caco",
        "caco.equations",
        "caco.engine.trainer",
        "caco.data.sets.beton",
        "experiments.run",
        "analysis.table",
    } <= set(MODULES)
    assert ("caco.evals.knn", "caco.evals.features") in edges() and (
        "caco.data.sets.beton",
        "caco.data.views.native",
    ) in edges()
    assert {room(module) for module in MODULES} - {"caco"} == set(FLOOR)


def test_imports_go_down_the_floors():
    wrong = [
        (module, other)
        for module, other in edges()
        if room(module) != room(other)
        and FLOOR[room(other)] >= FLOOR[room(module)]
        and (room(module), room(other)) not in NEIGHBOURS
    ]
    assert wrong == []


def test_every_exception_is_needed():
    met = {(room(module), room(other)) for module, other in edges()}
    assert met.issuperset(NEIGHBOURS)


def test_the_lowest_floor_imports_nothing_of_caco():
    assert not [(module, other) for module, other in edges() if FLOOR[room(module)] == 0]


def test_only_the_training_knows_the_trainer():
    assert {module for module, other in edges() if other == "caco.engine.trainer"} == {"caco.engine.training"}


def test_nothing_is_imported_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    "module", ["caco", "caco.config.composition", "caco.config.pretrained", "caco.runs.directory", "caco.launch.sweep"]
)
def test_configuration_comes_without_torch(module):
    loaded = (
        f"import sys, {module}; print([name for name in ('torch', 'torchvision', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_room_says_what_belongs_in_it_and_holds_nothing_else():
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), f"{module}: no docstring"
            of_library = "caco.library's, and imports it when it is called"
            content = [
                ast.unparse(node)
                for node in body[1:]
                if not (module == "caco" and getattr(node, "name", None) == "load" and of_library)
            ]
            allowed = {
                "caco": [
                    "from caco import installed, instructions",
                    "installed.require_the_basics()",
                    "instructions.apply()",
                    "__version__ = installed.version()",
                ],
                "analysis": ["import caco"],  # first, so that it can say which packages are missing
            }
            if not module.startswith("hydra_plugins"):  # where Hydra looks for the class
                assert content == allowed.get(module, []), module
            if module.startswith("caco."):
                assert "\nNot here: " in body[0].value.value, (
                    f"{module}: its docstring does not say what does not belong in it"
                )


def test_nobody_would_rather_not_open_a_file():
    """A file should be short enough to read in one sitting; a longer one usually has two subjects."""
    sources = [
        path
        for part in ("caco", "experiments", "analysis", "benchmarks", "tests")
        for kind in ("py", "cpp", "h")
        for path in (ROOT / part).rglob(f"*.{kind}")
    ]
    long = {
        str(path.relative_to(ROOT)): count for path in sources if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
