"""Two and four processes compute what one computes, to rounding, for every method and every P/N setting."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
import torch
from rank_worker import STEPS
from test_contracts import MULTICROP
from test_trainer import EVERY, assert_same, final, record
from tiny import BANK, TINY, compose

from caco.checkpoint import load
from caco.config import CONF
from caco.plan import plan

pytestmark = pytest.mark.timeout(900)  # four processes on two busy cores

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SETTINGS = sorted(path.stem for path in (CONF / "pn").glob("*.yaml"))
SMALL = "augmentation=digits projector=small projector.hidden_dim=16 projector.dim=8 optimizer=sgd"
CASES = [f"method={m} {SMALL}" for m in METHODS if m != "caco"] + [f"pn={pn}" for pn in SETTINGS] + ["bank.reading=paper"]
CASES += [" ".join(MULTICROP), " ".join([CASES[0], *MULTICROP])]
# Four are slow on two cores: every method, but of CaCo's settings only CaCo itself.
OF_FOUR = [case for case in CASES if case == "pn=both" or not case.startswith(("pn=", "bank."))]


def launch(world, command):
    """Run a command as `world` ranks on this machine, as torchrun would; the ranks' outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__),
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [rank.communicate(timeout=800) for rank in ranks]
    return [rank.returncode for rank in ranks], outputs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    made = {}
    for world in (1, 2, 4):
        path = folder / f"{world}.pt"
        codes, outputs = launch(world, [sys.executable, str(os.path.join(os.path.dirname(__file__), "rank_worker.py")), str(path), *(CASES if world < 4 else OF_FOUR)])
        assert codes == [0] * world, outputs[0][1][-3000:]
        made[world] = torch.load(path, weights_only=True)
    return made


@pytest.mark.parametrize(("world", "case"), [(2, case) for case in CASES] + [(4, case) for case in OF_FOUR])
def test_loss_gradients_bank_and_batchnorm_are_those_of_one_process(results, case, world):
    one, many = results[1][case], results[world][case]
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
        assert many["statistics"][name] == pytest.approx(value, abs=1e-6), name


def test_the_three_steps_of_every_case_do_something(results):
    for case, result in results[1].items():
        assert len({round(loss.item(), 6) for loss in result["losses"]}) == STEPS, case
        assert max(g.abs().max() for g in result["gradients"]) > 0, case


def train(world, folder, *overrides):
    return launch(
        world, [sys.executable, "-m", "caco.train", *TINY, *BANK, *EVERY, *overrides, f"hydra.run.dir={folder}"]
    )


def test_a_run_on_two_ranks_is_recorded_once_and_goes_on_with_one(tmp_path):
    calm = ["bank.lr=0.01", "optimizer.lr=0.003"]  # rounding must not change which row is nearest
    codes, outputs = train(1, tmp_path / "one", *calm)
    assert codes == [0], outputs[0][1]
    codes, outputs = train(2, tmp_path / "two", *calm)
    assert codes == [0, 0], outputs[0][1] + outputs[1][1]
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in two]
    losses = [[row["loss"] for row in rows if row["kind"] in ("warm_start", "train")][:4] for rows in (one, two)]
    # Later, float32 sums in another order make some key choose another row; in float64 (above) all is equal.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert "step 12/12" not in outputs[1][1], "rank 0 alone speaks"

    for newest in sorted((tmp_path / "two" / "checkpoints").glob("*.pt"))[1:]:
        newest.unlink()  # as if it had been killed after step 9
    (tmp_path / "two" / "summary.json").unlink()
    codes, outputs = train(1, tmp_path / "two", *calm)
    assert codes == [0], outputs[0][1]
    assert "going on from" in outputs[0][1]
    assert_same(
        {k: v.shape for k, v in final(tmp_path / "one")["method"].items()},
        {k: v.shape for k, v in final(tmp_path / "two")["method"].items()},
    )


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path):
    codes, outputs = train(2, tmp_path, "batch=63", "bank.size=126")
    assert codes == [2, 2]
    assert "multiple of the 2 processes" in outputs[0][1]


def test_ranks_that_disagree_on_the_configuration_are_refused(tmp_path):
    script = (
        "import os, sys; sys.argv += ['seed=' + os.environ['RANK']]\n"
        "from caco.train import main; main()"
    )
    command = [sys.executable, "-c", script, *TINY, *BANK, f"hydra.run.dir={tmp_path}"]
    codes, outputs = launch(2, command)
    assert 0 not in codes
    assert "every rank must have the same configuration" in outputs[0][1]


def test_ranks_that_load_different_checkpoints_are_refused_before_anything_is_trained(tmp_path):
    tiny.train(tmp_path, *EVERY, "eval=[]")
    (tmp_path / "summary.json").unlink()
    before = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    script = (
        "import os\n"
        "from caco.checkpoint import Checkpoints\n"
        "files = Checkpoints._files\n"
        "late = int(os.environ['RANK'])  # the newest file has not come to the second rank's machine yet\n"
        "Checkpoints._files = lambda self, kind='': files(self, kind)[: 2 - late]\n"
        "from caco.train import main; main()\n"
    )
    command = [sys.executable, "-c", script, *TINY, *BANK, *EVERY, "eval=[]", "max_steps=14", f"hydra.run.dir={tmp_path}"]
    codes, outputs = launch(2, command)
    assert codes == [2, 2], outputs[0][1] + outputs[1][1]
    for _, told in outputs:
        assert "every rank must load the same checkpoint; got rank 0 step 12, rank 1 step 9" in told
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt")) == before


def test_a_bank_saved_by_four_ranks_is_gone_on_with_by_two(tmp_path):
    """Rows, velocities and uses of the checkpoint are the whole bank's; two ranks take them up and train on."""
    calm = ["bank.lr=0.01", "optimizer.lr=0.003"]
    codes, outputs = train(4, tmp_path, *calm)
    assert codes == [0] * 4, outputs[0][1]
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))
    nine = load(newest[-2])
    assert nine["step"] == 9
    assert nine["method"]["bank.rows.velocity"].shape == (128, 8)
    assert nine["method"]["bank.rows.velocity"].abs().amin(1).max() > 0
    four = final(tmp_path)["method"]
    newest[-1].unlink()
    (tmp_path / "summary.json").unlink()
    codes, outputs = train(2, tmp_path, *calm)
    assert codes == [0, 0], outputs[0][1]
    assert "going on from" in outputs[0][1]
    two = final(tmp_path)["method"]
    for name in ("bank.rows.weight", "bank.rows.velocity"):
        assert torch.allclose(two[name], four[name], atol=1e-4), name
        assert not torch.equal(two[name], nine["method"][name])


def test_ranks_that_disagree_on_the_bank_are_refused_with_the_numbers():
    script = (
        "import os, torch\n"
        "from caco import distributed\n"
        "from caco.banks.rows import Rows\n"
        "distributed.start(torch.device('cpu'), timeout_s=60)\n"
        "rank = int(os.environ['RANK'])\n"
        "for size, seed in ((8 + 2 * rank, 0), (8, rank)):\n"
        "    try: Rows(size=size, dim=4, seed=seed, learnable=True)\n"
        "    except ValueError as error: print(error)\n"
        "distributed.stop()\n"
    )
    codes, outputs = launch(2, [sys.executable, "-c", script])
    assert codes == [0, 0], outputs[0][1]
    for out, _ in outputs:
        assert "same bank; got (size, dim, seed) by rank: (8, 4, 0), (10, 4, 0)" in out
        assert "same bank; got (size, dim, seed) by rank: (8, 4, 0), (8, 4, 1)" in out


def test_a_rank_that_dies_ends_the_others_at_once(tmp_path):
    """Long before the time-out of the process group, ten minutes: launch would not wait as long."""
    script = (
        "import os\n"
        "from caco import trainer\n"
        "original = trainer.Trainer._log\n"
        "def log(self, step, *rest):\n"
        "    if step == 4 and os.environ['RANK'] == '1': os._exit(9)\n"
        "    original(self, step, *rest)\n"
        "trainer.Trainer._log = log\n"
        "from caco.train import main; main()\n"
    )
    codes, outputs = launch(2, [sys.executable, "-c", script, *TINY, *BANK, *EVERY, f"hydra.run.dir={tmp_path}"])
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    assert "Connection" in outputs[0][1] or "connection" in outputs[0][1]
    assert load(sorted((tmp_path / "checkpoints").glob("*.pt"))[-1])["step"] == 3


def test_ranks_that_cut_their_batches_into_parts_write_the_keys_in_the_order_of_the_images(tmp_path):
    """The first step fills rows 0 to 63. Its two parts have other images with two ranks, so BatchNorm moves the keys a little."""
    rows = []
    for world in (1, 2):
        codes, outputs = train(world, tmp_path / str(world), "max_steps=1", "accumulate=2")
        assert codes == [0] * world, outputs[0][1]
        rows.append(final(tmp_path / str(world))["method"]["bank.rows.weight"][:64])
    nearest = (rows[0] @ rows[1].T).argmax(1)
    assert (nearest == torch.arange(64)).float().mean() > 0.5, "by chance it would be one in 64"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Bytes that a rank of two sends in one step, counted at every collective as a ring would send them."""
    path = tmp_path_factory.mktemp("sent") / "sent.json"
    here = os.path.dirname(__file__)
    codes, outputs = launch(2, [sys.executable, os.path.join(here, "rank_sent.py"), str(path), *PLANNED])
    assert codes == [0, 0], outputs[0][1][-3000:]
    return json.loads(path.read_text())


PLANNED = ["pn=both", "pn=positive", "pn=none", f"method=adco {SMALL}", f"method=simclr {SMALL}", f"method=nnclr {SMALL}"]


@pytest.mark.parametrize("case", PLANNED)
def test_the_plan_s_messages_are_those_that_are_sent(counted, case):
    overrides = case.split()
    cfg = compose(*overrides, "batch=16", bank=not {"pn=none", "method=simclr"} & set(overrides))
    planned = plan(cfg, world=2)["sent_bytes_per_step"]
    assert planned == pytest.approx(counted[case], rel=0.05)
