"""The contracts between components: mypy checks every class against its Protocol and every caller against what the
Protocol declares; and no code asks for the class of a component.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from caco.banks.base import Bank
from caco.config.composition import CONF, target
from caco.data.loaders.bound import Loader
from caco.data.sets.beton import BetonImages
from caco.data.sets.sources import Source
from caco.errors import UserError, require_contract
from caco.evals.base import Evaluator
from caco.methods.base import Method
from caco.methods.sources import Negatives, Positives
from caco.methods.treatments import Treatment
from caco.tracking.base import Tracker

CONTRACTS = (Bank, Evaluator, Loader, Method, Negatives, Positives, Source, Tracker, Treatment)
# The name of a result in records follows from the class of caco's evaluator; a user's own evaluator names its results.
NAMES_OF_RECORDS = ("caco/metrics.py", "caco/runs/renamed.py")
IN_CONF = {
    "bank": Bank,
    "eval": Evaluator,
    "loader": Loader,
    "method": Method,
    "negatives": Treatment,
    "tracking": Tracker,
}


def test_mypy_finds_nothing(repo_root, pytestconfig):
    """The settings are in pyproject.toml. The first run takes a quarter of a minute on one core; later ones check only
    what has changed.
    """
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install mypy, or caco's extra `test`, has the types checked here")
    cache = pytestconfig.cache.mkdir("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(cache)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def offered(group: str) -> set[type]:
    """The classes that conf/ configures under `bank`, `eval`, `loader`, `method`, `negatives` and `tracking`."""
    contents = [(file, yaml.safe_load(file.read_text())) for file in CONF.rglob("*.yaml")]
    nodes = [content.get(group, content if file.parent.name == group else None) for file, content in contents]
    nodes += [content for file, content in contents if group == "bank" and file.stem == "learned_bank"]
    return {target(node) for node in nodes if isinstance(node, dict) and "_target_" in node}


@pytest.mark.parametrize("group", IN_CONF)
def test_what_conf_offers_declares_its_contract(group):
    """Each class names its contract as a base class, so that mypy compares the two."""
    assert offered(group) and [one for one in offered(group) if IN_CONF[group] not in one.__mro__] == []


def test_a_part_that_lacks_a_member_is_refused_before_anything_is_computed():
    class Half:
        when = "end"

        def run(self, backbone):
            yield "half", 0.5

    with pytest.raises(
        UserError,
        match=(
            "^eval.half: Half has no attach, bounded, build, departures, image_sets, inputs, needs_labels,"
            " needs_method, on_all_ranks, require, work; derive it from caco.evals.base.Evaluator, "
        ),
    ):
        require_contract("eval.half", Half(), Evaluator)
    whole = type("Whole", (Half, Evaluator), {"build": lambda self, store, *, seed: None})()
    require_contract("eval.whole", whole, Evaluator)
    assert (whole.on_all_ranks, whole.inputs(), whole.departures, whole.work(lambda: None)) == (False, [], (), [])


def kinds_asked(path: Path, names: set[str]) -> list[str]:
    """The places in a file that ask whether a value is of one of these classes, or that contain the name of one, as to
    compare it with a configuration.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        asked: set[str] = set()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = words(*node.args[1:])
        elif isinstance(node, ast.Compare) and "type" in words(node):
            asked = words(node)
        elif isinstance(node, ast.Attribute) and node.attr == "__name__":
            asked = words(node.value)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]*\.\w+", str(node.value)):
            asked = {str(node.value).rpartition(".")[2]}
        found += [(node.lineno, name) for name in asked & names] if isinstance(node, ast.expr) else []
    return [f"{path.name}:{line}: {name}" for line, name in sorted(found)]


def words(*nodes: ast.expr) -> set[str]:
    """Names and attributes, except those of torch.nn, where Linear is a layer."""
    found = [one for node in nodes for one in ast.walk(node) if getattr(getattr(one, "value", None), "id", "") != "nn"]
    return {getattr(one, "id", getattr(one, "attr", "")) for one in found}


def test_nobody_asks_what_kind_of_part_something_is(repo_root):
    """The contract says what a component needs, costs and can do, so a user's own component works as well as caco's."""
    for group in IN_CONF:
        offered(group)  # imports the classes that conf/ names
    names = {one.__name__ for contract in CONTRACTS for one in family(contract) if one.__module__.startswith("caco.")}
    assert {
        "LearnableBank",
        BetonImages.__name__,
        "BankRow",
        "KNN",
        "MLflowTracker",
        "Contrastive",
        "AutoLoader",
    } <= names
    parts = ("caco", "experiments", "analysis", "benchmarks", "hydra_plugins")
    files = [
        file
        for part in parts
        for file in (repo_root / part).rglob("*.py")
        if file.relative_to(repo_root).as_posix() not in NAMES_OF_RECORDS
    ]
    assert [line for file in files for line in kinds_asked(file, names)] == []


def family(contract: type[Any]) -> set[type[Any]]:
    return {contract} | {one for child in contract.__subclasses__() for one in family(child)}


def test_asking_is_found(tmp_path):
    file = tmp_path / "asks.py"
    lines = [
        "isinstance(a, (int, sets.Files))",
        "type(b) is Files",
        "c.endswith('.Files')",
        "Files.__name__",
        "Files(d)",
        "isinstance(e, int)",
    ]
    file.write_text("\n".join(lines))
    assert kinds_asked(file, {"Files"}) == [f"asks.py:{number}: Files" for number in (1, 2, 3, 4)]
