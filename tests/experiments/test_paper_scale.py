"""scale=paper follows the published recipes exactly: the tests write out from the publications what a run does in every
epoch.
"""

import math

import pytest

from caco.config.composition import instantiate
from caco.engine.optimizers import OptimizerSchedule
from caco.schedules import RunShape, cosine
from experiments.tables import experiments, load_scale, load_table

STEPS = 3  # per epoch in these tests


@pytest.fixture(scope="module")
def rows():
    """The configurations of all rows that caco runs, by table and row. Rows of Tables II, IV and V are left out,
    because they differ from these only in numbers.
    """
    every = [
        one for name in "1367" for one in experiments(load_table(name), load_scale("paper")) if one.why_not is None
    ]
    return {one.name: (one.row, one.cfg) for one in every}


def of_method(rows, method):
    found = {name: cfg for name, (row, cfg) in rows.items() if f"method={method}" in row.run}
    assert found
    return found.items()


def rates(cfg):
    """The optimiser's learning rate at every step."""
    optimizer = cfg.optimizer
    base = optimizer.lr * cfg.batch / optimizer.reference_batch
    schedule = {key: value for key, value in cfg.schedule.items() if key != "unit"}
    return [base * factor for factor in OptimizerSchedule(**schedule).learning_rate(run_of(cfg), base)]


def run_of(cfg):
    return RunShape(cfg.epochs, STEPS, cfg.batch, cfg.schedule.unit)


def by_epoch(value, epochs):
    return [value(epoch) for epoch in range(epochs) for _ in range(STEPS)]


def test_all_is_float32_and_the_monitor_s_images_are_the_first(rows):
    for name, (_, cfg) in rows.items():
        assert cfg.precision == "fp32" and cfg.data._target_.endswith(".imagenet"), name
        knn, linear = cfg.eval.knn, cfg.eval.linear
        assert (knn.k, knn.temperature, knn.fraction, knn.choice) == (20, 0.2, 0.2, "first"), name
        assert (linear.epochs, linear.batch, linear.lr, linear.unit, linear.drop_last) == (
            100,
            4096,
            0.025,
            "epoch",
            False,
        ), name


def test_caco_s_rates_and_its_twin_s_m_change_once_an_epoch(rows):
    """The rate is (e + 1) / 10 for ten epochs, then falls to a hundredth by a cosine. The bank's rate of 3.0 has the
    same warm-up and then stays, and the momentum goes from 0.99 to 1.
    """
    for name, cfg in of_method(rows, "caco"):
        peak, E = cfg.optimizer.lr * cfg.batch / 256, cfg.epochs
        final = peak / 100

        def rate(e, peak=peak, final=final, E=E):
            return (
                peak * (e + 1) / 10
                if e < 10
                else final + (peak - final) * (1 + math.cos(math.pi * (e - 10) / (E - 10))) / 2
            )

        assert rates(cfg) == pytest.approx(by_epoch(rate, E)), name
        twin = cosine(run_of(cfg), cfg.method.momentum, cfg.method.final_momentum)
        assert twin == pytest.approx(by_epoch(lambda e, E=E: 1 - 0.01 * (1 + math.cos(math.pi * e / E)) / 2, E)), name
        if cfg.bank is not None and "lr" in cfg.bank:
            bank = instantiate({**cfg.bank, "size": 8, "dim": 2})
            assert bank.rates(run_of(cfg)) == pytest.approx(by_epoch(lambda e: 3.0 * min(1, (e + 1) / 10), E)), name
            assert (cfg.bank.reading, cfg.bank.initialisation, cfg.bank.momentum, cfg.bank.weight_decay) == (
                "code",
                "keys",
                0.9,
                0.0,
            )
        assert cfg.optimizer.lr == (0.03 if name.endswith("256") else 0.3) and cfg.method.temperature == 0.08


def test_adco_ends_at_the_same_rate_and_fills_at_its_own_temperature_whatever_its_bank(rows):
    """The rate ends at 0.0006 after a cosine without warm-up; it starts at 0.03 or, with 8,192 rows, at 0.04."""
    for name, cfg in of_method(rows, "adco"):
        peak, tau, bank_tau = (0.04, 0.14, 0.03) if cfg.bank.size == 8192 else (0.03, 0.12, 0.02)
        E = cfg.epochs
        rate = by_epoch(lambda e, peak=peak, E=E: 0.0006 + (peak - 0.0006) * (1 + math.cos(math.pi * e / E)) / 2, E)
        assert rates(cfg) == pytest.approx(rate), name
        assert (cfg.method.temperature, cfg.method.warm_start_temperature, cfg.bank.temperature) == (
            tau,
            tau,
            bank_tau,
        ), name
        assert (cfg.norm_groups, cfg.shuffle_keys) == (8, True), name
        assert (cfg.method.momentum, cfg.method.final_momentum, cfg.bank.lr, cfg.bank.final_lr) == (
            0.999,
            0.999,
            3.0,
            None,
        ), name
    assert {cfg.bank.size for _, cfg in of_method(rows, "adco")} == {8192, 16384, 65536}


def test_moco_s_rate_is_half_a_cosine_of_epochs_and_its_batchnorm_that_of_eight_gpus(rows):
    for name, cfg in of_method(rows, "mocov2"):
        assert (cfg.norm_groups, cfg.shuffle_keys) == (8, True), name
        E = cfg.epochs
        assert rates(cfg) == pytest.approx(by_epoch(lambda e, E=E: 0.03 * (1 + math.cos(math.pi * e / E)) / 2, E)), name


def test_simclr_warms_up_from_0_by_step(rows):
    """The rate is lr t / T_w in the warm-up, then a cosine to 0; the base rate of LARS is 0.3 x batch / 256."""
    for name, cfg in of_method(rows, "simclr"):
        peak, W, T = 0.3 * cfg.batch / 256, 10 * STEPS, cfg.epochs * STEPS
        rate = [peak * t / W if t < W else peak * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2 for t in range(T)]
        assert rates(cfg) == pytest.approx(rate, abs=1e-12), name
        assert cfg.backbone.zero_init_last and cfg.projector.initialisation == "normal_0.01", name
        assert [view.interpolation for view in cfg.augmentation.views.values()] == ["bicubic"], name


def test_caco_s_multi_crop_takes_means(rows):
    _, cfg = rows["table3/caco"]
    assert cfg.method.reduction == "mean" and instantiate(cfg.augmentation).sizes == [224] * 2 + [96] * 6
    assert all(cfg.method.reduction == "sum" for name, cfg in of_method(rows, "caco") if name != "table3/caco")
