"""Pages of the site's Python reference: which modules each page shows. mkdocstrings makes the text from the docstrings,
without importing the modules.
"""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "reference/python"
# Page -> (its title, its modules); a folder stands for all modules in it.
PAGES: dict[str, tuple[str, list[str]]] = {
    "library": ("For programs of your own", ["caco/__init__.py", "caco/library.py", "caco/banks/own_loop.py"]),
    "banks": ("Banks", ["caco/banks"]),
    "methods": ("Methods", ["caco/methods"]),
    "evaluators": ("Evaluators", ["caco/evals", "caco/evals/dense"]),
    "data": ("Images, views, loaders", ["caco/data/sets", "caco/data/views", "caco/data/loaders"]),
    "networks": ("Networks", ["caco/nn"]),
    "training": ("The Trainer", ["caco/engine"]),
    "equations": ("The paper's equations", ["caco/equations.py", "caco/schedules.py", "caco/distributed.py"]),
    "runs": ("Runs and tracking", ["caco/runs", "caco/tracking", "caco/launch"]),
}


def modules(page: str) -> list[str]:
    """The dotted names of a page's modules; a module named `base` comes before the others of its folder."""
    found: list[Path] = []
    for name in PAGES[page][1]:
        path = ROOT / name
        found += [path] if path.is_file() else sorted(path.glob("*.py"), key=lambda file: (file.stem != "base", file))
    dotted = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in found]
    return list(dict.fromkeys(dotted))


def pages() -> dict[str, str]:
    made = {}
    for page, (title, _) in PAGES.items():
        parts = [f"# {title}", *(f"::: {module}" for module in modules(page))]
        made[f"{FOLDER}/{page}.md"] = "\n\n".join(parts) + "\n"
    return made


def nav() -> list[Any]:
    return [{title: f"{FOLDER}/{page}.md"} for page, (title, _) in PAGES.items()]


def link(target: str) -> str:
    """A link to a class or function by its dotted name; without an entry in the reference, the plain name as code."""
    module, _, name = target.rpartition(".")
    known = any(module in modules(page) for page in PAGES)
    return f"[`{target}`][{target}]" if known and not name.startswith("_") else f"`{target}`"
