"""Every command line is accepted or refused with a message: the first lines of the fuzzer, and one line for each kind
of fault that it has found.
"""

import shlex

import pytest
from command_lines import fault, faults, line, outcome


def test_the_first_command_lines_are_accepted_or_refused_in_words():
    """`python -m tests.fuzz.command_lines` tests more of them."""
    seen = [(number, shlex.join(words), wrong) for number, _, words, wrong in faults(range(40))]
    assert [one for one in seen if one[2]] == [] and len(seen) == 40


def test_lines_follow_from_their_numbers():
    assert line(7) == line(7) and line(7) != line(8)


REFUSED = [
    ("data=" + "x" * 300, "no such option. There are: beton"),
    ("hydra.run.dir=" + "x" * 300, "this name is too long for a file system"),
    ("schedule.final_lr='${name}'", "schedule.final_lr: "),
    ("batch='${nope}'", "batch=${nope}: Interpolation key 'nope' not found"),
    ("batch='${batch}'", "batch=${batch}: Recursive interpolation detected"),
    ("seed={a:1}", "seed: "),
    ("schedule.drops='${batch}'", "schedule.drops: expected list of float, got "),
    ("schedule.drops=[[1]]", "schedule.drops.0: expected float, got [1] (list)"),
    ("checkpoint.milestone_epochs='${name}'", "checkpoint.milestone_epochs: expected list of int, got 'caco'"),
    ("checkpoint.milestone_epochs=[{a:1}]", "checkpoint.milestone_epochs.0: expected int, got {'a': 1}"),
    ("+method={1:2}", "method.1: Contrastive takes no such argument"),
    ("+data={true:1}", "data.True: "),
    ("+eval={1:2}", "+eval={1:2}: Key 1 (int) is incompatible with (str)"),
    ("name=null", "name: "),
    ("~schedule.unit", "~schedule.unit"),
    ("data.root=", "data.root= has no value after the =. Is a shell variable unset"),
    ("data.root=''", "has no value after the ="),
    ("hydra.run.dir=", "hydra.run.dir= has no value after the ="),
    ("augmentation.mean=[1,2]", "augmentation.mean: expected list of float, 3 of them, got [1, 2]"),
    ("augmentation.std=[0,0,0]", "augmentation.std.0: expected float above 0, got 0"),
    ("augmentation.std=[nan,1,1]", "augmentation.std.0: expected a finite number, got nan"),
    ("~augmentation.views", "augmentation.views: Views needs it"),
    (
        "backbone=small_resnet backbone.blocks=[]",
        "backbone.blocks: expected list of int from 1 up to 1000, 4 of them, got []",
    ),
    (
        "backbone=small_resnet backbone.blocks=[1,1,1,1000000]",
        "backbone.blocks.3: expected int from 1 up to 1000, got 1000000",
    ),
    ("optimizer.lr=inf", "optimizer.lr: expected a finite number, got inf"),
    ("optimizer.lr=nan", "optimizer.lr: expected a finite number, got nan"),
    (
        "augmentation.views={}",
        (
            "augmentation.views={}: changes nothing, because settings are merged key by key: augmentation.views keeps"
            " first, second. Leave one"
        ),
    ),
    ("++augmentation={views:{first:{}}}", "augmentation.views.first keeps "),
    ("eval={}", "eval keeps knn, probe. Leave one out by ~eval.probe"),
    (
        "augmentation.views={mine:{}}",
        "augmentation.views.mine is not set by the chosen augmentation; to add it, write +augmentation.views={mine:{}}",
    ),
    ("launcher=local launcher.parallel=0", "launcher.parallel: expected int from 1"),
    ("loader.prefetch=2147483647", "loader.prefetch: expected int from 1 up to 1024, got 2147483647"),
    ("eval.knn.temperature=0", "eval.knn.temperature: expected float above 0, got 0"),
    ("bank=8M bank=12M", "bank: is chosen twice: bank=8M bank=12M; leave all but one out"),
    ("preset=smoke preset=demo", "preset: is chosen twice: preset=smoke preset=demo; leave all but one out"),
    ("preset=smoke eval=[knn] eval=[probe]", "eval: is chosen twice: eval=[knn] eval=[probe]"),
    (
        "data.root=/bilder/größe(1)",
        "Hydra needs quotes around such a value, and the shell needs its own around those: ",
    ),
]


@pytest.mark.parametrize("typed, told", REFUSED, ids=[typed[:40] for typed, _ in REFUSED])
def test_what_was_a_traceback_or_was_accepted_is_a_sentence(typed, told):
    words = ["tracking=ledger", *shlex.split(typed, posix=False)]
    words = [word.replace("'${", "${").replace("}'", "}") for word in words]
    assert fault("config", words) is None
    assert told in (outcome("config", words) or "accepted")


@pytest.mark.parametrize(
    "typed, told",
    [
        ("optimizer.lr=interval(0,1)", "optimizer.lr=interval(0,1): expected hydra/sweeper=optuna or another sweeper"),
        # What is wrong beside the values that a search draws, which nothing composes before Hydra does.
        ("optimizer.lr=interval(0,1) optimizer=sdg", "optimizer=sdg: no such option"),
        ("optimizer.lr=interval(0,1) ~eval.nope", "~eval.nope: there is no such key to leave out"),
        ("optimizer.lr=interval(0,1) hydra.searchpath=[1]", "hydra.searchpath"),
        ("optimizer.lr=interval(0,1) method.nope=1", "method.nope"),
        ("optimizer.lrr=interval(0,1)", "optimizer.lrr"),
        ("method=glob(x*)", "method=glob(x*): expected a pattern that some options of a group match"),
        ("bank.size=glob(*)", "bank.size=glob(*): expected a pattern that some options of a group match"),
    ],
)
def test_a_search_that_cannot_be_begun_and_a_sweep_without_a_job_are_sentences(typed, told):
    words = ["tracking=ledger", "preset=smoke", *typed.split()]
    assert fault("sweep", words) is None
    assert told in (outcome("sweep", words) or "accepted")


@pytest.mark.parametrize(
    "line",
    ["~augmentation.views.second", "~eval.probe", "+augmentation.views={mine:{}}", "launcher=slurm launcher.sbatch={}"],
)
def test_what_those_refusals_advise_is_taken_and_an_empty_group_may_be_given_where_none_is(line):
    assert outcome("config", ["tracking=ledger", *line.split()]) is None


@pytest.mark.parametrize(
    "typed",
    [
        *[f"{group}=http://me:Gehe1m@host{path}" for group in ("tracking", "bank", "hydra/launcher") for path in ("",
        "/db", "/" + "x" * 300)],
        "bank=[a,http://me:Gehe1m@host]", "hydra.run.dir=http://me:Gehe1m@host", "hydra.run.dir=http:/me:Gehe1m@host", "http://me:Gehe1m@host=1",
        "seed='http://me:Gehe1m and more@host'", "schedule=postgresql://me:Gehe1m/+@host",
        f"augmentation.mean=[http://me:{'Gehe1m' * 30}@host]",
        "+method.password=Gehe1m", "data@http://me:Gehe1m@host=digits",
    ],
)  # fmt: skip
@pytest.mark.parametrize("root", ["config", "sweep", "evaluate"])
def test_no_refusal_repeats_a_password_wherever_it_was_typed(root, typed):
    words = ["weights=/dev/null", typed] if root == "evaluate" else ["tracking=ledger", typed]
    refusal = outcome(root, words)
    assert refusal is not None and "Gehe1m" not in refusal


@pytest.mark.parametrize("path", ["/bilder/größe", "/my photos", "/photos (2)", "/a=b", "/a~b", "/o'clock"])
def test_the_quoting_that_a_refusal_shows_is_taken(path):
    refusal = outcome("config", ["tracking=ledger", "data=folder", f"data.root={path}"])
    if refusal is None:
        return  # accepted without quoting
    shown = shlex.split(refusal.rpartition("its own around those: ")[2])
    assert outcome("config", ["tracking=ledger", "data=folder", *shown]) is None
