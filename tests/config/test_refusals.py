"""Refusals of a command line, which come before torch is imported and say what was expected."""

import copy
import subprocess
import sys
import textwrap

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_config import accept, composed

from caco.checking import check_command
from caco.config import folders, refusals, validation
from caco.config.composition import compose
from caco.errors import UserError


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_command(list(overrides), multirun=False)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole():
    return compose([])


def refusal_of_value(whole, override: str) -> str:
    """Like `refusal`, but without composing the rest of the configuration again, which takes most of the time."""
    cfg = copy.deepcopy(whole)
    key, _, value = override.partition("=")
    try:
        OmegaConf.update(cfg, key, yaml.safe_load(value))
        validation.check(cfg)
    except OmegaConfBaseException as error:
        return refusals.explain(error, [override])
    except UserError as error:
        return str(error)
    pytest.fail(f"accepted {override}")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["bach=64"], "bach: no such key; did you mean batch?"),
        (["optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean lr?"),
        (["schedule.warmup_epoch=1"], "did you mean warmup_epochs"),
        (["optimiser.lr=1"], "did you mean optimizer.lr"),
        (["data.rot=/d", "epoch=3"], "data.rot: no such key; did you mean root? data has: "),
        (["data.rot=/d", "method=bylo"], "data.rot: no such key; did you mean root? data has: "),
        (["data=folder", "data.rot=/d", "batch=many"], "data.rot: no such key; did you mean root? data has: "),
        (["data=digits", "data.soed=1", "method=byol", "pn=both"], "data.soed: no such key; did you mean seed?"),
        (["bank=12m"], "bank=12m: no such option; did you mean 12M? There are: 12M, 1M"),
        (["backbone=resnet5"], "did you mean resnet50"),
        (["preset=dmo"], "did you mean demo"),
        (["eval=[knn,prob]"], "eval=prob: no such option; did you mean probe?"),
        (["bank=512"], "for another size bank.size=512"),
        (["+batchh=3"], "batchh: no such key; did you mean batch?"),
        (["+optimizer.momentun=0.5"], "lars takes no such argument; did you mean momentum?"),
        (["+augmentation.views.first.blurr_p=0.5"], "View takes no such argument; did you mean blur_p?"),
        (["bank.reading=papr"], "did you mean paper?"),
        (["backbone._target_=caco.nn.backbones.timm_bakbone"], "did you mean timm_backbone?"),
        (["backbone._target_=timmm.create_model"], "timmm.create_model is not installed"),
    ],
)
def test_unknown_keys_and_options_are_refused_with_what_comes_near(overrides, expected):
    assert expected in refusal(*overrides)


# (override, where, expected, got)
WRONG_TYPES = [
    ("batch=abc", "batch", "int", "'abc'"),
    ("batch=1.5", "batch", "int", "'1.5'"),
    ("compile=maybe", "compile", "bool", "'maybe'"),
    ("schedule.warmup_epochs=long", "schedule.warmup_epochs", "float", "'long'"),
    ("checkpoint.milestone_epochs=[a]", "checkpoint.milestone_epochs[0]", "int", "'a'"),
    ("backbone.cifar_stem=1", "backbone.cifar_stem", "bool", "1 (int)"),
    ("projector.layers=2.0", "projector.layers", "int from 1 up to 1000", "2.0 (float)"),
    ("optimizer.lr=high", "optimizer.lr", "float from 0", "'high' (str)"),
    ("optimizer.lr=null", "optimizer.lr", "float from 0", "None"),
    ("bank.warmup_epochs=true", "bank.warmup_epochs", "float from 0", "True (bool)"),
    ("bank.size=many", "bank.size", "int from 2", "'many' (str)"),
    ("data.root=[a,b]", "data.root", "str or None", "['a', 'b'] (list)"),
    ("loader.num_workers=two", "loader.num_workers", "int from 0 up to 1024", "'two' (str)"),
    ("eval.knn.k=1.5", "eval.knn.k", "int from 1", "1.5 (float)"),
    ("eval.knn.when=never", "eval.knn.when", "epoch | end", "'never' (str)"),
    ("augmentation.size=big", "augmentation.size", "int from 1 up to 65535", "'big' (str)"),
    ("augmentation.views.first.blur_p=x", "augmentation.views.first.blur_p", "float from 0 up to 1", "'x' (str)"),
    (
        "augmentation.views.second.scale=0.3",
        "augmentation.views.second.scale",
        "list of float above 0 up to 1, 2 of them",
        "0.3 (float)",
    ),
    ("augmentation.mean=[0,zero,0]", "augmentation.mean.1", "float", "'zero' (str)"),
    ("tracking.feed_seconds=fast", "tracking.feed_seconds", "float above 0", "'fast' (str)"),
]


@pytest.mark.parametrize("override, where, expected, got", WRONG_TYPES)
def test_a_wrong_type_anywhere_is_refused_with_expected_and_got(override, where, expected, got, whole):
    assert f"{where}: expected {expected}, got {got}" in refusal_of_value(whole, override)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("batch=1", "at least 2"),
        ("epochs=0", "at least 1"),
        ("max_steps=0", "null or at least 1"),
        *(
            (f"norm_groups={wrong}", "1, rank, or a divisor of batch=1024")
            for wrong in ("3", "0", "1024", "ranks", "true", "1.0")
        ),
        ("shuffle_keys=true", "false, because norm_groups=1"),
        ("seed=-1", "0 to 2**32 - 1"),
        ("name=a/b", "letters, digits"),
        ("name=..", "letters, digits"),
        ("precision=fp16", "bf16 or fp32"),
        ("device=gpu", "auto, cpu or cuda"),
        ("schedule.unit=steps", "step or epoch"),
        ("schedule.warmup_epochs=-1", "0 or more"),
        ("schedule.final_fraction=2", "0 to 1, or null"),
        ("schedule.warmup_start=2", "null, or 0 to 1"),
        ("schedule.warmup_end=first", "last or next"),
        ("schedule.final_lr=-1", "null, or 0 or more"),
        ("log_every_steps=0", "at least 1"),
        ("eval_every_epochs=0", "at least 1"),
        ("checkpoint.keep=0", "at least 1"),
        ("checkpoint.every_epochs=0", "at least 1"),
        ("checkpoint.every_steps=0", "null or at least 1"),
        ("checkpoint.milestone_epochs=[0]", "epochs from 1"),
    ],
)
def test_senseless_values_of_the_root_are_refused(override, expected, whole):
    assert f"{override.partition('=')[0]}: expected {expected}" in refusal_of_value(whole, override)


def test_a_final_rate_and_a_final_fraction_at_once_are_refused():
    expected = (
        "schedule: set one of final_fraction, final_lr and drops, and the others to null (drops to []); got 0.01, 0.1"
        " and []"
    )
    assert expected in refusal("schedule.final_lr=0.1")
    accept("schedule.final_lr=0.1", "schedule.final_fraction=null")


def test_all_problems_of_the_tree_are_told_at_once():
    assert len(refusal("optimizer.lr=high", "eval.knn.k=1.5", "batch=1").splitlines()) == 3


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["pn=none", "bank=12M"], "bank=12M: pn=none has no bank"),
        (["pn=none", "bank.size=100"], "bank.size: this configuration has no bank"),
        (["pn=none", "+bank.size=100"], "bank: expected a component with a _target_, or null"),
    ],
)
def test_a_bank_for_a_setting_without_one_is_refused_not_ignored(overrides, expected):
    assert expected in refusal(*overrides)


@pytest.fixture
def own_conf(tmp_path):
    """A folder with options that are added to those of conf/ by --config-dir."""
    for group in ("method", "preset"):
        (tmp_path / group).mkdir()
    folders.use(tmp_path)
    yield tmp_path
    folders.use()


def test_a_choice_that_something_later_undoes_is_refused_not_ignored(own_conf):
    (own_conf / "preset" / "selfish.yaml").write_text("# @package _global_\nbank:\n  size: 77\n")
    said = "bank=12M: preset=selfish sets bank.size=77 instead; say bank.size=98304"
    assert refusal("preset=selfish", "bank=12M") == said
    accept("preset=selfish", "bank=12M", "bank.size=98304")
    accept("preset=selfish")


def test_a_method_s_rate_gives_way_to_a_preset_s_but_not_to_silence():
    accept("preset=demo", "method=byol")
    assert composed("preset=demo", "method=byol")["optimizer"]["lr"] == composed("preset=demo")["optimizer"]["lr"]
    assert "optimizer=sgd: a later group sets optimizer.lr=0.2 instead; say optimizer.lr=0.03" in refusal(
        "method=byol", "optimizer=sgd"
    )
    accept("method=byol", "optimizer=sgd", "optimizer.lr=0.03", "optimizer.weight_decay=1e-4")


def test_pn_belongs_to_caco(own_conf):
    recipe = composed()
    other = {"method": recipe["method"], "bank": recipe["bank"]}
    (own_conf / "method" / "other.yaml").write_text("# @package _global_\n" + yaml.safe_dump(other))
    accept("method=other")
    assert "pn applies to method=caco only" in refusal("method=other", "pn=positive")
    assert "applies to method=caco only, and the method is other" in refusal("method=other", "+pn=positive")


def test_what_must_be_given_is_named(whole):
    assert refusal_of_value(whole, "data.root=???") == "data.root: must be given, as data.root=..."


@pytest.mark.parametrize("part", ["backbone", "batch", "epochs"])
def test_a_deleted_part_is_missed(part):
    assert part in refusal(f"~{part}")


@pytest.mark.parametrize("override", ["batch", "batch=[1", "batch=1,2", "data.root=${nope}", "=3", "eval=null"])
def test_a_command_line_that_makes_no_sense_is_one_readable_refusal(override):
    assert "Traceback" not in refusal(override) and len(refusal(override).splitlines()) == 1


def test_every_job_of_a_sweep_is_checked_before_the_first_starts():
    with pytest.raises(UserError, match="no such option; did you mean 12M"):
        check_command(["bank=4M,8M,12N", "pn=both,negative"], multirun=True)
    with pytest.raises(UserError, match="batch: expected at least 2"):
        check_command(["batch=64,1"], multirun=True)
    check_command(["bank=4M,8M", "seed=0,1"], multirun=True)


def test_refusals_come_without_torch():
    cases = [[override] for override, *_ in WRONG_TYPES[::5]]
    cases += [["bach=3"], ["bank=12N"], ["batch=1"], ["pn=none", "bank=1M"]]
    code = f"""
        import sys
        from caco.checking import check_command
        from caco.errors import UserError
        for overrides in {cases!r}:
            try:
                check_command(overrides, multirun=False)
            except UserError:
                continue
            sys.exit(f"accepted {{overrides}}")
        check_command([], multirun=False)
        heavy = sorted({{"torch", "torchvision", "timm", "mlflow", "sklearn", "submitit"}} & set(sys.modules))
        sys.exit(f"imported {{heavy}}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_evaluators_whose_results_have_one_name_are_refused_before_anything_starts(whole):
    cfg = copy.deepcopy(whole)
    OmegaConf.update(cfg, "eval.again", {**cfg.eval.knn, "block": 64}, force_add=True)
    said = r"eval\.again: its results would be called knn20_20pct, the same as those of eval\.knn: leave one"
    with pytest.raises(UserError, match=said):
        validation.check(cfg)
    cfg.eval.again.k = 5
    validation.check(cfg)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["warm_start.steps=1", "warm_start.passes=2"],
            "warm_start: expected steps or passes, got both, 1 and 2; set one of them to null",
        ),
        (
            ["pn=none", "warm_start.passes=2"],
            "warm_start.passes: counts passes over the rows of a bank, and this configuration has no bank, got 2",
        ),
        (["warm_start.steps=-1"], "warm_start.steps: expected null, or 0 or more, got -1"),
        (["method=byol", "warm_start.steps=5"], "warm_start: method=byol has no warm start; leave it out"),
        (
            ["pn=positive", "bank_learning.final_lr=0"],
            "bank_learning.final_lr: the bank of this configuration takes no final_lr: none of its rows learn",
        ),
        (
            ["+bank_learning.wobble=1"],
            "bank_learning.wobble: the bank of this configuration takes no wobble: it takes lr, lr_reference_batch, ",
        ),
        (["pn=negative", "bank_learning.lr=fast"], "bank.lr: expected float from 0, got 'fast'"),
    ],
)
def test_a_warm_start_or_a_final_rate_without_a_meaning_is_refused(overrides, expected):
    assert expected in refusal(*overrides)
