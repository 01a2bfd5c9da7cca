"""A new setting of the learnable bank needs one argument of its constructor and one line of YAML, and nothing else."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest

from caco.config.composition import compose
from caco.config.validation import check
from caco.errors import UserError
from caco.runs.identity import plain, run_hash

LEARN = (["pn=both"], ["pn=negative"], ["method=adco", "bank=12M"], ["preset=demo"])
DO_NOT = (["pn=none"], ["pn=positive"])


@pytest.fixture(scope="module")
def extended(tmp_path_factory, repo_root):
    """A checkout with a new setting `wobble`, which is one argument and one line of YAML. Call it with command lines to
    get their banks or refusals.
    """
    folder = tmp_path_factory.mktemp("extended")
    for part in ("caco", "conf"):
        shutil.copytree(
            repo_root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.h")
        )
    insert(
        folder / "caco/banks/learnable.py",
        after="        push: NonNegative = 1.0,\n",
        line="        wobble: float = 0.5,\n",
    )
    insert(folder / "conf/config.yaml", after="bank_learning:", line="  wobble: 0.25\n")
    code = """
        import json, sys
        from caco.config import composition, refusals, validation
        from caco.errors import UserError
        from caco.runs.identity import plain

        for overrides in json.loads(sys.argv[1]):
            try:
                cfg = composition.compose(overrides)
                validation.check(cfg, overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
                print(json.dumps(plain(cfg)["bank"]))
            except (*refusals.COMPOSITION_ERRORS, UserError) as error:
                print(json.dumps(refusals.explain(error, overrides)))
    """

    def run(*command_lines: list[str]) -> list:
        arguments = [sys.executable, "-c", textwrap.dedent(code), json.dumps(command_lines)]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def insert(path, *, after: str, line: str) -> None:
    content = path.read_text()
    start = content.index(after)
    end = content.index("\n", start) + 1
    path.write_text(content[:end] + line + content[end:])


def test_a_new_setting_is_one_argument_and_one_line_whatever_is_chosen(extended):
    one = "bank_learning.wobble=2"
    banks = extended(
        *LEARN,
        *DO_NOT,
        ["method=adco", one],
        ["pn=negative", one, "bank.wobble=3"],
        ["pn=both", "bank.wobble=much"],
        ["pn=none", one],
    )
    learned, others, (by_block, by_hand, wrong, useless) = banks[: len(LEARN)], banks[len(LEARN) : -4], banks[-4:]
    assert [bank["wobble"] for bank in learned] == [0.25] * len(LEARN)
    assert not any("wobble" in (bank or {}) for bank in others)
    assert (by_block["wobble"], by_hand["wobble"]) == (2, 3)
    assert wrong == "bank.wobble: expected float, got 'much' (str)"
    assert useless.startswith(
        "bank_learning.wobble: the bank of this configuration takes no wobble: none of its rows learn"
    )


@pytest.mark.parametrize("chosen", [["pn=both"], ["pn=negative"], ["method=adco"]])
def test_the_bank_is_set_by_its_size_by_hand_and_by_the_block_in_every_combination(chosen):
    bank = plain(compose([*chosen, "bank=12M", "bank.lr=0.3", "bank_learning.push=0.5"]))["bank"]
    assert (bank["size"], bank["lr"], bank["push"], bank["reading"]) == (98304, 0.3, 0.5, "code")


def test_what_differs_between_settings_stays_different():
    both, negative, adco = (plain(compose([chosen]))["bank"] for chosen in ("pn=both", "pn=negative", "method=adco"))
    assert negative == both | {"pull": 0.0}
    assert adco == negative | {"dim": 128, "warmup_epochs": 0, "weight_decay": 1e-4, "temperature": 0.02}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], "360cfb256e"), (["pn=negative", "bank.lr=0.3"], "e247478005"), (["method=adco", "bank=12M"], "b6ed48d195")],
)
def test_runs_are_found_where_they_were_when_the_block_stood_three_times(overrides, expected):
    """The hashes are part of directory names, so they may change only when a recipe changes."""
    assert run_hash(compose(overrides)) == expected


def test_a_setting_that_no_bank_takes_is_refused():
    with pytest.raises(
        UserError, match="bank_learning.wobble: the bank of this configuration takes no wobble: it takes lr, "
    ):
        check(compose(["+bank_learning.wobble=1"]), overrides=["+bank_learning.wobble=1"])


def test_one_word_makes_a_learned_bank_move_as_the_demo_s_does():
    """bank_recipe=small gives any run the demo's motion of the bank; any of its values can still be changed."""
    demo, published = compose(["preset=demo"]), compose([])
    for chosen in ("pn=both", "pn=negative", "method=adco"):
        assert compose([chosen, "bank_recipe=small"]).bank_learning == demo.bank_learning
    changed = compose(["bank_recipe=small", "bank_learning.push=0.5"])
    assert plain(changed)["bank"]["push"] == 0.5
    assert plain(changed)["bank"]["final_lr"] == 0.0
    assert compose(["preset=demo", "bank_recipe=published"]).bank_learning == published.bank_learning
    assert run_hash(compose(["bank_recipe=published"])) == run_hash(published)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [(["pn=none"], "pn=none has no bank that learns"), (["method=mocov2"], "method=mocov2 has no bank that learns")],
)
def test_a_recipe_for_a_bank_that_does_not_learn_is_refused(chosen, said):
    cfg = compose([*chosen, "bank_recipe=small"])
    with pytest.raises(UserError, match=f"bank_recipe=small: {said}; expected pn=both, pn=negative or method=adco"):
        check(cfg, overrides=[*chosen, "bank_recipe=small"], choices=dict(cfg.hydra.runtime.choices))
