"""Run a notebook from its first cell to its last, and write it with its outputs: python scripts/notebook.py FILE.ipynb
[--to FILE.ipynb]

The cells are plain Python, so no Jupyter kernel is needed, and tests can run the notebooks without Jupyter. The outputs
of a cell are what it prints, the value of its last line, and Matplotlib figures. If a cell raises, the script ends with
that error. In Jupyter the notebooks run as usual.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import caco  # noqa: F401 - before torch, because it may set torch's instruction set


def outputs_of(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell in the namespace `names`, and return its outputs in the notebook format (nbformat 4)."""
    body = ast.parse(source).body
    last = body[-1] if body else None
    if isinstance(last, ast.Expr):
        body.pop()
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)  # noqa: S102 - the notebook's own code
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None and not source.rstrip().endswith(";"):  # a final ";" hides the value, as in Jupyter
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": None,
                "metadata": {},
                "data": {"text/plain": repr(value).splitlines(keepends=True)},
            }
        )
    if "matplotlib.pyplot" in sys.modules:
        pyplot = sys.modules["matplotlib.pyplot"]
        for number in pyplot.get_fignums():
            image = io.BytesIO()
            pyplot.figure(number).savefig(image, format="png", dpi=60, bbox_inches="tight", metadata={"Software": None})
            png = base64.b64encode(image.getvalue()).decode()
            outputs.append(
                {"output_type": "display_data", "metadata": {}, "data": {"image/png": png, "text/plain": ["<Figure>"]}}
            )
        pyplot.close("all")
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="Run the cells of this notebook.")
    parser.add_argument(
        "--to",
        type=Path,
        help="The notebook with its outputs is written to this file. By default it overwrites the notebook.",
    )
    chosen = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "agg")
    notebook = json.loads(chosen.file.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        try:
            cell["outputs"], cell["execution_count"] = outputs_of("".join(cell["source"]), names), number
        except Exception:
            traceback.print_exc()
            sys.exit(f"{chosen.file}: cell {number} raised this:\n{''.join(cell['source'])}")
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number
    (chosen.to or chosen.file).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
