"""docs/second_day.md: its files are written and its commands run, one after the other, as on the page."""

import os
import re
import subprocess
import sys

import pytest

PAGE = "docs/second_day.md"
FILE = re.compile(r"`(\w+\.py)`[^`]*:\n\n```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def typed(text):
    """Each command of the page, with the lines of its output that the page shows."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


def told_alike(line):
    """A pattern for the output that the page shows, in which speeds, rounding and paths may differ."""
    parts = re.split(r"(\.\.\.|-?\d[\d.:,]*)", line)
    return "".join(".*" if i % 2 else re.sub(r"(\\ )+", " +", re.escape(part)) for i, part in enumerate(parts))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_page_can_be_typed_from_its_first_command_to_its_last(repo_root, tmp_path):
    text = (repo_root / PAGE).read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        (tmp_path / name).write_text(content)
    commands = typed(text)
    assert {name for name, _ in FILE.findall(text)} == {"draw_scans.py", "use.py"} and len(commands) >= 8
    environment = os.environ | {
        "PYTHONPATH": str(repo_root),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    for command, shown in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        told = done.stdout + done.stderr
        for line in shown:
            if line.strip() not in ("", "...") and not line.startswith("---"):
                assert re.search(told_alike(line), told), f"{command}\nshown: {line}\ntold:\n{told}"
