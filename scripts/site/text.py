"""Turn comments of YAML files into the text of a page."""

import html
import re
from collections.abc import Iterable

SETTING = re.compile(r"(?<![\w.=/&;])((?:[a-z_][\w.]*)=(?:\[[^\]\s]*\]|\{[^}]*\}|[^\s,;:)\[]*[^\s,;:).\[?](?:,\w+)*))")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
SPECIAL = {"*": "&#42;", "_": "&#95;", "|": "&#124;", "[": "&#91;", "]": "&#93;", "\\": "&#92;", "~": "&#126;"}


def code(text: str) -> str:
    """Text as inline code that also works in the cell of a Markdown table."""
    return f"<code>{_plain(text)}</code>"


def prose(text: str) -> str:
    """Plain text as HTML. Only `code` is taken as markup; settings (key=value) become code, and arXiv numbers become
    links.
    """
    parts = re.split(r"`([^`]+)`", text)
    for number, part in enumerate(parts):
        if number % 2:
            parts[number] = code(part)
        else:
            pieces = SETTING.split(part)
            parts[number] = "".join(
                code(piece) if index % 2 else ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', _plain(piece))
                for index, piece in enumerate(pieces)
            )
    return "".join(parts)


def _plain(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in html.escape(text, quote=False))


def comment(lines: Iterable[str]) -> str:
    """A comment of several lines, each with its `#`, as paragraphs and blocks of code.

    Indented lines and commands (python -m ...) become code.
    """
    blocks: list[tuple[bool, list[str]]] = []

    def add(is_code: bool, line: str) -> None:
        if not blocks or blocks[-1][0] != is_code:
            blocks.append((is_code, []))
        blocks[-1][1].append(line)

    for line in lines:
        text = line.strip().removeprefix("#")
        if not text.strip():
            blocks.append((False, []))
        elif text.startswith("   ") or text.strip().startswith("python -m"):
            add(True, text.strip())
        elif found := re.match(r"(.*?)\s{3,}(python -m .*)$", text):
            add(False, found[1].strip())
            add(True, found[2])
        else:
            add(False, text.strip())
    shown = []
    for is_code, block in blocks:
        if block:
            shown.append(
                "```bash\n" + "\n".join(block) + "\n```" if is_code else "<p>" + prose(" ".join(block)) + "</p>"
            )
    return "\n\n".join(shown)
