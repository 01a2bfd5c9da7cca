"""The table of AdCo's project page at the smallest scale: segmentation, detection and PACS on toy sets, beside the
numbers that the page prints.
"""

import json
import sys

import pytest

from analysis import table
from caco import metrics
from caco.data.sets.domains import read
from caco.data.sets.overlap import shared_images
from caco.evals.dense.detection_sets import coco, voc
from caco.evals.dense.segmentation_sets import voc2012
from experiments import run
from experiments.tables import experiments, load_scale, load_table
from experiments.toy_sets import __main__ as command
from experiments.toy_sets import pacs as pacs_set
from experiments.toy_sets import whole


def shown(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["table", "adco_page", "--scale", "smoke", *arguments])
    table.main()
    return capsys.readouterr().out


def test_the_toy_sets_are_whole_in_the_published_layouts_and_no_test_image_is_trained_on(tmp_path, monkeypatch, capsys):
    """The sets are made by `python -m experiments.toy_sets FOLDER`."""
    root = tmp_path / "toys"
    monkeypatch.setattr(sys, "argv", ["toy_sets", str(root)])
    command.main()
    assert capsys.readouterr().out == f"VOCdevkit/, coco/ and pacs/ are in {root}\n"
    sets = [voc2012(root, "train"), voc(root), coco(root)]
    sizes = [(len(one.train), len(one.test)) for one in sets]
    assert sizes == [(12, 6), (12, 6), (11, 6)], "one of COCO's training images has only a crowd and is left out"
    assert [shared_images(one.train.files, one.test.files) for one in sets] == [[], [], []]
    pacs = read(root, key="root", say=lambda text: None)
    assert len(pacs.every) == 4 * 7 * 25 and pacs.train.sum() == 4 * 7 * 20
    with pytest.raises(SystemExit):
        command.main()
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
    whole.draw(root)  # a second call, as when a table is run again
    assert [path.name for path in tmp_path.iterdir()] == ["toys"]


def test_nothing_but_their_form_tells_the_shapes_apart(tmp_path):
    """No class has a typical colour, so the mean over the pixels does not reveal the class."""
    pacs_set.write_pacs(tmp_path, train=30, crossval=1)
    pacs = read(tmp_path, key="root", say=lambda text: None)
    photos = pacs.part(["photo"], "train")
    means = {label: [] for label in range(7)}
    for index in range(len(photos)):
        pixels = photos.image(index).resize((1, 1)).getpixel((0, 0))
        means[int(photos.labels[index])].append(sum(pixels) / 3)
    middles = [sum(values) / len(values) for values in means.values()]
    assert max(middles) - min(middles) < 50, (
        "the means of thirty images, whose values vary by about 40, must not differ by more"
    )


def test_what_smoke_calls_its_results_is_what_its_evaluators_call_them():
    page, scale = load_table("adco_page"), load_scale("smoke")
    for column, evaluator in zip(page.columns, ("segment", "detect_coco", "detect_coco", "domain_labels"), strict=True):
        (metric,) = scale.metrics[column]
        for one in experiments(page, scale):
            given = [protocol for node in one.cfg.eval.values() for protocol in metrics.protocols(node)]
            assert (metrics.protocol_of(metric) in given) == (column in one.row.columns), one.name
        assert metrics.is_percent(metric) and scale.evaluator_of(metric).split()[0] == f"eval=[{evaluator}]"


def test_the_table_shows_the_page_s_four_numbers_as_inferred_before_anything_is_run(monkeypatch, capsys, tmp_path):
    """30.21 has its own row, because it is from networks that were not trained on ImageNet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.results.RECORDS", tmp_path)
    printed = shown(monkeypatch, capsys)
    lines = {line.partition("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["AdCo"] == ["AdCo", "256", "65536", "70.0", "37.9", "34.3", "-", *["missing"] * 3, "-", "-"]
    assert lines["AdCo on PACS"][3:] == ["128", "8192", "-", "-", "-", "30.21", "-", "-", "-", "missing", "-"]
    assert "protocol inferred" in printed.splitlines()[0] and "Protocols are inferred" in printed
    assert "python -m experiments.run adco_page scale=smoke rows=adco" in printed


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_command_evaluates_it_all_on_toy_sets_and_the_table_shows_ours_beside_the_page_s(
    monkeypatch, capsys, tmp_path
):
    """This works on a machine without any data, and nothing is made twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "RECORDS", tmp_path / "records")
    monkeypatch.setattr("analysis.results.RECORDS", tmp_path / "records")
    scale = load_scale("smoke")
    for done in (0, 2):
        monkeypatch.setattr(sys, "argv", ["run", "adco_page", "scale=smoke", "rows=adco,adco_pacs", "seed=0"])
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code == 0
        assert f"2 runs, {done} done already" in capsys.readouterr().err
    runs = json.loads((tmp_path / "runs/smoke/record.json").read_text())["runs"]
    ours = {row["experiment"]["row"]: row["summary"] for row in runs}
    dense = [ours["adco"][scale.metrics[column][0]] for column in ("voc_miou", "coco_box", "coco_mask")]
    art = ours["adco_pacs"][scale.metrics["pacs_art"][0]]
    assert all(0 <= value <= 100 for value in (*dense, art))
    printed = shown(monkeypatch, capsys)
    lines = {line.partition("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["AdCo"][3:] == ["70.0", "37.9", "34.3", "-", *(f"{value:.2f}" for value in dense), "-", "1"]
    assert lines["AdCo on PACS"][5:] == ["-", "-", "-", "30.21", "-", "-", "-", f"{art:.2f}", "1"]
    assert "protocol inferred" in printed and "not measured" not in printed
