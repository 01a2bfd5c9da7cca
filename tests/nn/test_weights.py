"""Released checkpoints of every format can start a run, and every key is checked; a file that does not fit is refused
before the first step.
"""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from released import PROJECTORS, assert_holds, copy_of, new_method, noise, released, resnet, saved, side
from tiny import TINY, compose, train

from caco.banks.fifo import FifoBank
from caco.banks.learnable import LearnableBank
from caco.checking import check_command
from caco.config import plain_values
from caco.config.composition import instantiate
from caco.engine.assembly import build_method
from caco.errors import UserError
from caco.methods.contrastive import Contrastive
from caco.methods.nnclr import NNCLR
from caco.methods.sources import BatchBothViews, OtherView
from caco.nn.backbones import timm_backbone
from caco.nn.formats import FORMATS
from caco.nn.heads import Encoder, Projector
from caco.nn.weights import initialise, load_backbone
from caco.runs.checkpoint import load
from caco.runs.identity import identity, run_hash
from caco.tracking.ledger import read_rows


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
@pytest.mark.parametrize("kind", ["caco", "adco", "moco"])
def test_a_released_file_gives_encoder_projector_twin_and_bank(tmp_path, kind, zipped):
    file = released(kind)
    method = new_method(kind, bank=FifoBank(size=32, dim=8, seed=7) if kind == "moco" else "random")
    path = saved(tmp_path / "released.pth.tar", file, _use_new_zipfile_serialization=zipped)
    told = initialise(method, path, kind)
    assert_holds(method.encoder, side(file, "encoder_q"))
    assert_holds(method.twin.encoder, side(file, "encoder_k"))
    columns = file["state_dict"]["module.queue"] if kind == "moco" else file["Memory_Bank"]["W"]
    assert torch.equal(method.bank.rows.weight, columns.T)
    if kind == "moco":
        assert method.bank.next_row == 12
    else:
        assert not method.bank.rows.velocity.any()  # the published momentum belongs to the published run
    assert told.splitlines()[-1] == f"caco: weights of {path} ({kind}): backbone, projector, twin, bank"


def test_a_twin_that_the_file_lacks_is_a_copy_of_the_encoder(tmp_path):
    file, method = released("moco", keys=False), new_method("moco")
    told = initialise(method, saved(tmp_path / "q.pth", file), "moco")
    assert_holds(method.encoder, side(file, "encoder_q"))
    assert_holds(method.twin.encoder, side(file, "encoder_q"))
    assert "twin (a copy of the encoder)" in told


def test_a_projector_of_another_shape_stays_random_in_encoder_and_twin_and_so_does_the_bank(tmp_path):
    file, method = released("adco"), new_method("caco")
    projector, rows = copy_of(method.encoder.projector), method.bank.rows.weight.clone()
    told = initialise(method, saved(tmp_path / "adco.pth", file), "adco")
    for encoder, name in ((method.encoder, "encoder_q"), (method.twin.encoder, "encoder_k")):
        backbone = {key: v for key, v in side(file, name).items() if key.startswith("backbone.")}
        assert_holds(encoder.backbone, {key.removeprefix("backbone."): v for key, v in backbone.items()})
        assert_holds(encoder.projector, projector)
    assert torch.equal(method.bank.rows.weight, rows)
    assert told.endswith("backbone, twin; as initialised: projector, bank (its projector does not fit)"), told


@pytest.mark.parametrize("bank", ["keys", LearnableBank(size=16, dim=8, seed=7, initialisation="random"), None])
def test_a_bank_that_keys_will_fill_or_of_another_size_stays_and_none_is_needed(tmp_path, bank):
    method = new_method(bank=bank)
    rows = None if bank is None else method.bank.rows.weight.clone()
    told = initialise(method, saved(tmp_path / "caco.pth", released("caco")), "caco")
    assert rows is None or torch.equal(method.bank.rows.weight, rows)
    why = {True: " (the warm start fills it)", False: " (32 x 8 there, 16 x 8 here)"}[bank == "keys"]
    assert told.endswith("projector, twin" if bank is None else f"projector, twin; as initialised: bank{why}"), told


def test_each_rank_takes_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("caco.banks.rows.distributed.shard", lambda size: (size // 2, size))
    file, method = released("caco"), new_method()
    initialise(method, saved(tmp_path / "caco.pth", file), "caco")
    assert torch.equal(method.bank.rows.weight, file["Memory_Bank"]["W"].T[16:])


def test_moco_v1s_projector_is_one_layer(tmp_path):
    file = released("moco")
    for name in [name for name in file["state_dict"] if ".fc." in name]:
        del file["state_dict"][name]
    file["state_dict"] |= {"module.encoder_q.fc.weight": torch.randn(8, 64), "module.encoder_q.fc.bias": torch.randn(8)}
    encoder = Encoder(backbone=resnet(), projector=Projector(in_dim=64, dim=8, layers=1, bias=True))
    method = Contrastive(encoder=encoder, bank=None, positives=OtherView(), negatives=BatchBothViews(), momentum=None)
    initialise(method, saved(tmp_path / "v1.pth", file), "moco")
    assert torch.equal(encoder.projector[0].weight, file["state_dict"]["module.encoder_q.fc.weight"])
    assert torch.equal(encoder.projector[0].bias, file["state_dict"]["module.encoder_q.fc.bias"])


def test_torchvisions_names_are_timms_and_its_classifier_is_left_out(tmp_path):
    theirs = noise(torchvision.models.resnet18().state_dict())
    backbone = timm_backbone(name="resnet18")
    load_backbone(saved(tmp_path / "resnet18.pth", theirs), "torchvision", backbone)
    assert_holds(backbone, {name: v for name, v in theirs.items() if not name.startswith("fc.")})
    for name in ("resnet34", "resnet50"):  # loading relies only on timm and torchvision agreeing on these
        with torch.device("meta"):
            shapes = {key: v.shape for key, v in getattr(torchvision.models, name)().state_dict().items()}
            ours = {key: v.shape for key, v in timm_backbone(name=name).state_dict().items()}
        assert {key: shape for key, shape in shapes.items() if not key.startswith("fc.")} == ours


def test_a_file_from_before_batches_were_counted_loads(tmp_path):
    old = {name: v for name, v in noise(resnet().state_dict()).items() if not name.endswith("num_batches_tracked")}
    backbone = resnet()
    load_backbone(saved(tmp_path / "old.pth", old), "torchvision", backbone)
    assert_holds(backbone, old | {name: v for name, v in resnet().state_dict().items() if name not in old})


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth", "wrapped.pth"])
def test_timm_files_load_whole_or_wrapped_by_its_training_into_any_backbone(tmp_path, name):
    options = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2}
    theirs = noise(timm.create_model("vit_tiny_patch16_224", **options).state_dict())
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(theirs, tmp_path / name)
    else:
        wrapped = {"arch": "vit", "state_dict": {f"module.{key}": v for key, v in theirs.items()}}
        saved(tmp_path / name, wrapped if name == "wrapped.pth" else theirs)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    load_backbone(tmp_path / name, "timm", backbone)
    assert_holds(backbone, {key: v for key, v in theirs.items() if not key.startswith("head.")})


def test_a_backbone_alone_starts_a_method_and_the_twin_copies_it(tmp_path):
    theirs, method = noise(resnet().state_dict()), new_method()
    projector = copy_of(method.encoder.projector)
    told = initialise(method, saved(tmp_path / "plain.pth", theirs), "timm")
    for encoder in (method.encoder, method.twin.encoder):
        assert_holds(encoder.backbone, theirs)
        assert_holds(encoder.projector, projector)
    assert told.endswith(
        "(timm): backbone, twin (a copy of the encoder); as initialised: projector, bank (the file has none)"
    )


def test_our_checkpoint_gives_all_that_learns_but_not_the_banks_momentum(tmp_path):
    source, method = new_method(), new_method()
    source.load_state_dict(noise(source.state_dict()))
    initialise(method, saved(tmp_path / "step.pt", {"step": 3, "method": source.state_dict()}), "caco")
    expected = copy_of(source)
    expected["bank.rows.velocity"].zero_()
    expected["bank.rows.uses"].zero_()
    assert_holds(method, expected)


def test_our_checkpoint_gives_a_predictor_too(tmp_path):
    def nnclr():
        encoder = Encoder(backbone=resnet(), projector=Projector(in_dim=64, **PROJECTORS["caco"]))
        return NNCLR(encoder=encoder, bank=FifoBank(size=32, dim=8, seed=7), predictor_hidden_dim=16)

    source, method = nnclr(), nnclr()
    source.load_state_dict(noise(source.state_dict()))
    initialise(method, saved(tmp_path / "step.pt", {"method": source.state_dict()}), "caco")
    assert_holds(method.predictor, copy_of(source.predictor))


def test_evaluation_takes_the_encoders_backbone_not_the_twins(tmp_path):
    file, backbone = released("caco"), resnet()
    load_backbone(saved(tmp_path / "caco.pth", file), "caco", backbone)
    expected = {n.removeprefix("backbone."): v for n, v in side(file, "encoder_q").items() if n.startswith("backbone.")}
    assert_holds(backbone, expected)


# Refusals.


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda state: state.pop("layer3.0.conv2.weight"), "1 missing (layer3.0.conv2.weight)"),
        (lambda state: state.update({"layer5.weight": torch.ones(1)}), "1 unexpected (layer5.weight)"),
        (
            lambda state: state.update({"conv1.weight": torch.ones(64, 3, 3, 3)}),
            "1 of another shape (conv1.weight (64, 3, 3, 3) for (64, 3, 7, 7))",
        ),
    ],
)
def test_another_architecture_is_refused_with_the_keys_and_leaves_the_method_as_it_was(tmp_path, change, expected):
    state, method = noise(resnet().state_dict()), new_method()
    change(state)
    before = copy_of(method)
    with pytest.raises(ValueError) as refusal:
        initialise(method, saved(tmp_path / "other.pth", state), "torchvision")
    assert expected in str(refusal.value)
    assert_holds(method, before)


def test_of_many_keys_that_do_not_fit_the_first_are_named_and_all_counted(tmp_path):
    path = saved(tmp_path / "deeper.pth", resnet(blocks=(3, 4, 6, 3)).state_dict())
    extra = len(resnet(blocks=(3, 4, 6, 3)).state_dict()) - len(resnet().state_dict())
    with pytest.raises(ValueError, match=rf"keys: {extra} unexpected \(layer1.2.conv1.weight, [^,]*, [^,]*, \.\.\.\)$"):
        load_backbone(path, "timm", resnet())


OWN = {"method": {f"encoder.backbone.{name}": value for name, value in resnet().state_dict().items()}}


@pytest.mark.parametrize(
    "content, format, expected",
    [
        (released("moco"), "timm", "look like format=caco or format=adco or format=moco"),
        (released("moco"), "torchvision", "look like format=caco or format=adco or format=moco"),
        (OWN, "moco", "look like format=caco "),
        (OWN, "timm", "look like format=caco "),
        (resnet().state_dict(), "caco", "look like format=torchvision or format=timm"),
        (resnet().state_dict(), "adco", "look like format=torchvision or format=timm"),
        ({"epoch": 3, "arch": "resnet50"}, "moco", "expected a network's state_dict; got epoch, arch"),
        (torch.ones(3), "moco", "expected a network's state_dict; got Tensor"),
        (OWN, "moco3", "expected one of caco, adco, moco, torchvision, timm, "),
        (OWN, "moco:key", "or one of them followed by :online or :twin; got 'moco:key'"),
    ],
)
def test_another_format_is_refused_with_what_the_keys_look_like(tmp_path, content, format, expected):
    with pytest.raises(ValueError) as refusal:
        load_backbone(saved(tmp_path / "file.pth", content), format, resnet())
    assert expected in str(refusal.value)


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Code.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run_and_named(tmp_path, zipped):
    Code.mark = tmp_path / "ran"
    path = saved(tmp_path / "file.pth", {"state_dict": {}, "x": Code()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"of which nothing is ever run; it asks for \w+\.mkdir$"):
        load_backbone(path, "moco", resnet())
    assert not Code.mark.exists()


def test_damaged_files_are_refused_whatever_torch_makes_of_them(tmp_path):
    path = tmp_path / "file.pth"
    whole = {}
    for zipped in (True, False):
        torch.save({"conv1.weight": torch.full((4,), 7.0)}, path, _use_new_zipfile_serialization=zipped)
        whole[zipped] = path.read_bytes()
    flipped = bytearray(whole[True])
    # one bit of a value, which only a checksum can reveal
    flipped[whole[True].index(torch.tensor(7.0).numpy().tobytes())] = 1
    for content in [
        b"",
        b"<html>404</html>",
        b"}",
        bytes(flipped),
        *(data[: len(data) // 2] for data in whole.values()),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="of which nothing is ever run"):
            load_backbone(path, "timm", resnet())
    (tmp_path / "file.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="of another kind, or damaged"):
        load_backbone(tmp_path / "file.safetensors", "timm", resnet())


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data/0", "w") as part,
    ):
        for _ in range(200):
            part.write(bytes(2**20))
    begun = time.process_time()
    with pytest.raises(UserError, match=r"would unpack to 209,715,200 bytes and is no file of torch\.save"):
        load_backbone(path, "moco", resnet())
    assert time.process_time() - begun < 1


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_backbone(tmp_path / "none.pth", "moco", resnet())


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["weights=none.pth", "format=moco"], "weights: expected a file that exists and can be read, got 'none.pth'"),
        (
            ["weights={file}", "format=moco3"],
            "format: expected null, to detect the format from the keys of weights={file}, or one of caco, adco, moco, ",
        ),
        (["weights={file}", "format=moco:key"], "optionally followed by :online or :twin, got 'moco:key'"),
        (["format=moco"], "format: expected null, because no weights=FILE is given, got 'moco'"),
        (
            ["weights_digest=0123"],
            "weights_digest: expected this key left out; it follows from weights=FILE, got '0123'",
        ),
    ],
)
def test_weights_and_format_go_together_and_are_checked_before_anything_starts(tmp_path, overrides, expected):
    file = tmp_path / "file.pth"
    file.write_bytes(b"1")
    with pytest.raises(UserError) as refusal:
        check_command([*TINY, *(item.format(file=file) for item in overrides)], multirun=False)
    assert expected.format(file=file) in str(refusal.value)


def test_the_early_check_knows_the_formats_that_can_be_read():
    assert set(plain_values.FORMATS) == set(FORMATS)


# Runs.

FROM = ["bank_learning.initialisation=random", "max_steps=4", "eval=[]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The checkpoint of a run of a few steps."""
    run_dir = tmp_path_factory.mktemp("source")
    train(run_dir, *FROM)
    return run_dir / "checkpoints" / "step_000000004.pt"


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir / "ledger.jsonl")[0] if row["kind"] == "train"]


def test_the_first_loss_is_that_of_the_sources_networks_and_a_resumed_run_leaves_the_file_alone(
    tmp_path, source, monkeypatch, capsys
):
    start = [*FROM, f"weights={source}", "format=caco", "seed=1", "checkpoint.every_steps=2"]
    train(tmp_path, *start)
    assert "backbone, projector, twin, bank" in capsys.readouterr().err

    cfg = compose(*start)
    splits, views = instantiate(cfg.data), instantiate(cfg.augmentation)
    loader = instantiate(cfg.loader).bind(splits.pretrain, views, batch=cfg.batch, seed=1, rank=0, world=1)
    images = [view.contiguous(memory_format=torch.channels_last) for view in next(iter(loader.epoch(0))).views]
    random, method = build_method(cfg), build_method(cfg)
    method.load_state_dict(load(source)["method"])
    for each in (random, method):
        each.to(memory_format=torch.channels_last).twin.update(each.encoder, 0.99)
    first = losses(tmp_path)[0]
    assert first == method.loss(images).loss.item() != random.loss(images).loss.item()

    last = tmp_path / "checkpoints" / "step_000000004.pt"
    whole = load(last)["method"]
    last.unlink()
    monkeypatch.setattr("caco.nn.weights.initialise", lambda *_: pytest.fail("loaded the weights a second time"))
    train(tmp_path, *start)
    resumed = load(last)["method"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_runs_identity_is_the_content_of_its_file_and_not_where_it_lies(tmp_path):
    cfg = compose("format=caco")

    def identity(name: str) -> str:
        cfg.weights = str(tmp_path / name)
        return run_hash(cfg)

    for name, content in {"a.pt": b"one", "b.pt": b"one", "c.pt": b"two"}.items():
        (tmp_path / name).write_bytes(content)
    assert identity("a.pt") == identity("b.pt")
    assert identity("a.pt") != identity("c.pt")
    first = identity("a.pt")
    (tmp_path / "a.pt").write_bytes(b"three")
    assert identity("a.pt") != first


def test_a_run_without_weights_is_the_run_that_it_was_before_there_were_any():
    assert not {"weights", "format", "weights_digest"} & identity(compose()).keys()


def test_the_check_reads_no_torch(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    command = [f"weights={tmp_path / 'a.pt'}", "format=caco", "preset=demo"]
    code = f"import sys; from caco.checking import check_command; check_command({command}, multirun=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0
