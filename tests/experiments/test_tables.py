"""The YAML files of the paper's tables, and the commands that the scales make from them."""

import csv
from collections import Counter

import pytest
import yaml

from caco.config import refusals
from caco.errors import UserError
from caco.runs.identity import identity, plain
from experiments import tables
from experiments.tables import HERE, experiments, load_scale, load_table

NUMERALS = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7}


def experiment(table, row, scale):
    return next(experiments(load_table(table), load_scale(scale), rows=[row]))


def published_facts():
    """(table, start of the method's name, column, value) from published.csv, for the paper's seven tables."""
    with open(HERE / "published.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] in NUMERALS]
    column = {"V": "dataset"}
    return Counter(
        (row["table"], row["method"], row[column.get(row["table"], "metric")], float(row["value"])) for row in rows
    )


def test_every_published_number_of_the_seven_tables_is_in_its_yaml_and_no_other_is():
    ours = Counter()
    for name in tables.tables():
        table = load_table(name)
        if name == "adco_page":
            continue
        if table.table not in NUMERALS:
            assert not any(row.published for row in table.rows.values()), (
                "only the paper's own tables may have the paper's numbers"
            )
        for row in table.rows.values():
            # In Table VI the label has the size of the bank; published.csv has it in a separate column.
            method = row.label.rsplit(" ", 1)[0] if row.label.endswith(("1M", "2M", "4M", "8M", "12M")) else row.label
            ours.update((table.table, method, column, value) for column, value in row.published.items())
    assert ours == published_facts()
    assert sum(ours.values()) == 134


def test_the_numbers_of_adco_s_page_are_those_of_the_facts_and_are_called_inferred():
    with open(HERE / "published.csv", newline="") as file:
        facts = {
            float(row["value"])
            for row in csv.DictReader(file)
            if row["table"] == "AdCo-page" and not row["dataset"].startswith("ImageNet")
        }
    page = load_table("adco_page")
    assert {
        value for row in page.rows.values() for value in row.published.values()
    } == facts and "inferred" in page.title
    at_paper = experiment("adco_page", "adco", "paper")
    assert at_paper.hash(0) == experiment("2", "adco", "paper").hash(0), (
        "both rows must be the same run, so that AdCo is trained once"
    )
    assert all(at_paper.scale.evaluator_of(at_paper.scale.metrics[column][0]) for column in page.columns)
    on_pacs = experiment("adco_page", "adco_pacs", "paper").cfg
    assert (on_pacs.data.target, on_pacs.backbone.name, list(on_pacs.eval)) == (
        "art_painting",
        "resnet18",
        ["knn", "domain_labels"],
    )


def test_mlflow_is_told_the_published_numbers_where_data_recipe_and_metric_are_the_same():
    def told(scale, *further):
        page = experiments(load_table("adco_page"), load_scale(scale), rows=["adco"], further=further)
        return [word for word in next(page).overrides(0) if word.startswith("tracking.paper=")]

    (word,) = told("paper", "tracking=mlflow")
    assert yaml.safe_load(word.partition("=")[2]) == {
        "segment_fcn16/voc2012_miou": 70.0, "detect_coco_c4_2x/coco2017_box_ap": 37.9,
        "detect_coco_c4_2x/coco2017_mask_ap": 34.3,
    }  # fmt: skip
    assert told("paper") == told("paper", "tracking=ledger") == told("smoke", "tracking=mlflow") == []
    (one,) = experiments(load_table("adco_page"), load_scale("paper"), rows=["adco"], further=["tracking=mlflow"])
    assert dict(one.cfg.tracking.paper)["segment_fcn16/voc2012_miou"] == 70.0 and one.hash(0) == experiment(
        "adco_page", "adco", "paper"
    ).hash(0)


def test_the_published_recipes_are_those_of_the_facts():
    with open(HERE / "published.csv", newline="") as file:
        facts = {
            (row["table"], row["method"], row["epochs"], row["batch"], row["bank_rows"])
            for row in csv.DictReader(file)
            if row["method"] == "CaCo" and row["table"] in ("I", "II", "III", "VI")
        }
    ours = {
        (table.table, "CaCo", str(row.epochs), str(row.batch), str(row.bank))
        for table in map(load_table, ("1", "2", "3", "6"))
        for row in table.rows.values()
        if row.label.startswith("CaCo")
    }
    assert ours == facts


@pytest.fixture(scope="module")
def paper():
    """All rows that caco runs, at the paper's scale, by name. Rows of Tables II, IV and V are left out, because they
    differ from these only in numbers.
    """
    found = {}
    for name, rows in {
        "table1": None,
        "table3": None,
        "table6": ["adco_1m", "caco_8m", "caco_12m"],
        "table7": None,
    }.items():
        for one in experiments(load_table(name), load_scale("paper"), rows=rows):
            if one.why_not is None:
                found[one.name] = one
    return found


def test_rows_at_the_papers_scale_are_configurations_with_the_papers_numbers(paper):
    assert len(paper) == 15 + 4 + 3 + 4
    for name, one in paper.items():
        assert (one.cfg.epochs, one.cfg.batch) == (one.row.epochs, one.row.batch), name
        assert (one.cfg.bank.size if one.cfg.bank else None) == one.row.bank, name


def test_rows_that_are_one_run_have_one_hash(paper):
    assert paper["table1/caco_1024"].hash(0) == paper["table7/both"].hash(0)
    assert paper["table1/caco_4096"].hash(0) == paper["table6/caco_8m"].hash(0)
    assert paper["table7/both"].hash(0) != paper["table7/both"].hash(1)
    table7 = {one.hash(0) for name, one in paper.items() if name.startswith("table7")}
    assert len(table7) == 4


@pytest.mark.parametrize(
    "scale", [pytest.param(scale, marks=() if scale == "smoke" else pytest.mark.long) for scale in tables.scales()]
)
def test_the_study_of_negatives_differs_in_their_treatment_alone_and_begins_with_caco_itself(scale):
    rows = {one.row_id: one for one in experiments(load_table("negatives"), load_scale(scale))}
    assert rows["plain"].hash(0) == experiment("7", "both", scale).hash(0)
    hashes = {one.hash(0) for one in rows.values()}
    assert len(hashes) == len(rows) == 5
    same = [{key: value for key, value in plain(one.cfg).items() if key != "negatives"} for one in rows.values()]
    assert all(other == same[0] for other in same)
    assert rows["mixed"].cfg.negatives.warmup_epochs < rows["mixed"].cfg.epochs, (
        "mixing must begin before the end of the run"
    )


CHANGED_BY = {  # row -> the settings in which it differs from CaCo
    "size_quarter": {"bank.size"}, "size_sixteenth": {"bank.size"}, "size_four": {"bank.size"},
    "no_warm_start": {"epochs", "method.warm_start_steps"}, "short_warm_start": {"epochs", "method.warm_start_steps"},
    "constant_rate": {"bank.final_lr"}, "low_rate": {"bank.lr"}, "full_push": {"bank.push"}, "no_push": {"bank.push"},
    "code_reading": {"bank.reading"}, "frozen": {"bank.pull", "bank.push"}, "cold": {"method.temperature"},
    "own_temperature": {"bank.temperature"},
    "weighted": {f"method.positives.{key}" for key in ("_target_", "count", "temperature")},
    "small_weighted": {f"method.positives.{key}" for key in ("_target_", "count", "temperature")}
    | {"bank.size", "method.warm_start_momentum"},
    "blended": {f"method.positives.{key}" for key in ("_target_", "first_share", "last_share")},
    "half_blended": {f"method.positives.{key}" for key in ("_target_", "first_share", "last_share")},
    "balanced": {"bank.balance"}, "renewed": {"bank.renewed_after_steps"},
    **{
        f"correct_{share}": {f"method.positives.{key}" for key in ("_target_", "classes", "correct", "seed")}
        for share in ("tenth", "fifth", "two_fifths", "seven_tenths", "all")
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("scale", ["digits", "fashion"])
def test_the_study_of_the_bank_changes_one_thing_a_row_and_all_rows_train_for_as_many_steps(scale):
    rows = {one.row_id: one for one in experiments(load_table("study_bank"), load_scale(scale))}
    assert rows["none"].hash(0) == experiment("7", "none", scale).hash(0)
    caco, both = identity(rows["caco"].cfg), identity(experiment("7", "both", scale).cfg)
    assert caco.items() >= both.items() and all(key.startswith("eval.purity.") for key in caco.keys() - both.keys())
    for row_id, changed in CHANGED_BY.items():
        own = identity(rows[row_id].cfg)
        differ = {key for key in {*caco, *own} if caco.get(key) != own.get(key)}
        assert differ <= changed and differ, row_id
    assert rows.keys() - CHANGED_BY == {"none", "none_cold", "mocov2", "adco", "caco"}
    per_epoch = {"digits": 1400 // 64, "fashion": 10_000 // 128}[scale]
    steps = {row_id: (one.cfg.warm_start.steps or 0) + one.cfg.epochs * per_epoch for row_id, one in rows.items()}
    assert max(steps.values()) - min(steps.values()) < per_epoch, steps


@pytest.mark.long
@pytest.mark.parametrize("table", ["table1", "table6", "table7", "rivals", "negatives", "study_bank"])
def test_at_scale_mini_every_method_makes_780_steps(table):
    able = [one for one in experiments(load_table(table), load_scale("mini")) if one.why_not is None]
    steps = {one.row_id: (one.cfg.warm_start.steps or 0) + one.cfg.epochs * (10_000 // one.cfg.batch) for one in able}
    assert steps.pop("short_warm_start", 784) == 784  # 160 steps are not whole epochs
    assert all(one.cfg.warm_start.passes is None for one in able) and set(steps.values()) == {780}


def test_a_seed_reaches_the_bank_too(paper):
    assert paper["table7/both"].with_seed(3).bank.seed == 3


@pytest.mark.parametrize("scale", sorted(set(tables.scales()) - {"paper"}))
@pytest.mark.parametrize("table, row", [("7", "none"), ("7", "both"), ("6", "adco_1m")])
def test_every_scale_makes_checked_configurations(scale, table, row):
    one = experiment(table, row, scale)
    if row == "none":
        assert one.cfg.epochs == one.scale.exactly.get("epochs", max(1, round(200 * one.scale.times.get("epochs", 1))))
    assert len(one.overrides(0)) == len({o.partition("=")[0] for o in one.overrides(0)})


def test_a_scale_shrinks_the_papers_numbers_or_replaces_them():
    mini = experiment("6", "caco_12m", "mini")
    assert (mini.sized("bank"), mini.sized("batch")) == (98304 // 32, 128)
    assert experiment("1", "caco_4096", "imagenet100").sized("batch") == 1024


def test_a_scale_that_is_like_another_keeps_what_it_does_not_say():
    base, ours = load_scale("cifar10"), load_scale("cifar10_jpeg75")
    assert ours.overrides == [*base.overrides, "data=cifar10_jpeg75"]
    assert ours.where == base.where and ours.exactly == base.exactly and ours.title != base.title
    assert base.controls and not ours.controls  # there are no published numbers for those images


def test_settings_of_a_scale_win_over_those_of_a_row():
    overrides = experiment("6", "adco_1m", "smoke").overrides(0)
    assert "optimizer.lr=0.5" in overrides and "optimizer.lr=0.04" not in overrides
    assert "method.temperature=0.14" in overrides


@pytest.mark.parametrize("scale", ["mini", "cifar10", "cifar10_jpeg75", "cifar10_lightly", "cifar10_solo"])
def test_multi_crop_is_refused_where_images_are_small_and_not_left_out(scale):
    assert all("no multi-crop views" in one.why_not for one in experiments(load_table("3"), load_scale(scale)))
    assert all(one.why_not is None for one in experiments(load_table("3"), load_scale("paper")))


def test_one_head_for_all_is_not_forced_on_methods_that_it_would_break():
    """cifar10 trains every row as MoCo's notebook does, with one linear layer and one rate."""
    chosen = list(experiments(load_table("1"), load_scale("cifar10")))
    assert {one.row_id for one in chosen if one.why_not is None} == {
        "simclr",
        "mocov2",
        "nnclr",
        "adco",
        "infomin",
        "instdisc",
        "pclv2",
        "caco_256",
        "caco_1024",
        "caco_4096",
    }
    assert all("scale=cifar10_lightly" in one.why_not for one in chosen if one.row_id in ("byol", "simsiam", "swav"))


SHORT = {"Barlow Twins": "barlow", "InfoMin Aug": "infomin", "PCL v2": "pcl"}


def test_every_method_that_a_table_names_and_caco_has_is_run():
    """A row may be cited only if conf/method has no method with its label."""
    ours = {
        "simclr",
        "mocov2",
        "mocov3",
        "simsiam",
        "swav",
        "nnclr",
        "byol",
        "adco",
        "dino",
        "barlow",
        "vicreg",
        "caco",
    }
    ours |= {"mochi", "ifm", "hcl", "debiased", "infomin", "cpcv2", "instdisc", "pirl", "cmc", "pic", "pcl", "sela"}
    assert ours == {name for name in refusals.groups()["method"] if "_" not in name}
    # tables whose rows are settings of one method
    settings = ("table7", "negatives", "study_bank", "cifar10_repetitions")
    for name in tables.tables():
        for row in load_table(name).rows.values():
            label = row.label.removesuffix(" on PACS")
            method = (
                label.split(" ")[0].lower() if label[-1] == "M" else SHORT.get(label, label.lower().replace(" ", ""))
            )
            runs = next((word.removeprefix("method=") for word in row.run or () if word.startswith("method=")), None)
            assert (runs is None) == (method not in ours) or name in settings, f"{name}: {row.label}"
            assert runs in (None, method) or name in settings, f"{name}: {row.label}"


def test_rivals_train_for_the_same_steps():
    rows = load_table("rivals").rows
    assert {(row.epochs, row.batch) for row in rows.values()} == {(200, 1024)} and {"barlow", "vicreg"} <= rows.keys()
    named = {
        word
        for name in tables.tables()
        if name != "rivals"
        for row in load_table(name).rows.values()
        for word in row.run or ()
    }
    assert not {"method=barlow", "method=vicreg"} & named
    at_mini = list(experiments(load_table("rivals"), load_scale("mini")))
    assert {(one.sized("epochs"), one.sized("batch")) for one in at_mini} == {(10, 128)}
    assert all("data.limit=10000" in one.overrides(0) and one.why_not is None for one in at_mini)
    assert experiment("rivals", "caco", "mini").hash(0) == experiment("7", "both", "mini").hash(0), (
        "both rows must be the same run, so that CaCo is trained once"
    )


@pytest.mark.parametrize(
    "load, name, words",
    [
        (load_table, "table8", ["table8: no such table", "did you mean table7"]),
        (load_scale, "mni", ["mni: no such scale", "did you mean mini?", "smoke"]),
    ],
)
def test_an_unknown_name_is_refused_with_what_comes_nearest(load, name, words):
    with pytest.raises(UserError) as refused:
        load(name)
    assert all(word in str(refused.value) for word in words)


def test_an_unknown_row_is_refused_with_what_comes_nearest():
    with pytest.raises(UserError, match="row bth: no such row; did you mean both?"):
        experiments(load_table("7"), load_scale("smoke"), rows=["bth"])


@pytest.mark.parametrize("override", ["epochs=3", "bank.size=64", "data.limit=10", "device=cpu"])
def test_what_can_change_a_number_is_no_further_setting(override):
    with pytest.raises(UserError, match="could change a number"):
        experiments(load_table("7"), load_scale("smoke"), further=[override])


@pytest.mark.parametrize(
    "wrong, word",
    [({"sclae": 1}, "sclae"), ({"times": {"epochs": "long"}}, "long"), ({"exactly": {"rows": 1}}, "rows")],
)
def test_a_mistake_in_a_scales_file_is_named(monkeypatch, tmp_path, wrong, word):
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "mine.yaml").write_text(yaml.safe_dump({"title": "mine", **wrong}))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    with pytest.raises(UserError, match="mine.yaml.*" + word):
        load_scale("mine")
