"""What `negatives=` composes to, which methods refuse it before anything is built, and the commands and the class that
the docs print for it.
"""

import re
import shlex

import pytest
import torch
from test_config import composed
from test_refusals import refusal
from torch.nn import functional as F

from caco.banks import motion, reweighted, scoring
from caco.checking import check_command
from caco.config import composition, folders, validation
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder, build_method
from caco.runs.identity import identity, plain, run_hash
from experiments.tables import experiments, load_scale, load_table

TREATMENTS = ("debiased", "hard", "margin", "mixed")


def test_plain_is_what_runs_were_before_there_was_a_choice():
    cfg = composed()
    assert cfg["negatives"] is None and "negatives" not in identity(cfg)
    before = {key: value for key, value in cfg.items() if key != "negatives"}
    assert run_hash(before) == run_hash(cfg) == run_hash(composed("negatives=plain"))
    assert run_hash(composed("negatives=hard")) != run_hash(cfg)


def test_kept_probabilities_are_refused_with_treated_negatives():
    told = refusal("negatives=hard", "bank.keep_probabilities=true")
    assert "bank.keep_probabilities=true: with negatives=hard nothing is kept; leave it out" in told


@pytest.mark.parametrize(
    "method",
    [
        "byol",
        "mocov3",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("simsiam", "barlow", "vicreg", "swav", "dino")),
    ],
)
def test_a_method_that_takes_none_says_so_and_which_do(method):
    told = refusal(f"method={method}", "negatives=hard")
    assert (
        told.startswith("negatives=hard: ")
        and f"the class of method={method}, takes no treatment of negatives: it has no negatives, or its own loss"
        in told
    )
    assert told.endswith("expected negatives=plain, or one of these methods: adco, caco, mocov2, nnclr, simclr")


@pytest.mark.long
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_each_goes_with_each_preset_and_setting_that_has_a_bank_s_rows_as_negatives(treatment):
    for pn in ("both", "negative"):
        check_command(["preset=demo", f"pn={pn}", f"negatives={treatment}"], multirun=False)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["negatives=hrad"],
            "negatives=hrad: no such option; did you mean hard? There are: debiased, hard, margin, mixed, plain.",
        ),
        (["negatives=hard", "negatives.concentrtion=3"], "did you mean concentration?"),
        (["negatives=margin", "negatives.alpha=much"], "negatives.alpha: expected"),
        (["negatives=null"], "negatives=null: negatives is one of debiased, hard, margin, mixed, plain"),
    ],
)
def test_slips_are_refused_with_what_comes_nearest(overrides, told):
    with pytest.raises(Exception) as caught:
        check_command(overrides, multirun=False)
    assert told in str(caught.value)


RECIPES = {  # name -> optimiser; schedule; method; bank; negatives; views; backbone; the layers of the projector
    "mochi": (
        {"_target_": "caco.engine.optimizers.sgd", "lr": 0.03, "reference_batch": 256, "momentum": 0.9},
        {"warmup_epochs": 0, "final_fraction": 0.0},
        {"temperature": 0.2, "momentum": 0.999, "final_momentum": 0.999, "symmetric": False},
        65536, {"hardest": 1024, "pairs": 1024, "with_query": 128, "warmup_epochs": 15}, "mocov2", False,
        [2048, 2048, 128],
    ),
    "ifm": (
        {"_target_": "caco.engine.optimizers.sgd", "lr": 0.8 / 2, "reference_batch": 256, "momentum": 0.9},
        {"warmup_epochs": 0, "final_fraction": 0.0},
        {"temperature": 0.2, "momentum": 0.99, "final_momentum": 0.99, "symmetric": False},
        65536, {"epsilon": 0.1, "alpha": 1.0}, "mocov2", False, [2048, 2048, 128],
    ),
    "hcl": (
        {"_target_": "caco.engine.optimizers.adam", "lr": 1e-3, "reference_batch": 256, "weight_decay": 1e-6},
        {"warmup_epochs": 0, "final_fraction": 1.0},
        {"temperature": 0.5, "momentum": None, "symmetric": True, "reduction": "mean"},
        None, {"positive_share": 0.1, "concentration": 1.0}, "hcl", True, [2048, 512, 128],
    ),
}  # fmt: skip
RECIPES["debiased"] = (*RECIPES["hcl"][:4], {"positive_share": 0.1, "concentration": 0.0}, *RECIPES["hcl"][5:])


@pytest.mark.parametrize("name", RECIPES)
def test_the_method_alone_is_the_published_recipe(name):
    optimizer, schedule, method, bank, negatives, views, small_stem, widths = RECIPES[name]
    cfg = composition.job_config(composition.compose([f"method={name}"]))
    tree = plain(cfg)
    for part, expected in (
        ("optimizer", optimizer),
        ("schedule", schedule),
        ("method", method),
        ("negatives", negatives),
    ):
        assert {key: tree[part][key] for key in expected} == pytest.approx(expected), part
    assert tree["augmentation"] == composed(f"method={name}", f"augmentation={views}")["augmentation"]
    assert (tree["bank"] and tree["bank"]["size"]) == bank and tree["backbone"]["cifar_stem"] == small_stem
    with torch.device("meta"):
        projector = build_encoder(cfg).projector
    layers = [layer for layer in projector if isinstance(layer, torch.nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
    assert [layer.bias is not None for layer in layers] == ([False, True] if small_stem else [True, True])


def commands(text):
    return [shlex.split(line, comments=True)[2:] for line in re.findall(r"^ {4}(python -m .*)$", text, re.MULTILINE)]


@pytest.fixture
def printed(repo_root, tmp_path, monkeypatch):
    """Write the class that the docs print for mine/, and return the commands of the docs."""
    text = (repo_root / "docs/negatives.md").read_text(encoding="utf-8")
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL):
        file = tmp_path / re.search(r"^# (mine/.*)$", block, re.MULTILINE)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield commands(text)
    folders.use()


@pytest.mark.long
def test_the_docs_commands_are_accepted(printed):
    assert [module for module, *_ in printed] == ["caco.train"] * 4 + ["experiments.run", "caco.plan", "caco.train"]
    for module, *words in printed:
        if module == "experiments.run":
            table, scale, *further = words
            assert list(experiments(load_table(table), load_scale(scale.removeprefix("scale=")), further=further))
            continue
        # settings of caco.plan
        overrides = [word for word in folders.take(words) if not word.startswith(("world=", "images="))]
        check_command([word for word in overrides if word != "-m"], multirun="-m" in overrides)


def test_the_docs_own_treatment_trains_encoder_and_bank_by_its_gradient(printed):
    """Its gradients through the streamed bank equal autograd's for the same loss written out."""
    overrides = [*folders.take(printed[-1][1:]), "tracking=ledger", "batch=8"]
    cfg = composition.compose(overrides)
    validation.check(cfg, overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
    cfg = composition.job_config(cfg)
    focal = build_method(cfg).treatment
    q = F.normalize(
        torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    ).requires_grad_()
    w = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positive, anchors = torch.full((5,), 7), []
    extra = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)[:, None]
    score = reweighted.score(
        q, w, positive, objective=focal, first_row=0, size=7, tau=0.2, extra_BE=extra, anchors=anchors
    )
    score.loss_B.mean().backward()
    leaf = w.clone().requires_grad_()
    logits = torch.cat([q.detach() @ F.normalize(leaf, dim=1).T, extra], 1) / 0.2
    loss_B = F.cross_entropy(logits, positive, reduction="none")
    expected = ((1 - torch.exp(-loss_B)) * loss_B).mean()
    expected.backward()
    assert torch.allclose(score.loss_B.mean(), expected, atol=1e-12)
    pushed = motion.row_gradient(w, 0, scoring.Anchors.joined(anchors), pull=0.0, push=1.0)
    assert torch.allclose(pushed, -leaf.grad, atol=1e-12)
    assert instantiate(cfg.negatives).gamma == 1.0
