"""The C++ sources of the compiled parts: each header compiles alone, and one binary works on every processor."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from caco import instructions

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"bank": ROOT / "caco" / "banks" / "kernels", "views": ROOT / "caco" / "data" / "views"}
PARTS = {"bank": instructions.BANK, "views": instructions.VIEWS}
HEADERS = [f"{part}/{path.name}" for part, folder in FOLDERS.items() for path in sorted(folder.glob("*.h"))]


def included(path: Path, form: str = '"([^"]+)"') -> list[str]:
    return re.findall(rf"^ *# *include {form}", path.read_text(), re.MULTILINE)


def all_included(path: Path) -> set[str]:
    """The headers of the folder that a file includes, directly or through other headers."""
    direct = set(included(path))
    return direct.union(*(all_included(path.parent / name) for name in direct))


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    names = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"]
    for command in (shlex.split(name) for name in names if name):
        if shutil.which(command[0]):
            return command
    pytest.skip("needs a C++ compiler, and there is none")


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_compiles_alone(compiler, header):
    part, name = header.split("/")
    command = [*compiler, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-I", str(FOLDERS[part]), "-x", "c++", "-"]
    done = subprocess.run(command, input=f'#include "{name}"\n', capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{header} uses something that it does not include:\n{done.stderr[:400]}"


@pytest.mark.parametrize("part", PARTS)
def test_headers_include_each_other_in_no_circle_and_each_is_used(part):
    folder = FOLDERS[part]
    sources, headers = ({path.name for path in folder.glob(kind)} for kind in ("*.cpp", "*.h"))
    TopologicalSorter(
        {name: included(folder / name) for name in sources | headers}
    ).prepare()  # raises CycleError with the circle
    assert set().union(*(all_included(folder / name) for name in sources)) == headers


def test_behind_a_pragma_for_one_processor_nothing_is_included_but_our_own():
    """A function that the standard library defines behind such a pragma could become the copy that every processor
    runs.
    """
    folder = FOLDERS["views"]
    behind = {"steps.h"} | all_included(folder / "steps.h") - all_included(folder / "views.h") - {"views.h"}
    assert {"vectors.h", "resize.h", "blur.h"} <= behind
    assert {name: found for name in behind if (found := included(folder / name, "<([^>]+)>"))} == {}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_linker_may_share_runs_on_every_processor(part):
    """If several files define the same function, such as the growth of a std::vector, the linker keeps any one of the
    copies, so none may need AVX.
    """
    found = importlib.util.find_spec(PARTS[part])
    if (
        found is None
        or platform.machine() not in ("x86_64", "AMD64")
        or not (shutil.which("nm") and shutil.which("objdump"))
    ):
        pytest.skip("needs the compiled part for x86-64, nm and objdump")

    def read(*command: str) -> str:
        return subprocess.run([*command, found.origin], capture_output=True, text=True, check=True).stdout

    symbols = [line.split(" ", 2) for line in read("nm", "--defined-only").splitlines()]
    shared = {name for _, kind, name in symbols if kind in "WVu"}
    code = read("objdump", "-d", "--no-show-raw-insn")
    functions = dict(re.findall(r"^[0-9a-f]+ <(\S+)>:\n((?:.+\n)+)", code, re.MULTILINE))
    assert shared & functions.keys() and any("%ymm" in body for body in functions.values()), (
        "the compiled part must have been read and must contain AVX code"
    )
    assert [name for name in shared & functions.keys() if re.search(r"%[yz]mm|\tv[a-z]+ ", functions[name])] == []
