"""Two and four processes compute what one computes, to rounding, for every method and every P/N setting."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from rank_worker import STEPS
from test_contracts import MULTICROP
from test_trainer import EVERY, assert_same, final, record
from tiny import BANK, TINY

from caco.config import CONF

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
    losses = [[row["loss"] for row in rows if row["kind"] in ("filling", "train")][:4] for rows in (one, two)]
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
