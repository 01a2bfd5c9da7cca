"""Two and four processes compute the same as one, up to rounding, for every method and every setting of pn."""

import functools
import json
import os
import subprocess
import sys

import pytest
import rank_worker
import tiny
import torch
from cases import METHODS, MULTICROP, QUEUE, TREATED
from processes import caco_train, ranks
from rank_worker import STEPS
from recorded import assert_same, final, record
from tiny import BANK, EVERY, FEW_PROTOTYPES, OF_PATCHES, TINY, compose

from caco.config.composition import CONF
from caco.plan import plan
from caco.runs.checkpoint import load

SETTINGS = sorted(path.stem for path in (CONF / "pn").glob("*.yaml"))
SMALL = "augmentation=digits projector=small projector.hidden_dim=16 projector.dim=8 optimizer=sgd"
OF_METHOD = {
    m: " ".join([f"method={m}", SMALL, *FEW_PROTOTYPES.get(m, []), *OF_PATCHES.get(m, [])])
    for m in METHODS
    if m != "caco"
}
for by_image, images in (("instdisc", 1399), ("pic", 1399), ("pirl", 511), ("cmc", 511)):
    OF_METHOD[by_image] += f" data.limit={images}"  # a row for each image, which two or four ranks cannot share evenly
# So few images that a pass over all of them has two batches.
OF_METHOD["sela"] += " data.limit=32"
OF_METHOD["pcl"] += " data.limit=32 method.num_clusters=[4,6,8] method.num_negatives=1"
CASES = (
    [*OF_METHOD.values()]
    + [f"pn={pn}" for pn in SETTINGS]
    + ["bank.reading=paper bank.keep_probabilities=true", "bank.renewed_after_steps=1 bank.balance=0.5"]
)
CASES += [" ".join(MULTICROP), *(" ".join([OF_METHOD[m], *MULTICROP]) for m in ("adco", "dino", "byol", "barlow"))]
CASES += [
    " ".join([case, *treated]) for case in ("pn=both", "pn=negative", OF_METHOD["adco"]) for treated in TREATED.values()
]
CASES += [OF_METHOD["instdisc"] + " method.loss=softmax method.num_noise=null"]
HARD, MIXED = (" ".join(["pn=both", *TREATED[name]]) for name in ("hard", "mixed"))
WITH_A_QUEUE = " ".join(
    [OF_METHOD["swav"], *MULTICROP, QUEUE[0].replace("128", "32"), QUEUE[1]]
)  # two batches of rank_worker's size
CASES += [WITH_A_QUEUE]
# BatchNorm's groups of the batch and the order of shuffled keys are the same on any number of ranks.
GROUPS = [f"{OF_METHOD['adco']} norm_groups=4 shuffle_keys=true"]
GROUPS += [
    f"{OF_METHOD['byol']} norm_groups=4",
    " ".join([OF_METHOD["dino"], *MULTICROP, "norm_groups=4 shuffle_keys=true"]),
]
CASES += GROUPS
OF_ALL_RANKS = f"{OF_METHOD['cpcv2']} method.group_size=null"  # negatives are the patches of all ranks' images
CASES += [OF_ALL_RANKS]
# On four ranks: every method, but only CaCo itself of the settings of pn.
OF_FOUR = [case for case in CASES if case in ("pn=both", MIXED) or not case.startswith(("pn=", "bank."))]
# One for each way in which ranks depend on one another: learned rows, a queue, other images of the batch, sums over
# prototypes, covariances, mixed rows, rows drawn for an image, groups of BatchNorm.
FAST = [
    "pn=both",
    MIXED,
    OF_METHOD["mocov2"],
    OF_METHOD["simclr"],
    WITH_A_QUEUE,
    OF_METHOD["vicreg"],
    OF_METHOD["instdisc"],
    GROUPS[0],
]
QUIET = ["eval=[]" if override == "eval=[knn]" else override for override in TINY] + BANK
EXACT = [*QUIET, *EVERY]  # runs in float64 are not evaluated
FLOAT64 = 1e-7  # for losses, rows and velocities after a dozen steps; see rank_worker.in_float64


@functools.cache
def of_one(case):
    return rank_worker.steps(case)


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(2, case, marks=() if case in FAST else pytest.mark.long) for case in CASES]
    + [pytest.param(4, case, marks=pytest.mark.long) for case in OF_FOUR],
)
def test_loss_gradients_bank_and_batchnorm_are_those_of_one_process(tmp_path, case, world):
    """In float64, equal values stay equal to ten digits for three steps; rank_worker.in_float64 explains why float32 is
    not enough.
    """
    codes, outputs = ranks(world, rank_worker.write_steps, str(tmp_path / "many.pt"), case)
    assert codes == [0] * world, outputs[0][1][-3000:]
    one, many = of_one(case), torch.load(tmp_path / "many.pt", weights_only=True)
    assert len(many["losses"]) == STEPS
    for step, (a, b) in enumerate(zip(one["losses"], many["losses"], strict=True)):
        assert torch.allclose(a, b, atol=1e-9), f"loss of step {step}"
    for a, b in zip(one["gradients"], many["gradients"], strict=True):
        assert torch.allclose(a, b, atol=1e-8)
    assert one["state"].keys() == many["state"].keys()
    for name, value in one["state"].items():
        assert torch.allclose(value.double(), many["state"][name].double(), atol=1e-8), name
    assert one["statistics"].keys() == many["statistics"].keys()
    for name, value in one["statistics"].items():
        assert many["statistics"][name] == pytest.approx(value, rel=1e-9, abs=1e-6), name


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.long) for case in CASES])
def test_the_three_steps_of_every_case_do_something(case):
    assert len({round(loss.item(), 6) for loss in of_one(case)["losses"]}) == STEPS
    assert max(g.abs().max() for g in of_one(case)["gradients"]) > 0


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] in ("warm_start", "train")]


def test_a_run_on_two_ranks_is_that_of_one_is_recorded_once_and_goes_on_with_one(tmp_path):
    for world, name in ((1, "one"), (2, "two")):
        codes, outputs = ranks(world, rank_worker.train_in_float64, *EXACT, f"hydra.run.dir={tmp_path / name}")
        assert codes == [0] * world, outputs[0][1]
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in two]
    assert losses(two) == pytest.approx(losses(one), abs=FLOAT64)
    assert "caco: finished in" in outputs[0][1] and "caco" not in outputs[1][1], "only rank 0 may print"

    newest = final(tmp_path / "two")["method"]
    for later in sorted((tmp_path / "two" / "checkpoints").glob("*.pt"))[1:]:
        later.unlink()  # as if the run had been killed after step 9
    (tmp_path / "two" / "summary.json").unlink()
    codes, outputs = ranks(1, rank_worker.train_in_float64, *EXACT, f"hydra.run.dir={tmp_path / 'two'}")
    assert codes == [0], outputs[0][1]
    assert "step_000000009.pt, step 9 of 12" in outputs[0][1]
    assert_near(final(tmp_path / "two")["method"], newest)
    assert_near(newest, final(tmp_path / "one")["method"])


def assert_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value.double(), theirs[name].double(), rtol=0, atol=FLOAT64) or name.endswith("uses"), (
            name
        )


def test_a_float32_run_on_two_ranks_begins_with_the_loss_of_one(tmp_path):
    """Only the first loss is compared: it follows from the same weights and images, so rounding errors have not grown
    yet.

    In float32 a cosine is exact to about 1e-6 after the network's layers, and to about 1e-5 after division by a
    temperature of 0.08. Rows or images in another order would change the loss by tenths.
    """
    begun = {}
    for world in (1, 2):
        codes, outputs = ranks(world, caco_train, *TINY, *BANK, "max_steps=3", f"hydra.run.dir={tmp_path / str(world)}")
        assert codes == [0] * world, outputs[0][1]
        begun[world] = losses(record(tmp_path / str(world)))
    assert begun[2][0] == pytest.approx(begun[1][0], abs=1e-4)
    assert len(set(begun[2])) == len(begun[2]) == 3
    assert record(tmp_path / "2")[-1]["kind"] == "eval", "the run on two ranks must be evaluated"


@pytest.mark.long
def test_torchrun_starts_the_ranks_of_a_run(tmp_path):
    """The command is that of docs/machines.md, and starts new interpreters."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "caco.train", *TINY, *BANK]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "max_steps=4", f"hydra.run.dir={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2
    assert len(final(tmp_path)["random"]) == 2


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path):
    codes, outputs = ranks(2, caco_train, *TINY, "batch=63", "bank.size=126", f"hydra.run.dir={tmp_path}")
    assert codes == [2, 2]
    assert "multiple of the 2 processes" in outputs[0][1]


def test_ranks_that_disagree_on_the_configuration_are_refused(tmp_path):
    codes, outputs = ranks(2, rank_worker.train_with_a_seed_of_its_own, *TINY, *BANK, f"hydra.run.dir={tmp_path}")
    assert 0 not in codes
    assert "every rank must have the same configuration" in outputs[0][1]


def test_ranks_that_load_different_checkpoints_are_refused_before_anything_is_trained(tmp_path):
    tiny.train(tmp_path, *EVERY, "eval=[]")
    (tmp_path / "summary.json").unlink()
    before = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    quiet = [override for override in TINY if not override.startswith("eval=")]
    command = [*quiet, *BANK, *EVERY, "eval=[]", f"hydra.run.dir={tmp_path}"]
    codes, outputs = ranks(2, rank_worker.train_with_a_late_file_on_rank_1, *command)
    assert codes == [2, 2], outputs[0][1] + outputs[1][1]
    for _, told in outputs:
        assert "every rank must load the same checkpoint; got rank 0 step 12, rank 1 step 9" in told
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt")) == before


@pytest.mark.long
def test_a_bank_saved_by_four_ranks_is_taken_up_to_the_bit_and_gone_on_with_by_two(tmp_path):
    """A checkpoint has rows, velocities and uses of the whole bank, for any number of ranks."""
    command = [*EXACT, f"hydra.run.dir={tmp_path / 'run'}"]
    codes, outputs = ranks(4, rank_worker.train_in_float64, *command)
    assert codes == [0] * 4, outputs[0][1]
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    nine, twelve = load(newest[-2]), load(newest[-1])
    assert (nine["step"], twelve["step"]) == (9, 12)
    assert nine["method"]["bank.rows.velocity"].shape == (128, 8)
    assert nine["method"]["bank.rows.velocity"].abs().amin(1).max() > 0
    assert nine["method"]["bank.rows.uses"].sum() > 0
    newest[-1].unlink()
    (tmp_path / "run" / "summary.json").unlink()

    codes, outputs = ranks(2, rank_worker.write_what_was_loaded, str(tmp_path / "loaded.pt"), *command)
    assert codes == [0, 0], outputs[0][1]
    assert_same(dict(torch.load(tmp_path / "loaded.pt", weights_only=True)), dict(nine["method"]))

    codes, outputs = ranks(2, rank_worker.train_in_float64, *command)
    assert codes == [0, 0], outputs[0][1]
    assert "going on from" in outputs[0][1]
    assert_near(final(tmp_path / "run")["method"], twelve["method"])
    assert not torch.allclose(
        twelve["method"]["bank.rows.weight"], nine["method"]["bank.rows.weight"], atol=1e4 * FLOAT64
    )


@pytest.mark.long
def test_a_bank_by_image_saved_by_two_ranks_is_taken_up_and_gone_on_with_by_three(tmp_path):
    """With 1,397 rows, the first ranks have one row more than the last."""
    of_method = [*OF_METHOD["instdisc"].split(), "data.limit=1397", "batch=48"]
    quiet = [override for override in QUIET if not override.startswith(("bank.", "batch="))]
    command = [*quiet, *of_method, *EVERY, f"hydra.run.dir={tmp_path / 'run'}"]
    codes, outputs = ranks(2, rank_worker.train_in_float64, *command)
    assert codes == [0, 0], outputs[0][1]
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    nine, twelve = load(newest[-2]), load(newest[-1])
    assert nine["method"]["bank.rows.weight"].shape == (1397, 8) and nine["method"]["bank.normaliser"] > 0
    newest[-1].unlink()
    (tmp_path / "run" / "summary.json").unlink()
    codes, outputs = ranks(3, rank_worker.write_what_was_loaded, str(tmp_path / "loaded.pt"), *command)
    assert codes == [0] * 3, outputs[0][1]
    assert_same(dict(torch.load(tmp_path / "loaded.pt", weights_only=True)), dict(nine["method"]))
    codes, outputs = ranks(3, rank_worker.train_in_float64, *command)
    assert codes == [0] * 3, outputs[0][1]
    assert_near(final(tmp_path / "run")["method"], twelve["method"])


def test_ranks_that_disagree_on_the_bank_are_refused_with_the_numbers():
    codes, outputs = ranks(2, rank_worker.print_refused_banks)
    assert codes == [0, 0], outputs[0][1]
    for out, _ in outputs:
        assert "same bank; got (size, dim, seed) by rank: (8, 4, 0), (10, 4, 0)" in out
        assert "same bank; got (size, dim, seed) by rank: (8, 4, 0), (8, 4, 1)" in out


def test_a_rank_that_dies_ends_the_others_at_once(tmp_path):
    """This happens long before the process group's time-out of ten minutes, for which ranks() would not wait."""
    codes, outputs = ranks(2, rank_worker.train_and_lose_rank_1, *TINY, *BANK, *EVERY, f"hydra.run.dir={tmp_path}")
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert "Connection" in outputs[0][1] or "connection" in outputs[0][1]
    assert load(sorted((tmp_path / "checkpoints").glob("*.pt"))[-1])["step"] == 3


def test_ranks_that_cut_their_batches_into_parts_write_the_keys_in_the_order_of_the_images(tmp_path):
    """The first step fills rows 0 to 63. With two ranks its two parts contain other images, so BatchNorm changes the
    keys a little.
    """
    rows = []
    for world in (1, 2):
        run_dir = f"hydra.run.dir={tmp_path / str(world)}"
        codes, outputs = ranks(world, caco_train, *QUIET, "max_steps=1", "accumulate=2", run_dir)
        assert codes == [0] * world, outputs[0][1]
        rows.append(final(tmp_path / str(world))["method"]["bank.rows.weight"][:64])
    nearest = (rows[0] @ rows[1].T).argmax(1)
    assert (nearest == torch.arange(64)).float().mean() > 0.5, (
        "most keys must be nearest to their own row; by chance it would be one in 64"
    )


PLANNED_METHODS = (
    "adco",
    "simclr",
    "nnclr",
    "dino",
    "byol",
    "mocov3",
    "barlow",
    "vicreg",
    "infomin",
    "cpcv2",
    "instdisc",
    "pic",
)
PLANNED = [
    "pn=both",
    "pn=positive",
    "pn=none",
    *(OF_METHOD[m] for m in PLANNED_METHODS),
    OF_ALL_RANKS,
    WITH_A_QUEUE,
    *GROUPS,
]
PLANNED += [OF_METHOD["instdisc"] + " method.loss=softmax method.num_noise=null"]
PLANNED += [HARD, MIXED.replace("hardest=16", "hardest=128")]  # so that as many different rows are requested as exist


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The bytes that one of two ranks sends in a step, counted at every collective as if it ran as a ring."""
    path = tmp_path_factory.mktemp("sent") / "sent.json"
    codes, outputs = ranks(2, rank_worker.write_sent, str(path), PLANNED)
    assert codes == [0, 0], outputs[0][1][-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", PLANNED)
def test_the_plan_s_messages_are_those_that_are_sent(counted, case):
    overrides = case.split()
    cfg = compose(*overrides, "batch=16", bank=not rank_worker.WITHOUT_BANK & set(overrides))
    planned = plan(cfg, world=2)["sent_bytes_per_step"]
    assert planned == pytest.approx(counted[case], rel=0.05)
