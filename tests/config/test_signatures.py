"""The arguments of a `_target_` are read from its source, without importing it, and agree with what importing shows."""

import inspect
import sys
import textwrap

import pytest

from caco.config.signatures import declared, find, load, lookup


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package("a/b.py", source)` writes a module below a new package `lib`; importing any of it fails."""
    monkeypatch.syspath_prepend(tmp_path)
    load.cache_clear()
    find.cache_clear()

    def write(path: str, source: str = "") -> None:
        file = tmp_path / "lib" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source) + "\nraise RuntimeError('imported')\n")

    write("__init__.py")
    yield write
    assert "lib" not in sys.modules
    load.cache_clear()
    find.cache_clear()


def names(target: str) -> dict[str, bool]:
    signature = find(target)
    assert signature is not None, target
    return {name: parameter.required for name, parameter in signature.parameters.items()}


def test_functions_positional_and_keyword(package):
    package("m.py", "def f(a, b=1, /, c=2, *, d, e=3): ...")
    assert names("lib.m.f") == {"a": True, "b": False, "c": False, "d": True, "e": False}
    assert not find("lib.m.f").open


def test_keywords_of_any_name_leave_it_open(package):
    package("m.py", "def f(a, **others): ...")
    assert find("lib.m.f").open


def test_classes_without_self(package):
    package("m.py", "class A:\n    def __init__(self, *, k: int = 3): ...")
    assert names("lib.m.A") == {"k": False}


def test_constructors_are_inherited_across_modules(package):
    package("base.py", "class Base:\n    def __init__(self, *, k): ...")
    package("m.py", "from lib.base import Base\nclass A(Base): ...")
    assert names("lib.m.A") == {"k": True}


def test_a_base_that_cannot_be_read_leaves_it_open(package):
    package("m.py", "import elsewhere\nclass A(elsewhere.Base): ...")
    assert find("lib.m.A").open


def test_dataclasses_and_typed_dicts(package):
    package(
        "m.py",
        """
        from dataclasses import dataclass, field
        from typing import ClassVar, NotRequired, TypedDict
        @dataclass(frozen=True)
        class D:
            kind: ClassVar[str] = "d"
            a: int
            b: list[int] = field(default_factory=list)
        @dataclass
        class E(D):
            c: int = 0
        class T(TypedDict):
            a: int
            b: NotRequired[str]
        class U(T, total=False):
            c: int
        """,
    )
    assert names("lib.m.D") == {"a": True, "b": False}
    assert names("lib.m.E") == {"a": True, "b": False, "c": False}
    assert names("lib.m.T") == {"a": True, "b": False}
    assert names("lib.m.U") == {"a": True, "b": False, "c": False}


RE_EXPORTS = ["from .sub.m import f", "from lib.sub.m import f", "from lib.sub import *", "from .sub import g as f"]


@pytest.mark.parametrize("how", RE_EXPORTS)
def test_re_exports_are_followed(package, how):
    package("sub/__init__.py", "from .m import f\nfrom .m import f as g")
    package("sub/m.py", "def f(*, k): ...")
    package("__init__.py", how)
    assert names("lib.f") == {"k": True}


def test_names_behind_conditions_are_found(package):
    package("m.py", "try:\n    import fast\nexcept ImportError:\n    fast = None\nif True:\n    def f(k): ...")
    assert names("lib.m.f") == {"k": True}


def test_circles_of_imports_end(package):
    package("a.py", "from lib.b import f")
    package("b.py", "from lib.a import f")
    assert find("lib.a.f") is None


def test_what_cannot_be_read_claims_nothing():
    assert find("math.floor") is None
    assert find("nowhere.to.be_found") is None
    assert find("plain") is None


@pytest.mark.parametrize("target", ["torch.optim.SGD", "timm.optim.Lars", "torch.nn.Linear"])
def test_libraries_are_read_as_python_would_see_them(target):
    module, _, name = target.rpartition(".")
    seen = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters
    assert list(find(target).parameters) == [item for item in seen if seen[item].kind.name != "VAR_KEYWORD"]


def test_every_target_of_conf_is_read_as_python_sees_it():
    """caco reads signatures with its own code, so the result is compared with `inspect` for every target in conf/."""
    import importlib
    import re

    from caco.config.composition import CONF

    targets = {match for path in CONF.rglob("*.yaml") for match in re.findall(r"_target_: (caco\S+)", path.read_text())}
    assert len(targets) > 10
    for target in targets:
        module, _, name = target.rpartition(".")
        try:
            actual = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        except ModuleNotFoundError as error:  # an optional package that is not installed
            pytest.skip(f"{target}: {error}")
        named = {name: item for name, item in actual.items() if item.kind.name != "VAR_KEYWORD"}
        assert names(target) == {name: item.default is item.empty for name, item in named.items()}, target


def test_lookup_finds_where_a_name_is_defined(package):
    package("m.py", "from lib.n import Kind")
    package("n.py", "Kind = int")
    module, _ = lookup(load("lib.m"), "Kind")
    assert module.name == "lib.n"
    assert lookup(load("lib.m"), "Missing") is None


def test_what_a_class_declares_of_itself_is_read_from_it_or_from_its_base(package):
    package("base.py", "class Base(Protocol):\n    package: ClassVar[str | None] = None\n    rows = columns = 3\n")
    package(
        "m.py",
        "from lib.base import Base\nclass Needs(Base):\n    package = 'wandb'\nclass Plain(Base): ...\nTwin ="
        " Needs\ndef f(): ...",
    )
    assert [declared(f"lib.m.{name}", "package") for name in ("Needs", "Plain", "Twin", "f", "Missing")] == [
        "wandb",
        None,
        "wandb",
        None,
        None,
    ]
    assert (declared("lib.m.Plain", "rows"), declared("lib.m.Plain", "columns"), declared("lib.m.Plain", "depth")) == (
        3,
        3,
        None,
    )
