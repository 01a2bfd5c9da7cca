"""Pages of the site's configuration reference, made from conf/: every group and option with the header of its file, and
every setting with its default and comment.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from caco.config.folders import CONF, groups
from scripts.site import components, docstrings
from scripts.site.text import code, comment, prose

FOLDER = "reference/configuration"
ROOTS = {
    "config.yaml": "Every training (`caco.train`)",
    "evaluate.yaml": "Every evaluation (`caco.evaluate`)",
    "embed.yaml": "A folder as features (`caco.embed`)",
    "export.yaml": "An export (`caco.export`)",
    "learned_bank.yaml": "The bank that learns",
}


class Setting(NamedTuple):
    """A setting of a YAML file: its full dotted name, its value as text of the file, and its comment."""

    name: str
    value: str
    comment: str


def pages() -> dict[str, str]:
    made = {f"{FOLDER}/index.md": _index()}
    for group, options in groups().items():
        made[f"{FOLDER}/{group}.md"] = _group(group, options)
    return made


def nav() -> list[Any]:
    return [f"{FOLDER}/index.md", *({group: f"{FOLDER}/{group}.md"} for group in groups())]


def _index() -> str:
    lines = [
        "# Configuration",
        "`group=option` chooses an option of a group, and `key=value` sets a setting. This reference is made from the"
        " files of `conf/` when the site is built, so the defaults shown are those that a run uses."
        " [What can be chosen](../../options.md) gives an overview.",
        "## Groups",
        *(
            f"- [`{group}`]({group}.md): {', '.join(f'[{option}]({group}.md#{option})' for option in options)}"
            for group, options in groups().items()
        ),
    ]
    for file, title in ROOTS.items():
        lines += [f"## {title} {{ #{file.removesuffix('.yaml')} }}", _file(CONF / file, "")]
    return "\n\n".join(lines).replace("\n\n- ", "\n- ").replace("## Groups\n- ", "## Groups\n\n- ")


def _group(group: str, options: list[str]) -> str:
    listed = "eval=[NAME,NAME]" if group == "eval" else f"{group}=NAME"
    lines = [
        f"# {group}",
        f"Chosen by `{listed}`. The options are {', '.join(f'[{option}](#{option})' for option in options)}.",
    ]
    for option in options:
        name = f"eval=[{option}]" if group == "eval" else f"{group}={option}"
        lines += [f"## {name} {{ #{option} }}", _file(CONF / group / f"{option}.yaml", group)]
    return "\n\n".join(lines)


def _file(path: Path, group: str) -> str:
    """The section of one YAML file: its header, the options that it builds on, the class that it makes, its settings.

    A setting without a comment gets the text of the class's docstring, or else the comment in conf/config.yaml.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line)
    package = next((line.partition("@package ")[2].strip() for line in header if "@package " in line), group)
    prefix = "" if package in ("_global_", "") else f"{package}."
    parts = [comment(line for line in header if "@package " not in line)]
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        content = yaml.safe_load(text)
        parts += [_begins_with(content["defaults"])] if path.parent != CONF and "defaults" in content else []
        settings = list(_settings(root, lines, prefix, text))
        made_by = {"bank": "caco.banks.learnable.LearnableBank"} if "/learned_bank@bank" in text else {}
        made_by |= {
            setting.name.rpartition(".")[0]: setting.value
            for setting in settings
            if setting.name.rpartition(".")[2] == "_target_"
        }
        for setting in settings:
            if setting.name.rpartition(".")[2] == "_target_":
                where = setting.name.removesuffix("._target_").removesuffix("_target_")
                parts.append(f"{f'`{where}` is' if where else 'This is'} made by {components.link(setting.value)}.")
        rows = [setting for setting in settings if setting.name.rpartition(".")[2] != "_target_"]
        if rows:
            table = ["| setting | default | meaning |", "|---|---|---|"]
            of_views: dict[str, str] = {}  # comments of the first kind of view, which the other kinds do not repeat
            for name, value, about in rows:
                where, _, key = name.rpartition(".")
                about = about or docstrings.arguments(made_by.get(where, "")).get(key, "") or _of_root().get(name, "")
                if where.rpartition(".")[0] == "augmentation.views":
                    about = about or of_views.get(key, "")
                    of_views.setdefault(key, about)
                table.append(f"| {code(name)} | {code(value)} | {prose(about)} |")
            parts.append("\n".join(table))
    return "\n\n".join(part for part in parts if part)


@functools.cache
def _of_root() -> dict[str, str]:
    """{setting: comment} of conf/config.yaml, for other files that set the same settings without a comment."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return {setting.name: setting.comment for setting in _settings(root, text.splitlines(), "", text)}


def _begins_with(defaults: list[Any]) -> str:
    """A sentence that names the options of other groups in the defaults list of an option, or ""."""
    words = []
    for entry in defaults:
        if isinstance(entry, dict):
            for key, value in entry.items():
                group = key.removeprefix("override ").removeprefix("/")
                chosen = f"[{','.join(value)}]" if isinstance(value, list) else value
                words.append(f"`{group}={'null' if chosen is None else chosen}`")
        elif entry == "/learned_bank@bank":
            words.append("[the bank that learns](index.md#learned_bank)")
        elif entry != "_self_":
            words.append(f"`{entry}`")
    return f"This option builds on {', '.join(words)}." if words else ""


def _settings(node: yaml.MappingNode, lines: list[str], prefix: str, text: str) -> Iterator[Setting]:
    own = {key.value for key, _ in node.value}
    merged = [
        pair for key, value in node.value if key.value == "<<" for pair in value.value if pair[0].value not in own
    ]
    for key, value in [*merged, *(pair for pair in node.value if pair[0].value != "<<")]:
        name = f"{prefix}{key.value}"
        if name in ("defaults", "hydra"):
            continue
        is_block = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        about = _comment_of(key, lines)
        if is_block:
            if about:
                yield Setting(name, "...", about)
            yield from _settings(value, lines, f"{name}.", text)
        else:
            shown = text[value.start_mark.index : value.end_mark.index]
            yield Setting(name, re.sub(r"\s+", " ", re.sub(r"(?m)\s#.*$", "", shown)).strip() or "null", about)


def _comment_of(key: yaml.ScalarNode, lines: list[str]) -> str:
    """The comment of a setting: on its line, above it in the same column, and below it further right."""
    at, column = key.start_mark.line, key.start_mark.column
    found = re.search(r"(?:^|\s)#\s?(.*)$", _without_strings(lines[at]))
    words = [lines[at][found.start(1) :]] if found else []
    for line in lines[at + 1 :]:
        if not line.lstrip().startswith("#") or len(line) - len(line.lstrip()) <= column:
            break
        words.append(line.strip().lstrip("# "))
    above = []
    for line in reversed(lines[:at]):
        if not line.startswith(" " * column + "#") or (column == 0 and _is_header(lines, line)):
            break
        above.append(line.strip().lstrip("# "))
    return " ".join([*reversed(above), *words])


def _is_header(lines: list[str], line: str) -> bool:
    first = next((number for number, one in enumerate(lines) if not one.startswith("#")), len(lines))
    return line in lines[:first]


def _without_strings(line: str) -> str:
    """The line with quoted strings blanked out, so that a # in them is not taken for a comment."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", lambda match: " " * len(match[0]), line.partition(" #")[0]) + (
        " #" + line.partition(" #")[2] if " #" in line else ""
    )
