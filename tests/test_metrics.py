"""Names of results: two protocols never share a name, and the name of every evaluator is known without building it."""

import pytest
from omegaconf import OmegaConf

from caco import metrics
from caco.config.composition import CONF, instantiate
from caco.runs.identity import plain

OPTIONS = sorted(path.stem for path in (CONF / "eval").glob("*.yaml"))


def node(option, *settings):
    """The configuration of an evaluator option with further settings."""
    return plain(
        OmegaConf.merge(OmegaConf.load(CONF / "eval" / f"{option}.yaml"), OmegaConf.from_dotlist(list(settings)))
    )


def test_each_option_has_names_of_its_own():
    named = {option: metrics.protocols(node(option)) for option in OPTIONS}
    assert named == {
        "finetune": ["finetune"], "geometry": ["geometry"], "purity": ["purity"],
        "knn": ["knn20_20pct"], "knn_all": ["knn20"], "linear": ["linear"],
        "linear_lightly": ["linear_lightly"], "linear_moco": ["linear_moco"], "probe": ["probe"],
        "semi": ["semi_1", "semi_10"],
        "transfer": ["transfer"], "segment": ["segment_fcn16"], "detect": ["detect_voc_c4"],
        "detect_coco": ["detect_coco_c4_1x"],
        "detect_coco_2x": ["detect_coco_c4_2x"], "detect_coco_fpn": ["detect_coco_fpn_1x"],
        "dense_linear": ["dense_linear"],
        "domain": ["pacs", "pacs_finetune"],
        "domain_labels": ["domain_labels_1", "domain_labels_5", "domain_labels_10", "domain_labels"],
    }  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_evaluator_calls_itself_what_its_configuration_says(option):
    found = node(option)
    built = instantiate(found)
    assert (built.protocols if hasattr(built, "protocols") else [built.protocol]) == metrics.protocols(found)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ("knn", "knn_all")])
def test_whatever_can_change_a_number_changes_the_name(option):
    """This tests every argument of every evaluator, except `when`, the name and the folder of a set, which change no
    number. The next test is about k-NN.
    """
    found = node(option)
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.25, str: lambda v: v + "x"}
    for key, value in found.items():
        if key in (
            "_target_",
            "name",
            "when",
            "root",
            "sets",
            "lists",
            "fractions",
            "save_every_steps",
            "targets",
            "ways",
        ):
            continue
        changed = (
            [other[type(item)](item) for item in value] or [1] if isinstance(value, list) else other[type(value)](value)
        )
        names = metrics.protocols(found | {key: changed})
        changed_names = set(names) - set(metrics.protocols(found))
        if option == "domain":  # the frozen and the fine-tuned variant have different settings
            assert changed_names, key
        else:
            assert len(changed_names) == len(names), key
        assert all(f"{key}-" in name for name in changed_names), names


@pytest.mark.parametrize(
    ("option", "overrides", "expected"),
    [
        ("knn", ["k=200", "fraction=1", "temperature=0.1"], ["knn200_t0.1"]),
        ("knn", ["fraction=0.07"], ["knn20_7pct"]),
        ("knn", ["block=7", "when=end"], ["knn20_20pct"]),
        ("knn", ["choice=first"], ["knn20_20pct_first"]),
        ("knn_all", ["choice=first"], ["knn20"]),
        ("probe", ["l2=0.01"], ["probe_l2-0.01"]),
        ("linear", ["batch=256", "larc=false"], ["linear_batch-256_larc-no"]),
        ("linear", ["batch=256", "name=mine"], ["mine"]),
        ("linear", ["drop_last=true"], ["linear_drop_last-yes"]),
        ("linear_lightly", ["drop_last=false"], ["linear_lightly_drop_last-no"]),
        ("linear_moco", ["milestones=[30]"], ["linear_moco_milestones-30"]),
        ("semi", ["lists=[a.txt,b.txt]"], ["semi_1_listed", "semi_10_listed"]),
        ("semi", ["fractions=[0.1]", "epochs=[30]"], ["semi_10"]),
        ("semi", ["fractions=[0.05]", "epochs=[30]"], ["semi_5_epochs-30"]),
        ("transfer", ["size=32"], ["transfer_size-32"]),
        ("geometry", ["images=512"], ["geometry_images-512"]),
        ("segment", ["images=8", "save_every_steps=7", "root=there"], ["segment_fcn16_images-8"]),
        ("segment", ["train=train", "precision=bf16"], ["segment_fcn16_train-train_precision-bf16"]),
        ("dense_linear", ["size=224", "root=there"], ["dense_linear_size-224"]),
        ("detect", ["images=8", "save_every_steps=7", "root=there"], ["detect_voc_c4_images-8"]),
        ("detect_coco_fpn", ["steps=9000", "precision=bf16"], ["detect_coco_fpn_1x_steps-9000_precision-bf16"]),
        ("detect", ["name=mine", "steps=9000"], ["mine"]),
    ],
)
def test_what_differs_from_the_recipe_stands_in_the_name(option, overrides, expected):
    assert metrics.protocols(node(option, *overrides)) == expected


def test_an_evaluator_from_elsewhere_is_left_to_name_itself():
    assert metrics.protocols({"_target_": "mine.Evaluator", "k": 3}) == []


def test_a_name_falls_into_protocol_and_measure():
    names = ("knn20_20pct_top1", "linear_batch-256_top5", "transfer_size-32/voc2007_map11", "geometry/rank_me")
    assert [metrics.protocol_of(name) for name in names] == [
        "knn20_20pct",
        "linear_batch-256",
        "transfer_size-32",
        "geometry",
    ]


def test_headings():
    names = (
        "knn20_top1", "knn20_20pct_top1", "knn20_20pct_first_top1", "knn200_t0.1_top1", "probe_top1",
        "linear_moco_top1", "transfer/dtd_top1",
    )  # fmt: skip
    assert [metrics.title(name) for name in names] == [
        "k-NN (20)", "k-NN (20 of 20 %)", "k-NN (20 of the first 20 %)", "k-NN (200, t 0.1)", "probe", "linear_moco",
        "transfer/dtd",
    ]  # fmt: skip


def test_what_is_a_percentage():
    names = [
        "knn20_top1",
        "linear_top5",
        "transfer/voc2007_map11",
        "transfer/pets_mean_per_class",
        "transfer/voc2007_ap_per_image",
    ]
    names += [
        "segment_fcn16/voc2012_miou",
        "dense_linear/voc2012_mean_accuracy",
        "segment_fcn16/voc2012_pixel_accuracy",
    ]
    names += [
        "detect_voc_c4/voc2007_ap50",
        "detect_coco_c4_1x/coco2017_mask_ap",
        "detect_coco_c4_1x/coco2017_box_ap_small",
        "purity_images-512/positives",
    ]
    assert all(map(metrics.is_percent, names))
    assert not any(map(metrics.is_percent, ["loss", "transfer/dtd_strength", "geometry/rank_me", "train_hours"]))
    assert metrics.accuracies(["loss", "probe_top1", "untrained/knn20_top1", "linear_top5", "knn20_top1"]) == [
        "knn20_top1",
        "probe_top1",
    ]


def test_a_search_maximises_what_the_run_itself_measured():
    knn, probe = node("knn"), node("probe")
    # the first is from an evaluation after the training
    summary = {"knn20_top1": 1.0, "knn20_20pct_top1": 2.0, "probe_top1": 3.0}
    assert metrics.objective(summary, {"probe": probe, "knn": knn}) == 2.0
    assert metrics.objective(summary, {"probe": probe}) == 3.0
    assert metrics.objective(summary, {"linear": node("linear")}) is None
    assert metrics.objective({"loss": 1.0}, {"knn": knn}) is None
