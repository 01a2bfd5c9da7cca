"""The figures of caco.plan agree with real runs (counted tensors, operations and steps) and with arithmetic by hand."""

import pytest
import torch
from tiny import OF_PATCHES, batch_of, compose, noise, now, train
from torch.utils.flop_counter import FlopCounterMode

from caco import plan
from caco.config import composition
from caco.config.composition import instantiate
from caco.engine import assembly
from caco.evals.dense.segment import FCN16


def test_steps_are_those_of_the_run(tmp_path):
    summary = train(tmp_path, "max_steps=30", "epochs=1")
    planned = plan.plan(compose("max_steps=30", "epochs=1"))
    # two steps of warm start fill 128 rows; 1400 // 64 steps follow
    assert planned["steps"] == summary["steps"] == 2 + 21
    assert planned["warm_start_steps"] == 2
    assert plan.plan(compose("max_steps=7"))["steps"] == 7


@pytest.mark.parametrize(
    "overrides", [[], ["method=nnclr", "augmentation=digits", "projector=small", "projector.dim=8"]]
)
def test_operations_are_torch_s_count(overrides):
    """The model's operations are counted in a real step; those of the bank are computed by hand in a test below."""
    cfg = compose(*overrides, "batch=8")
    method = assembly.build_method(cfg).train()
    views = [torch.randn(8, 3, size, size) for size in instantiate(cfg.augmentation).sizes]
    with FlopCounterMode(display=False) as counter:
        q, _, _, _ = method.encode(views)
        q = {v: method.predictor(z) for v, z in q.items()} if overrides else q
        sum(view.sum() for view in q.values()).backward()
    planned = plan.plan(cfg)
    in_batch = 3 * 2 * 8 * 8 * 8 * 2 if overrides else 0
    assert planned["model_flops_per_step"] - in_batch == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov3", "barlow", "vicreg"])
def test_operations_of_a_whole_step_are_torch_s_count(method):
    narrow = [] if method in ("barlow", "vicreg") else ["method.predictor_hidden_dim=16"]
    cfg = compose(
        f"method={method}", "augmentation=digits", "projector=small", "projector.dim=8", "batch=8", *narrow, bank=False
    )
    built = assembly.build_method(cfg).train()
    views = [torch.randn(8, 3, size, size) for size in instantiate(cfg.augmentation).sizes]
    with FlopCounterMode(display=False) as counter:
        built(batch_of(views), now()).loss.backward()
    assert plan.plan(cfg)["model_flops_per_step"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert plan.plan(cfg)["bank_flops_per_step"] == 0


@pytest.mark.parametrize("method", ["infomin", "cpcv2"])
def test_operations_of_patches_are_torch_s_count(method):
    """InfoMin with negatives from the batch, so that no bank is involved."""
    cfg = compose(f"method={method}", *OF_PATCHES[method], "projector=small", "projector.dim=8", "batch=8", bank=False)
    if method == "infomin":
        cfg.bank, cfg.method.negatives = None, {"_target_": "caco.methods.sources.BatchKeys"}
    built = assembly.build_method(cfg).train()
    views, patches = noise(cfg, 8, torch.Generator().manual_seed(0))
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in built.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = built(batch_of(views, patches=patches), now()).loss
        loss.backward()
    planned = plan.plan(cfg)
    assert planned["model_flops_per_step"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    held = 4 * (sum(view.numel() for view in views) + patches.numel()) + sum(
        storage.nbytes() for storage in kept.values()
    )
    assert planned["activation_bytes"] == pytest.approx(held, rel=0.1)
    learned = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert planned["parameter_bytes"] >= 3 * 4 * learned


def test_matrices_of_the_embedding_are_counted_with_their_memory_and_messages():
    """Barlow Twins at the published width has one product of 2 B D D operations, three with its gradients, and a matrix
    of 4 D D bytes that ranks must sum.
    """
    cfg = composition.job_config(composition.compose(["method=barlow", "batch=2048"]))
    wide, narrow = (plan.plan(cfg, world=world) for world in (16, 1))
    assert wide["sent_bytes_per_step"] > 2 * 15 / 16 * 4 * 8192**2
    encoders = plan.plan(
        composition.job_config(composition.compose(["method=simsiam", "projector=barlow", "batch=2048"]))
    )
    matrices = narrow["model_flops_per_step"] - encoders["model_flops_per_step"]
    predictor = 2048 * 2 * 3 * 2 * 2 * 8192 * 512  # SimSiam's predictor, for two views
    assert matrices + predictor == pytest.approx(3 * 2 * 2048 * 8192**2, rel=1e-6)


def test_the_bank_s_share_by_hand():
    """Each of two directions has five products of 2 N K D operations: one to choose positives, two for loss and
    queries, two for the rows.
    """
    planned = plan.plan(compose("bank.size=128"), world=4)
    assert planned["bank_flops_per_step"] == 2 * 5 * 2 * 64 * 128 * 8
    assert planned["flops_per_step"] == planned["bank_flops_per_step"] + planned["model_flops_per_step"]
    assert planned["bank_bytes"] == 128 / 4 * (8 * 4 * 2 + 8)  # row, velocity and count of uses


def test_kept_probabilities_by_hand():
    """They take one of five products and add four bytes for each of two directions' queries and each row of a device;
    the plan says where that holds.
    """
    plain, kept = (compose("bank.size=128", f"bank.keep_probabilities={keep}") for keep in ("false", "true"))
    computed, planned = (plan.plan(cfg, world=4) for cfg in (plain, kept))
    assert planned["bank_flops_per_step"] == 2 * 4 * 2 * 64 * 128 * 8
    assert planned["workspace_bytes"] - computed["workspace_bytes"] == 2 * 64 * 128 // 4 * 4
    said = "kept by the compiled kernel on a CPU without AMX tiles"
    told = [plan.report(cfg, world=4, images=None, speeds={}) for cfg in (kept, plain)]
    assert said in told[0] and said not in told[1]


def test_treatments_of_negatives_by_hand():
    """Hard negatives take two sums, so twice the products for loss and rows; a margin takes one. Mixing searches once
    more for the hardest rows, and has a column for each negative that it makes, with products forward and backward.
    """
    unit, plain = 2 * 64 * 8, plan.plan(compose("bank.size=128"), world=2)
    hard, margin = (plan.plan(compose("bank.size=128", f"negatives={name}"), world=2) for name in ("hard", "margin"))
    assert (
        hard["bank_flops_per_step"] == 2 * 9 * unit * 128
        and margin["bank_flops_per_step"] == plain["bank_flops_per_step"]
    )
    settings = ["negatives=mixed", "negatives.hardest=16", "negatives.pairs=8", "negatives.with_query=4"]
    mixed = plan.plan(compose("bank.size=128", *settings), world=2)
    assert mixed["bank_flops_per_step"] == 2 * 6 * unit * 128
    assert mixed["model_flops_per_step"] - plain["model_flops_per_step"] == 3 * unit * 12 * 2
    assert mixed["activation_bytes"] - plain["activation_bytes"] == 3 * 4 * 32 * 12 * 2
    found_and_fetched = 2 * (
        128 * 16 * 12 + 4 * 8 * 128
    )  # two directions of 64 queries; more rows are drawn than exist
    assert mixed["workspace_bytes"] - plain["workspace_bytes"] == found_and_fetched
    queries, candidates, places, rows = 64 * 32, 64 * 12 * 16, 64 * 8 * 20, 2 * 4 * 8 * 128
    assert (
        mixed["sent_bytes_per_step"] - plain["sent_bytes_per_step"]
        == (2 * (queries + 64 * 8 + candidates + places) + rows) / 2
    )
    far = plan.plan(compose("bank.size=100000000", *settings), world=2)
    assert far["sent_bytes_per_step"] < plain["sent_bytes_per_step"] + 1e6, "the bytes sent must not grow with the bank"


@pytest.mark.parametrize(
    ("overrides", "streams"),
    [(["negatives=hard"], True), (["negatives=mixed"], False), (["pn=negative", "negatives=hard"], False)],
)
def test_the_report_says_where_no_kernel_serves(overrides, streams):
    told = plan.report(compose(*overrides), world=1, images=None, speeds={})
    assert ("the bank's passes    in PyTorch, block by block" in told) == streams


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_parameters_and_checkpoint_are_those_of_the_run(tmp_path, optimizer):
    overrides = [f"optimizer={optimizer}", "max_steps=1", "eval=[]", "optimizer.lr=0.01"]
    train(tmp_path, *overrides)
    planned = plan.plan(compose(*overrides))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    assert checkpoint.stat().st_size == pytest.approx(
        planned["checkpoint_bytes"], rel=0.25
    )  # the file also has names and zip records
    cfg = compose(*overrides)
    method = assembly.build_method(cfg)
    bytes_of = {name: sum(p.nbytes for p in part.parameters()) for name, part in method.named_children()}
    states = {"sgd": 1, "lars": 1, "adamw": 2}[optimizer]
    buffers = sum(b.nbytes for name, b in method.named_buffers() if not name.startswith("bank."))
    by_hand = (2 + states) * bytes_of["encoder"] + bytes_of["twin"] + buffers
    assert planned["parameter_bytes"] == pytest.approx(by_hand, rel=0.01)


def test_what_the_backward_pass_keeps_is_what_torch_keeps():
    cfg = compose("batch=32")
    encoder = assembly.build_encoder(cfg).train()
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = [encoder(torch.randn(32, 3, 16, 16)) for _ in range(2)]
    assert len(outputs) == 2
    views = 2 * 4 * 3 * 16 * 16 * 32
    expected = plan.plan(cfg)["activation_bytes"] - views
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=0.05)


def test_more_devices_take_less_memory_and_no_message_grows_with_the_bank():
    few, many = (plan.plan(compose("bank.size=1024"), world=world) for world in (2, 8))
    assert many["device_bytes"] < few["device_bytes"]
    large = plan.plan(compose("bank.size=100000000"), world=8)
    assert large["sent_bytes_per_step"] == many["sent_bytes_per_step"]
    assert large["bank_bytes"] == 100_000_000 / 8 * 72
    assert plan.plan(compose(), world=1)["sent_bytes_per_step"] == 0


def test_a_bank_by_image_has_as_many_rows_as_images_and_a_query_meets_those_that_are_drawn():
    """ImageNet on 8 devices has 1,281,167 / 8 rows of 128 numbers and a count per device, and two products with each of
    4,096 drawn rows.
    """
    cfg = composition.job_config(composition.compose(["method=instdisc", "batch=256"]))
    planned = plan.plan(cfg, world=8)
    assert planned["bank_bytes"] == 160_146 * (128 * 4 + 8)
    assert planned["bank_flops_per_step"] == 2 * 2 * 256 * 4096 * 128
    assert planned["checkpoint_bytes"] > 1_281_167 * 128 * 4
    all_rows = ["method=instdisc", "batch=256", "method.loss=softmax", "method.num_noise=null"]
    everything = composition.job_config(composition.compose(all_rows))
    assert plan.plan(everything, world=8)["bank_flops_per_step"] == 2 * 2 * 256 * 1_281_167 * 128
    assert plan.plan(cfg, images=10_000_000)["bank_bytes"] == 10_000_000 * 520
    learned = plan.plan(composition.job_config(composition.compose(["method=pic", "batch=512"])), world=8)
    assert learned["bank_bytes"] == 160_146 * (2 * 128 * 4 + 8), "PIC's class weights need memory for a velocity"
    assert learned["bank_flops_per_step"] == 2 * 4 * 512 * 1_281_167 * 128
    told = plan.report(cfg, world=8, images=None, speeds={})
    assert "images, rows" in told and "\n   1,281,167 " in told and "\n 100,000,000 " in told


def test_time_is_operations_over_speed_and_bytes_over_bandwidth():
    cfg = compose()
    slow, fast = (
        plan.plan(cfg, world=2, tflops=1, gbytes_per_s=1e9),
        plan.plan(cfg, world=2, tflops=2, gbytes_per_s=1e9),
    )
    assert slow["step_seconds"] == pytest.approx(slow["flops_per_step"] / 2 / 1e12)
    assert slow["step_seconds"] == pytest.approx(2 * fast["step_seconds"])
    sending = plan.plan(cfg, world=2, tflops=1e9, gbytes_per_s=1)
    assert sending["step_seconds"] == pytest.approx(sending["sent_bytes_per_step"] / 1e9, rel=1e-3)
    assert sending["run_hours"] == pytest.approx(sending["steps"] * sending["step_seconds"] / 3600)


def test_the_paper_s_run_without_its_data():
    """ResNet-50 at 224 px takes 4.09 G multiply-adds; two queries go forward and backward, two keys forward."""
    cfg = composition.job_config(composition.compose(["batch=4096", "bank=12M"]))
    planned = plan.plan(cfg, world=32)
    assert planned["steps"] == 24 + 200 * (1_281_167 // 4096)
    assert planned["model_flops_per_step"] == pytest.approx(4096 * 2 * 4 * 2 * 4.1e9, rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["batch=64"], {"world": 3}, "multiple of the 3 processes that share it, got 64"),
        (["bank.size=3"], {"world": 4}, "a bank of 3 rows cannot be shared by 4 ranks: expected at least one row each"),
        (["norm_groups=2"], {"world": 4}, "^norm_groups: expected 1, rank, or a multiple of the 4 processes"),
        (["batch=2048"], {}, "at most the 1400 images, got 2048"),
        ([], {"tflops": 0}, "must be finite and positive; got 1, 0, 0 and"),
        ([], {"tflops": float("nan")}, "must be finite and positive; got 1, nan, nan and"),
        ([], {"images": -1}, "images: expected at least 1, got -1"),
        (["data=folder"], {}, "give images=N, or data.root=PATH"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides, options, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(compose(*overrides), **options)


def test_the_command_tells_and_refuses(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan", "preset=demo", "world=2", "tflops=0.1"])
    plan.main()
    told = capsys.readouterr().out
    assert "2,320 steps of 64 images on 2 devices (640 of them, 28 %, warm start), 32 images each" in told
    assert "100,000,000" in told and "tflops=0.1" in told
    monkeypatch.setattr("sys.argv", ["plan", "preset=demo", "world=two"])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 2 and capsys.readouterr().err == "caco: world: expected a number, got 'two'\n"


def test_evaluations_that_fine_tune_say_what_they_will_take():
    """The expected time is the number of images in the settings, times the operations counted in one real step, divided
    by the assumed speed.
    """
    cfg = compose(
        "eval=[knn,segment,dense_linear]", "eval.segment.images=8", "eval.segment.crop=65", "eval.dense_linear.size=64"
    )
    lines = plan.evaluations(cfg, world=2, tflops=1e-3, measured=True)
    beginnings = (
        "segment_fcn16_images-8_crop-65: crops of 65 px to train on: 480,000 of ",
        "segment_fcn16_images-8_crop-65: images to test on: 1,449 of ",
        "dense_linear_size-64: images of 64 px to take features of: 12,031 of ",
    )
    assert all(line.startswith(beginning) for line, beginning in zip(lines, beginnings, strict=True))
    network = FCN16(instantiate(cfg.backbone), channels=256, seed=0)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, 65, 65)).sum().backward()
    work, _ = instantiate(cfg.eval.segment).work(lambda: instantiate(cfg.backbone))
    assert work.flops == pytest.approx(counter.get_total_flops() / 2) and work.images == 480_000
    hours = 480_000 * work.flops / (2 * 1e9) / 3600
    assert f"GFLOP, an estimated {hours:.3g} hours at 0.001 TFLOP/s; one takes " in lines[0] and all(
        line.endswith(" hours") for line in lines
    )
    assert plan.evaluations(compose("eval=[knn]"), world=1, tflops=1.0, measured=True) == []
