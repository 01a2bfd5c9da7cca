"""`python -m analysis.report`: one self-contained page."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from analysis import report


class Page(HTMLParser):
    """The page's cell texts, addresses that a browser would fetch, unclosed tags, identifiers and links."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.fetched, self.open, self.ids, self.links = [], [], [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if "id" in given else set()
        self.fetched += [given["src"]] if "src" in given else []
        self.links |= {given["href"]} if "href" in given else set()
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture
def here(monkeypatch, tmp_path, capsys):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        try:
            report.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return main


def whole(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert page.links <= {f"#{id}" for id in page.ids}, "every link must lead to a place in the page"
    return page


def test_a_scales_page_holds_tables_figures_records_and_configurations(here, result, record_of, tmp_path):
    runs = [result(row, seed, knn=40.0 + seed) for row in ("none", "both") for seed in (0, 1)]
    hostile = "<script>alert(1)</script>"
    runs[0] = result("none", 0, knn=40.0, command=hostile)
    (tmp_path / "record.json").write_text(json.dumps(record_of(runs)))
    code, errors = here("--scale", "smoke", "--records", "record.json", "--tables", "7,rivals", "--out", "page.html")
    assert code == 0, errors
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = whole(tmp_path / "page.html")
    assert hostile not in text and "&lt;script&gt;" in text
    assert {"40.50 ± 0.71", "missing", "71.3"} <= set(page.cells)
    assert len(page.fetched) == 3  # figure 4, bank, compute
    assert {run.hash for run in runs} <= set(page.cells) and "bank.size" in page.cells
    assert {"table7", "rivals", "figures", "records", "configurations"} <= page.ids
    assert "Barlow Twins" in page.cells and "Table R" in text, (
        "table rivals must be shown, because its CaCo is a row of Table VII"
    )


def test_a_sweeps_page_holds_each_finished_run_and_the_figures_of_one(here, trained, tmp_path, monkeypatch):
    from PIL import Image

    run_dir, _ = trained

    def of_a_run(arguments):  # other tests check these figures
        assert arguments.run == run_dir
        Image.new("RGB", (4, 4)).save(arguments.out / f"{arguments.figure}.png")
        return [arguments.out / f"{arguments.figure}.png"], []

    monkeypatch.setattr(report, "of_a_run", of_a_run)
    code, errors = here("--sweep", str(run_dir.parent), "--run", str(run_dir), "--out", "page.html")
    assert code == 0, errors
    page = whole(tmp_path / "page.html")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"{summary['knn20_20pct_top1']:.2f}" in page.cells and "one" in page.cells
    assert len(page.fetched) == 2  # figures 3 and 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--scale", "smok"], "smok: no such scale; did you mean smoke?"),
        (
            ["--scale", "imagenet100"],
            "no results for its tables among 0 runs; this command makes some: python -m experiments.run table7"
            " scale=imagenet100",
        ),
        (["--sweep", "nowhere"], "nowhere: expected a sweep's folder"),
    ],
)
def test_a_page_of_nothing_is_refused(here, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr("analysis.results.RECORDS", tmp_path)
    code, errors = here(*arguments)
    assert code == 2 and re.search(re.escape(words), errors)
    assert list(tmp_path.iterdir()) == []
