"""The notebooks run from the first cell to the last, and are committed with their printed and drawn outputs."""

import json
import os
import subprocess
import sys

import pytest

NOTEBOOKS = ["own_loop", "train_look_evaluate_compare"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_is_committed_with_its_outputs_in_order_and_without_an_error(repo_root, name):
    notebook = json.loads((repo_root / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert (
        kinds <= {"stream", "execute_result", "display_data"}
        and sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 3
    )
    assert str(repo_root) not in json.dumps(notebook)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_runs_as_it_stands(repo_root, tmp_path, name):
    command = [
        sys.executable,
        repo_root / "scripts" / "notebook.py",
        repo_root / "docs" / "notebooks" / f"{name}.ipynb",
        "--to",
        tmp_path / "made.ipynb",
    ]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept, made = (
        [
            [output["output_type"] for output in cell.get("outputs", [])]
            for cell in json.loads(path.read_text())["cells"]
        ]
        for path in (repo_root / "docs" / "notebooks" / f"{name}.ipynb", tmp_path / "made.ipynb")
    )
    assert made == kept
