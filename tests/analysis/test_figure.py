"""`python -m analysis.figure`: figures show what the results say, and their data are written beside them."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import curves, figure, model, style
from analysis.results import Found, find
from caco.errors import UserError
from experiments.tables import load_scale, load_table

SMOKE = load_scale("smoke")


@pytest.fixture
def here(command):
    """main() in an empty directory: `here("7", "--scale", "smoke")` returns (exit code, output, errors)."""
    return command(figure)


@pytest.fixture
def found(result):
    rows = [("none", 40.0), ("positive", 41.0), ("negative", 42.0), ("both", 43.0)]
    return find(load_table("7"), SMOKE, [result(row, seed, knn=knn + seed) for row, knn in rows for seed in (0, 1)])


def kept(folder, name):
    """The rows of a figure's CSV, after a check that its picture is not blank."""
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(folder / f"{name}.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_figure_4_shows_the_rows_whose_positives_are_learned(found, tmp_path):
    figure.draw("4", found, tmp_path)
    figure.draw("4", found, tmp_path / "again")
    for again in (tmp_path / "again").iterdir():
        assert again.read_bytes() == (tmp_path / again.name).read_bytes(), "the same results must give the same bytes"
    data = kept(tmp_path, "smoke-table7-figure-4")
    assert {row["row"] for row in data} == {"both"}
    values = {(row["metric"], row["epochs"], row["seed"]): float(row["value"]) for row in data}
    assert values["max_probability", "2.0", "1"] == pytest.approx(0.021)
    assert values["knn20_top1", "0.0", "0"] == 30.0 and values["knn20_top1", "2.0", "1"] == 44.0


def test_a_line_is_the_mean_and_its_band_the_range_over_seeds(found):
    drawn, _ = curves.figure_4(load_table("7"), SMOKE, found, chosen=False)
    _, bottom = drawn.axes
    assert list(bottom.lines[0].get_xdata()) == [0.0, 1.0, 2.0]
    assert list(bottom.lines[0].get_ydata()) == pytest.approx([30.0, (36.5 + 37) / 2, 43.5])
    (band,) = bottom.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (30.0, 44.0)
    assert f"chance, 1 / {512:,}" in [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("letters", [4, 30, 60])
def test_the_names_of_the_banks_figure_stay_on_the_page(found, monkeypatch, letters):
    for number, one in enumerate(found):
        monkeypatch.setattr(one.experiment.row, "label", f"{number}" * letters)
    drawn, _ = curves.bank(load_table("7"), SMOKE, found, chosen=False)
    drawn.canvas.draw()
    (legend,) = drawn.legends
    names = legend.get_window_extent()
    assert len(legend.get_texts()) == len(found) and drawn.bbox.x0 <= names.x0 and names.x1 <= drawn.bbox.x1


def test_the_banks_figure_shows_the_rows_that_have_one_and_what_all_learn(found, tmp_path):
    figure.draw("bank", found, tmp_path)
    data = kept(tmp_path, "smoke-table7-figure-bank")
    rows_of = {
        metric: {row["row"] for row in data if row["metric"] == metric} for metric in {r["metric"] for r in data}
    }
    everyone, with_bank = {"none", "positive", "negative", "both"}, {"positive", "negative", "both"}
    assert rows_of == {
        "knn20_top1": everyone,
        "max_probability": everyone,
        **{metric: with_bank for metric, _ in curves.BANK.values() if metric != "purity/positives"},
    }


def test_compute_is_steps_times_what_a_step_costs(found):
    """At 3,600 images per second a step of 64 images takes 64 / 3600 s; the warm start counts as compute, too."""
    for x, step in (("hours", 64 / 3600 / 3600), ("images", 64e-6)):
        drawn, _ = curves.compute(load_table("7"), SMOKE, found, chosen=False, x=x)
        lines = {line.get_label(): line.get_xdata() for line in drawn.axes[0].lines}
        assert list(lines["None"]) == pytest.approx([0, 21 * step, 42 * step])
        assert list(lines["Positive+Negative"]) == pytest.approx([0, 29 * step, 50 * step])


def test_the_size_figure_sets_the_papers_numbers_apart_from_ours(result, tmp_path):
    """At this scale CaCo 8M of Table VI is the same run as Positive+Negative of Table VII."""
    results, rows = (
        [result("both", seed, knn=43.0 + seed) for seed in (0, 1)],
        ["adco_8m", "adco_1m", "caco_8m", "caco_12m"],
    )
    found = find(load_table("6"), SMOKE, results, rows)
    figure.draw("size", found, tmp_path)
    data = kept(tmp_path, "smoke-table6-figure-size")
    paper = {(row["method"], row["rows"]): row["value"] for row in data if row["source"] == "paper"}
    assert paper["caco", "98304"] == "72.1" and paper["adco", "8192"] == "70.2"
    ours = [(row["method"], row["rows"], row["seed"], row["value"]) for row in data if row["source"] == "ours"]
    assert ours == [("caco", "512", "0", "43.0"), ("caco", "512", "1", "44.0")]


def test_lines_differ_by_more_than_colour():
    looks = [style.look(number) for number in range(len(style.COLOURS))]
    for key in ("color", "marker"):
        assert len({look[key] for look in looks}) == len(looks)
    assert len({str(look["linestyle"]) for look in looks}) == len(looks)


def test_hours_come_from_the_runs_whose_rate_is_known(result):
    results = [result("both", seed, knn=50.0 + seed, rate=rate) for seed, rate in ((0, 0.0), (1, 3600.0))]
    drawn, data = curves.compute(load_table("7"), SMOKE, find(load_table("7"), SMOKE, results), chosen=False, x="hours")
    assert max(entry["hours"] for entry in data) == pytest.approx(50 * 64 / 3600 / 3600)
    unknown = find(load_table("7"), SMOKE, results[:1])
    with pytest.raises(UserError, match="no results with several values of knn20_top1 and a known images_per_second"):
        curves.compute(load_table("7"), SMOKE, unknown, chosen=False, x="hours")


@pytest.mark.parametrize("name", ["4", "bank", "compute", "size"])
def test_without_results_the_commands_that_make_them_are_named(table7, name):
    about = load_table(figure.OF_RESULTS[name])
    with pytest.raises(UserError, match="python -m experiments.run table[67] scale=smoke rows="):
        figure.draw(
            name,
            (
                [Found(one) for one in table7.values()]
                if name != "size"
                else find(about, SMOKE, [], ["caco_8m", "caco_12m"])
            ),
            None,
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["6"], "6: no such figure"),
        (["bnak", "--scale", "smoke"], "bnak: no such figure; did you mean bank?"),
        (["4"], "expected --scale"),
        (["3"], "expected --run DIR"),
        (["5", "--run", "nowhere"], "nowhere: expected a run's directory"),
    ],
)
def test_a_mistake_is_refused(here, arguments, words):
    code, _, errors = here(*arguments)
    assert code == 2 and words in errors


# Figures of a trained model.


def test_figure_3_shows_the_images_nearest_to_the_rows_that_the_key_finds(trained, here, tmp_path):
    """Compared with an independent dense computation in float64."""
    from omegaconf import OmegaConf

    from caco.config.composition import instantiate
    from caco.engine.assembly import build_method
    from caco.runs.checkpoint import Checkpoints

    run_dir, _ = trained
    code, _, errors = here("3", "--run", str(run_dir), "--queries", "3", "--out", str(tmp_path), "--no-mlflow")
    assert code == 0, errors
    data = kept(tmp_path, "one-figure-3")
    assert len(data) == 3 * 8

    cfg = OmegaConf.load(run_dir / "config.yaml")
    method = build_method(cfg)
    method.load_state_dict(Checkpoints(run_dir / "checkpoints").load_newest()[0]["method"])
    views, splits = instantiate(cfg.augmentation), instantiate(cfg.data)
    network = method.twin.encoder.eval().double()

    def embedded(source, indices):
        images = torch.stack([torch.as_tensor(views.plain(source.image(int(i)))) for i in indices]).double()
        with torch.no_grad():
            return torch.nn.functional.normalize(network.projector(network.backbone(images)), dim=1)

    everything = embedded(splits.train, range(len(splits.train)))
    rows = torch.nn.functional.normalize(method.bank.rows.weight.detach().double(), dim=1)
    for query in sorted({row["query"] for row in data}):
        mine = [row for row in data if row["query"] == query]
        p = torch.softmax(embedded(splits.test, [int(query)]) @ rows.T / cfg.method.temperature, 1)[0]
        (positive,) = [row for row in mine if row["kind"] == "positive"]
        assert p[int(positive["row"])] == pytest.approx(p.max().item(), rel=1e-3)
        for row in mine:
            assert float(row["probability"]) == pytest.approx(p[int(row["row"])].item(), rel=1e-3)
            cosine = everything @ rows[int(row["row"])]
            assert cosine[int(row["nearest_image"])] == pytest.approx(cosine.max().item(), abs=1e-5)
            assert row["class"] == splits.train.classes[int(splits.train.labels[int(row["nearest_image"])])]
        assert mine[0]["query_class"] == splits.test.classes[int(splits.test.labels[int(query)])]

    drawn, _ = model.figure_3(run_dir, data_root=None, queries=3, seed=0)
    said = " ".join(drawn.get_supxlabel().split())
    to_rows, to_images = embedded(splits.test, range(len(splits.test))) @ rows.T, rows @ everything.T
    picked, nearest = to_rows.argmax(1), to_images.argmax(1)
    label = splits.train.labels[nearest.numpy()]
    share = (label[picked.numpy()] == splits.test.labels).mean()
    chance = (label[None] == splits.test.labels[:, None]).mean()
    told = re.search(
        r"Of all (\d+) test images, (\d+)% have a positive of their class .*at random: (\d+)%\)\. .* choose (\d+) diff",
        said,
    )
    images, right, by_chance, shared = map(int, told.groups())
    # If two cosines differ by less than the rounding of a float32 network, either may come out as the larger one.
    unsure_B, unsure_K = ((cosine.topk(2).values.diff() > -1e-5)[:, 0] for cosine in (to_rows, to_images))
    doubtful = (unsure_B | unsure_K[picked]).sum().item()
    assert images == len(splits.test) and doubtful < images / 10
    assert abs(right - 100 * share) <= 0.5 + 100 * doubtful / images
    assert abs(by_chance - 100 * chance) <= 0.5 + 100 * unsure_K.double().mean().item()
    assert abs(shared - len(picked.unique())) <= unsure_B.sum()


def test_figure_5_places_each_image_once_and_mlflow_gets_it(trained, here, tmp_path):
    from mlflow import MlflowClient

    run_dir, uri = trained
    code, _, errors = here("5", "--run", str(run_dir), "--images", "60", "--out", str(tmp_path))
    assert code == 0 and "logged to 1 MLflow runs" in errors
    data = kept(tmp_path, "one-figure-5")
    assert len({row["image"] for row in data}) == 60
    assert {row["class"] for row in data} == {str(digit) for digit in range(10)}
    assert np.isfinite([[float(row["x"]), float(row["y"])] for row in data]).all()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    logged = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
    assert logged == {f"figures/one-figure-5.{kind}" for kind in ("png", "pdf", "csv")}


def test_a_run_on_other_images_is_refused(trained, tmp_path, here):
    from omegaconf import OmegaConf

    run_dir, _ = trained
    cfg = OmegaConf.load(run_dir / "config.yaml")
    cfg.data.seed = 1  # another split
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(run_dir / "checkpoints")
    OmegaConf.save(cfg, tmp_path / "other" / "config.yaml")
    code, _, errors = here("5", "--run", str(tmp_path / "other"))
    assert code == 2 and "expected the images that it was trained on" in errors
