"""Commands and overrides that the file headers in conf/method print compose, and pass every check that needs no
data.
"""

import re
from pathlib import Path

import pytest

from caco.checking import check_command
from caco.config.composition import CONF

COMMAND = re.compile(r"python -m caco\.train((?: \S+=\S+)+)")
OVERRIDE = r"[a-z_]+(?:\.[a-z_]+)*=(?:\[[^\]\s]*\]|[^\s,;)\[]*[^\s,;:).\[])"
OVERRIDES = re.compile(rf"(?<![^ (]){OVERRIDE}(?: {OVERRIDE})*")


def header(file: Path) -> str:
    """The header comment of a file without line breaks; a mark precedes each command."""
    lines = [
        line.removeprefix("#")
        for line in file.read_text().splitlines()
        if line.startswith("#") and "@package" not in line
    ]
    return "".join(line if line.startswith(" ") and not line.startswith("   ") else f" | {line} | " for line in lines)


def printed(file: Path) -> list[str]:
    """The command lines of a header; in them, `...` stands for the whole command before."""
    found, whole = [], ""
    for piece in re.split(r"\||\s{3,}", header(file)):
        if match := COMMAND.search(piece):
            found.append(whole := match[1].strip())
        elif piece.strip().startswith("..."):
            found.append(whole + piece.strip().removeprefix("..."))
    return found


COMMANDS = [(file.stem, command) for file in sorted((CONF / "method").glob("*.yaml")) for command in printed(file)]
IN_SENTENCES = [
    (file.stem, match if match.startswith("method=") else f"method={file.stem} {match}")
    for file in sorted((CONF / "method").glob("*.yaml"))
    for match in OVERRIDES.findall(re.sub(r"\|.*?\|", "", header(file)))
]


def test_the_headers_are_read():
    assert len(COMMANDS) >= 18 and len(IN_SENTENCES) >= 12
    of_1000_epochs = "epochs=1000 optimizer.lr=0.3 optimizer.weight_decay=1.5e-6 method.momentum=0.996"
    assert ("mocov3", f"method=mocov3 batch=4096 epochs=100 {of_1000_epochs}") in COMMANDS
    assert any(command.startswith("method=dino batch=512 epochs=100 optimizer=sgd") for _, command in IN_SENTENCES)


@pytest.mark.parametrize(("method", "command"), COMMANDS)
def test_its_commands_compose(method, command):
    assert f"method={method}" in command.split()
    check_command(command.split(), multirun=False)


@pytest.mark.long
@pytest.mark.parametrize(("method", "command"), IN_SENTENCES)
def test_the_overrides_of_its_sentences_compose(method, command):
    check_command(command.split(), multirun=False)
