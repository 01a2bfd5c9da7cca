"""Find every command that the project prints: in its pages, in the comments of its YAML files, and in the docstrings,
messages and help texts of its Python files.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/records/**/*.md", "benchmarks/*.md"]
HEADERS = ["conf/**/*.yaml", "experiments/**/*.yaml"]
SOURCES = [f"{folder}/**/*.py" for folder in ("caco", "experiments", "analysis", "benchmarks", "scripts")]
HOLE = "\N{WHITE SQUARE}"  # stands for a value that an f-string inserts

_PROGRAM = (
    r"(?:torchrun (?:--\S+ )*-m (?P<ranks>caco\.\w+)"
    r"|python -m (?P<module>(?:caco|experiments|analysis|benchmarks|tests|pytest|mypy|ruff)(?:\.\w+)*)"
    r"|python (?P<file>(?:benchmarks|scripts|tests)/\S+\.py)"
    r"|(?<![-\w./])(?P<script>caco-(?:train|evaluate|export|embed|results|plan|doctor|write)|(?:make|ruff)(?= ))"
    r"|(?<=[`$] )(?P<first>pip install)|(?<=`)(?P<quoted>pip install))"
)
START = re.compile(r"(?P<set>(?:\b[A-Z_]+=\w+ )*)" + _PROGRAM)
# In running text, a command ends before the first word that cannot be a part of a command.
_WORD = re.compile(r"""(?:[+~]?[\w./@-]+=\S+|--?[a-z]\S*|~\S+|'[^']*'|"[^"]*"|[\w.-]*/\S*|[A-Z][A-Z_]+|\d+)$""")
_FIRST = {"experiments.run", "experiments.compare", "make", "ruff"}
# English words that follow a program's name in sentences.
_ENGLISH = re.compile(r"make (?!demo\b|test\b|test-long\b|setup\b|lint\b|docs\b|dashboard\b|clean\b|[a-z]+-[a-z]+\b)")


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        where: its file and line.
        words: the words after the program's name.
        whole: whether nothing of the line was left out.
    """

    where: str
    program: str
    words: tuple[str, ...]

    @property
    def has_holes(self) -> bool:
        return any(HOLE in word for word in self.words)

    def __str__(self) -> str:
        return f"{self.where}: {self.program} {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every command of the project, once for each place where it is printed."""
    found = []
    for patterns, parts in ((PAGES, _of_page), (HEADERS, _of_yaml), (SOURCES, _of_python)):
        for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
            if path.relative_to(ROOT).as_posix() == "experiments/records/demo/README.md":
                continue  # written by a program whose text is searched
            for line, text, is_code in parts(path.read_text(encoding="utf-8")):
                where = f"{path.relative_to(ROOT).as_posix()}:{line}"
                found += [Command(where, program, words) for program, words in _in(text, is_code)]
    return found


def _of_page(text: str) -> Iterator[tuple[int, str, bool]]:
    """The commands of a Markdown page, from code blocks and from inline code, which may extend over two lines."""
    fenced = False
    prose: list[str] = []
    number = 1
    for line in re.sub(r"\s*\\\n\s*", "\r", text).split("\n"):
        number, line = len(prose) + 1, line.replace("\r", " ") + "\r" * line.count("\r")
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield number, line.lstrip("$ ").partition("  #")[0], True
            prose.append("")
            continue
        prose.append("" if line.lstrip().startswith("```") else line)
    for paragraph in re.finditer(r"(?:[^\n]+\n?)+", "\n".join(prose)):
        number = "\n".join(prose)[: paragraph.start()].count("\n") + 1
        for span in re.finditer(r"`([^`]+)`", paragraph[0].replace("\n", " ")):
            yield number, span[1], True


def _of_yaml(text: str) -> Iterator[tuple[int, str, bool]]:
    """The commands in the comments of a YAML file. A command at the start of a comment line may continue on lines that
    are indented more.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        _, mark, comment = line.partition("#")
        if not mark:
            continue
        for part in re.split(r"\s{3,}", comment.strip()):
            yield number, part.strip(), bool(re.match(r"python |torchrun |make ", part.strip()))


def _of_python(text: str) -> Iterator[tuple[int, str, bool]]:
    """The commands in the string literals of a Python file, docstrings included; HOLE stands for a value in an
    f-string.
    """
    tree = ast.parse(text)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            value = "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            value = node.value
        else:
            continue
        spans = re.findall(r"`([^`]+)`", value.replace("\n", " "))
        yield from ((node.lineno, span, True) for span in spans if START.search(span))
        for number, line in enumerate(re.sub(r"`[^`]+`", "", value).splitlines()):
            is_code = bool(re.match(r"\s{2,}(python|torchrun|make) ", line))
            for part in re.split(r"\s{3,}", line.strip()) if is_code else [line]:
                yield node.lineno + number, part, bool(re.match(r"(python|torchrun|make) ", part.strip()) and is_code)


def _in(text: str, is_code: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in re.split(r" && |; ", text) if is_code else [text]:
        match = START.search(part)
        if match is None or (match["script"] == "make" and _ENGLISH.match(part, match.start("script"))):
            continue
        program = next(match[name] for name in ("ranks", "module", "file", "script", "first", "quoted") if match[name])
        yield program, tuple(_words(program, part[match.end() :], is_code))


def _words(program: str, rest: str, is_code: bool) -> list[str]:
    if rest[:1] not in ("", " "):
        return []
    if is_code:
        try:
            words = shlex.split(re.split(r"\s{2,}| > | \| ", rest.strip())[0])
        except ValueError:
            words = rest.split()
        return words
    taken: list[str] = []
    for word in rest.split():
        bare = word.rstrip(".,:;)") or word
        if not (_WORD.fullmatch(bare) or HOLE in bare or bare == "..." or (program in _FIRST and not taken)):
            break
        taken.append(bare)
        if bare != word:
            break
    return taken
