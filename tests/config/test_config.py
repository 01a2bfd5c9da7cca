"""The configuration that a command line composes to: each option, method and preset, and which of two settings wins."""

import pytest
import yaml
from omegaconf import OmegaConf

from caco.checking import check_command
from caco.config import refusals
from caco.config.composition import CONF, compose, instantiate
from caco.runs.identity import plain

OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*/*.yaml"))


def composed(*overrides: str) -> dict:
    return plain(compose(list(overrides)))


def accept(*overrides: str) -> None:
    check_command(list(overrides), multirun=False)


# Views that are cut into patches need a method that takes patches, and networks for lightness and colours need CMC.
WITH_METHOD = {f"augmentation={name}{size}": name for name in ("infomin", "pirl", "cpcv2") for size in ("", "_cifar")}
WITH_METHOD |= {"projector=cmc": "cmc"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_passes_the_checks(option):
    group, _, name = option.rpartition("/")
    chosen = f"{group}={name}"
    accept(chosen, *([f"method={WITH_METHOD[chosen]}"] if chosen in WITH_METHOD else []))


def test_every_folder_of_conf_is_a_group_of_the_root():
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = {key for entry in defaults if isinstance(entry, dict) for key in entry}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} - {"pn"} <= chosen


@pytest.mark.parametrize("preset", refusals.groups()["preset"])
@pytest.mark.parametrize("pn", ["none", "positive"])  # no bank, and a bank that does not learn: these differ most
def test_every_preset_goes_with_every_setting(preset, pn):
    accept(f"preset={preset}", f"pn={pn}", "eval=[]")


@pytest.mark.parametrize("method", refusals.groups()["method"])
def test_the_demo_goes_with_every_method(method):
    """Digits are grey and too small for patches, so methods that need colours or patches use CIFAR with the demo's
    other settings.
    """
    cifar = ["data=cifar10", f"augmentation={method}_cifar"] if method in WITH_METHOD.values() else []
    heads = ["backbone=cmc_small", "projector=cmc"] if method == "cmc" else []
    accept("preset=demo", f"method={method}", *cifar, *heads)


@pytest.mark.parametrize("other", ["debug", "profile"])
def test_debug_and_profile_go_on_top_of_a_preset(other):
    cfg = composed(f"preset=[demo,{other}]")
    assert cfg["data"]["_target_"].endswith("digits")
    assert cfg["anomaly"] if other == "debug" else cfg["profile"]


def test_bare_command_is_the_papers_recipe():
    cfg = composed()
    assert (cfg["batch"], cfg["epochs"], cfg["bank"]["size"]) == (1024, 200, 65536)
    assert (cfg["backbone"]["name"], cfg["backbone"]["cifar_stem"]) == ("resnet50", False)
    assert cfg["data"]["_target_"] == "caco.data.sets.folders.imagenet"
    assert cfg["optimizer"]["_target_"] == "caco.engine.optimizers.lars"
    assert (cfg["optimizer"]["lr"], cfg["optimizer"]["weight_decay"]) == (0.3, 1.5e-6)
    unused = dict.fromkeys(
        ("warmup_start", "final_lr", "final_weight_decay", "clip_gradient_norm", "clip_each_gradient_norm")
    )
    cosine = {
        "warmup_epochs": 10,
        "warmup_end": "last",
        "final_fraction": 0.01,
        "unit": "step",
        "drops": [],
        "drop_factor": 0.1,
    }
    assert cfg["schedule"] == {**cosine, **unused}
    assert (cfg["bank"]["pull"], cfg["bank"]["push"], cfg["bank"]["lr"]) == (1, 1, 3.0)
    assert cfg["method"]["temperature"] == 0.08


def test_last_row_of_table_vi_is_two_overrides():
    cfg = composed("bank=12M", "batch=4096")
    assert (cfg["bank"]["size"], cfg["batch"], cfg["optimizer"]["batch"]) == (98304, 4096, 4096)


@pytest.mark.parametrize("name, size", [("1M", 8192), ("2M", 16384), ("4M", 32768), ("8M", 65536), ("12M", 98304)])
def test_a_bank_is_named_by_its_size_in_the_paper(name, size):
    assert composed(f"bank={name}")["bank"]["size"] == size


def test_any_other_bank_size_is_a_number():
    assert composed("bank.size=1000")["bank"]["size"] == 1000


def test_pn_sets_positives_negatives_and_the_bank():
    assert composed("pn=none")["bank"] is None
    negative = composed("pn=negative")["bank"]
    assert (negative["pull"], negative["push"]) == (0, 1)
    assert composed("pn=positive")["bank"]["_target_"].endswith("FifoBank")


def test_preset_beats_the_root_and_the_command_line_beats_the_preset():
    assert composed("preset=demo")["batch"] != composed()["batch"]
    cfg = composed("preset=demo", "batch=32", "bank=1M", "pn=negative", "data=folder", "data.root=/images")
    assert (cfg["batch"], cfg["bank"]["size"], cfg["bank"]["pull"]) == (32, 8192, 0)
    assert cfg["data"]["_target_"] == "caco.data.sets.folders.folder"


def test_evaluators_are_chosen_as_a_list():
    assert list(composed("eval=[knn,probe]")["eval"]) == ["knn", "probe"]
    assert list(composed("eval=probe")["eval"]) == ["probe"]
    assert composed("eval=[]")["eval"] == {}
    accept("preset=demo", "eval=[]")


def test_build_calls_the_target_with_its_keys_and_what_the_program_supplies():
    part = OmegaConf.create({"_target_": "datetime.timedelta", "hours": 2})
    assert instantiate(part, minutes=30).total_seconds() == 9000


def test_build_builds_inner_parts_first():
    inner = {"_target_": "datetime.timedelta", "hours": 1}
    assert instantiate({"_target_": "builtins.dict", "a": inner, "b": [inner]})["b"][0].total_seconds() == 3600


def test_a_warm_start_is_set_in_one_place():
    method = composed("warm_start.steps=7")["method"]
    assert (method["warm_start_steps"], method["warm_start_passes"]) == (7, None)
    assert composed("warm_start.passes=3")["method"]["warm_start_passes"] == 3
    assert composed("pn=positive", "warm_start.passes=3")["method"]["warm_start_passes"] == 3
    assert composed("bank_learning.final_lr=0.03")["bank"]["final_lr"] == 0.03
