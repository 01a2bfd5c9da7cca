"""Hooks that mkdocs calls while it builds the site. They add pages from outside docs/ and adapt links.

Pages are written so that their links work on a code host, relative to each file. In the site, a link to a file that is
also a page of the site leads to that page. A link to any other file of the repository leads to the repository's address
(`repo_url` in mkdocs.yml), or becomes plain text if there is no address.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

from scripts.site import components, configuration, methods

ROOT = Path(__file__).resolve().parents[2]
# Files outside docs/ that become pages -> the path of the page in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/records/README.md": "records/real_runs.md",
    "experiments/records/demo/README.md": "records/demo.md",
    "experiments/records/evaluation.md": "records/evaluation.md",
    **{f"benchmarks/{path.name}": f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.md"))},
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add all pages that are not files of docs/."""
    made = {"site.css": (ROOT / "scripts/site/site.css").read_text(encoding="utf-8")}
    made |= {page: (ROOT / file).read_text(encoding="utf-8") for file, page in ELSEWHERE.items() if _is_there(file)}
    for pages in (configuration.pages(), components.pages(), methods.pages()):
        made |= pages
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_config(config: Any) -> Any:
    """Add the reference's pages to the navigation; which pages there are depends on conf/ and caco/."""
    if _is_there("CONTRIBUTING.md"):
        config.nav.append({"Contribute": "contributing.md"})
    config.nav.insert(
        3,
        {"Reference": [{"Configuration": configuration.nav()}, {"Python": components.nav()}]},
    )
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Adapt the links of a page to the site; code blocks are left as they are."""
    source = next((file for file, name in ELSEWHERE.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("reference/"):
        return markdown
    parts = CODE.split(markdown)
    for number in range(0, len(parts), 2):
        parts[number] = LINK.sub(lambda match: _link(match, source, page.file.src_uri, config), parts[number])
    return "".join(parts)


def _link(match: re.Match[str], source: str, page: str, config: Any) -> str:
    mark, words, target = match.groups()
    path, sign, anchor = target.partition("#")
    if not path or "://" in path:
        return match[0]
    file = _normal(str(PurePosixPath(source).parent / path))
    in_site = ELSEWHERE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    if in_site is not None and not in_site.endswith((".ipynb", ".csv")):
        return f"{mark}[{words}]({_relative(in_site, page)}{sign}{anchor})"
    if not (ROOT / file).exists():
        return match[0]  # mkdocs then reports it as a broken link
    return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{file})" if config.repo_url else words


def _is_there(file: str) -> bool:
    return (ROOT / file).is_file()


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _relative(target: str, page: str) -> str:
    """The relative link from one page to another in the form that mkdocs expects."""
    return "../" * page.count("/") + target
