"""The documentation site, built as by `make docs`: without warnings or broken links, and with every option and
method.
"""

import html
import json
import os
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = sorted((ROOT / "conf").glob("*/*.yaml"))


class Page(HTMLParser):
    """The targets of a page's links, and the anchors in the page."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            if name == "id" or (name == "name" and tag == "a"):
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the packages of the documentation are not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stderr
    return folder


def text(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def names(settings, prefix: str) -> list[str]:
    """The full dotted name of every setting in a YAML file."""
    found = []
    for key, value in settings.items():
        if key in ("defaults", "hydra", "_target_"):
            continue
        nested = isinstance(value, dict) and value
        found += names(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return found


def test_the_pictures_of_the_site_are_those_that_the_script_takes_and_are_small():
    script = (ROOT / "scripts" / "site" / "pictures.sh").read_text()
    pages = re.search(r"pages=\(\n(.*?)\n\)", script, re.DOTALL)[1].split()
    pictures = {f"{page.replace('/', '_')}.png" for page in pages}
    assert len(pictures) == 10 and pictures == {path.name for path in (ROOT / "docs" / "site").iterdir()}
    shown = re.findall(r"\]\(site/(\w+\.png)\)", (ROOT / "docs" / "looks.md").read_text())
    assert sorted(shown) == sorted(pictures)
    assert sum((ROOT / "docs" / "site" / name).stat().st_size for name in pictures) < 2_000_000


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_option_stands_there_with_all_its_settings(site):
    assert len(OPTIONS) > 150
    for file in OPTIONS:
        group, source = file.parent.name, file.read_text(encoding="utf-8")
        page = html.unescape(text(site, f"reference/configuration/{group}.html"))
        (section,) = re.findall(rf'<h2 id="{file.stem}">.*?(?=<h2 id=|</article>)', page, re.DOTALL)
        package = re.search(r"@package (\S+)", source)
        prefix = {None: f"{group}.", "_global_": ""}.get(package and package[1], f"{package and package[1]}.")
        flow = set(re.findall(r"^( *\w+): \{", source, re.MULTILINE))
        for name in names(yaml.safe_load(source) or {}, prefix):
            whole = f"<code>{name}</code>" in section
            assert whole or any(part.strip() in name.split(".") for part in flow), (file.name, name)
    settings = html.unescape(text(site, "reference/configuration/index.html"))
    assert "split each process's batch into this many passes, to save memory" in settings


@pytest.mark.long
def test_every_method_stands_there_with_what_was_published_and_what_was_measured(site):
    page = text(site, "reference/methods.html")
    assert {file.stem for file in OPTIONS if file.parent.name == "method"} <= Page(
        site / "reference/methods.html"
    ).places
    caco = page.partition('<h2 id="caco">')[2].partition("<h2 ")[0]
    assert "Top-1 71.3" in caco, "the number of Table VII must be on the page"
    recorded = json.loads((ROOT / "experiments" / "records" / "mini.json").read_text())["runs"]
    measured = [run["summary"] for run in recorded if run["name"].startswith("table7-both")]
    knn, probe = (statistics.mean(one[name] for one in measured) for name in ("knn20_top1", "probe_top1"))
    numbers = rf"k-NN \(20\) {knn:.2f} ± [\d.]+, probe {probe:.2f}"
    row = rf"<td>mini</td>\s*<td>CaCo, table I</td>\s*<td>{len(measured)}</td>\s*<td>{numbers}"
    assert len(measured) >= 3 and re.search(row, caco)
    assert "not been measured with caco yet" in page.partition('<h2 id="dino_vit">')[2].partition("<h2 ")[0]


@pytest.mark.long
def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    start = {urldefrag(link)[0] for link in pages[site / "index.html"].links}
    assert {f"{file.stem}.html" for file in (ROOT / "docs").glob("*.md")} <= start
    astray = []
    for file, page in pages.items():
        for link in page.links:
            path, place = urldefrag(link)
            if "://" in link or link.startswith(("data:", "mailto:")):
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            if not target.exists() or (place and target in pages and unquote(place) not in pages[target].places):
                astray.append(f"{file.relative_to(site)}: {link}")
    assert astray == []


@pytest.mark.long
def test_the_python_parts_stand_there_with_their_docstrings(site):
    library, banks = text(site, "reference/python/library.html"), text(site, "reference/python/banks.html")
    assert 'id="caco.load"' in library and 'id="caco.library.evaluate"' in library
    assert 'id="caco.banks.learnable.LearnableBank"' in banks
    assert 'id="caco.methods.base.Method.after_step"' in text(site, "reference/python/methods.html")
