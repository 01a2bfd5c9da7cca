"""Images with the numbers that their files store (data.channels=N): they are read without loss, their mean and
deviation are measured, and a view depends only on (seed, epoch, image, view).
"""

import json
import signal

import numpy as np
import pytest
import torch
from interrupted import train_killed
from PIL import Image
from processes import Process, caco_train
from scipy import ndimage
from test_trainer import assert_same, final, record
from tiny import TINY

import caco
from caco import distributed
from caco.config.composition import compose, job_config
from caco.config.validation import check
from caco.data.loaders.batches import mixed_seed
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.sets.reading import UnreadableImage
from caco.data.sets.statistics import mean_and_std
from caco.data.sets.stored import read_stored, shown, stored
from caco.data.views import channels
from caco.data.views.augmentation import View, Views
from caco.data.views.channels import ChannelViews
from caco.data.views.draws import uniforms
from caco.engine.channels import backbone_of
from caco.errors import UserError
from caco.runs.identity import identity

RNG = np.random.default_rng(0)
STEPS_16 = RNG.integers(0, 65536, (9, 7, 5), dtype=np.uint16)


def as_tiff(array, path, **options):
    import tifffile

    tifffile.imwrite(path, array, **options)


def wave(seed, count, size=12):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    return np.stack(
        [np.sin(6 * x * (c + 1)) * (c + 1) + 0.1 * rng.standard_normal((size, size)) for c in range(count)], 2
    ).astype(np.float32)


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    """A labelled folder of float32 .npy files with five channels."""
    root = tmp_path_factory.mktemp("spectra")
    for split, count in (("train", 10), ("test", 4)):
        for label in range(2):
            (root / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                np.save(root / split / f"c{label}" / f"{i}.npy", wave(100 * label + i + 7 * count, 5) + label)
    return root


@pytest.mark.parametrize(
    ("name", "array", "write"),
    [
        ("grey of 16 bits.png", STEPS_16[:, :, 0], lambda array, path: Image.fromarray(array).save(path)),
        (
            "grey of 8 bits.png",
            (STEPS_16[:, :, 0] >> 8).astype(np.uint8),
            lambda array, path: Image.fromarray(array).save(path),
        ),
        (
            "with alpha.png",
            (STEPS_16[:, :, :4] >> 8).astype(np.uint8),
            lambda array, path: Image.fromarray(array).save(path),
        ),
        ("five of 16 bits.tif", STEPS_16, lambda array, path: as_tiff(array, path, planarconfig="contig")),
        (
            "five planes.tif",
            STEPS_16,
            lambda array, path: as_tiff(
                array.transpose(2, 0, 1).copy(), path, planarconfig="separate", photometric="minisblack"
            ),
        ),
        ("deflated.tif", STEPS_16[:, :, 0], lambda array, path: as_tiff(array, path, compression="zlib")),
        ("floats.tif", wave(0, 2), lambda array, path: as_tiff(array, path, planarconfig="contig")),
        ("signed.tif", STEPS_16.astype(np.int16), lambda array, path: as_tiff(array, path, planarconfig="contig")),
        ("big-endian.tif", STEPS_16[:, :, 0], lambda array, path: as_tiff(array, path, byteorder=">")),
        ("doubles.npy", wave(1, 9).astype(np.float64), lambda array, path: np.save(path, array)),
        ("one channel.npy", wave(1, 1)[:, :, 0], lambda array, path: np.save(path, array)),
    ],
)
def test_every_number_of_a_file_is_read_as_it_is_stored(tmp_path, name, array, write):
    write(array, tmp_path / name)
    expected = array if array.ndim == 3 else array[:, :, None]
    read = read_stored(tmp_path / name, expected.shape[2])
    assert read.dtype == expected.dtype
    assert np.array_equal(read, expected)


def test_a_png_of_16_bits_and_several_channels_keeps_all_of_them(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="an extra, `channels`, that make setup does not install")
    (tmp_path / "colours.png").write_bytes(imagecodecs.png_encode(STEPS_16[:, :, :3].copy()))
    assert np.array_equal(read_stored(tmp_path / "colours.png", 3), STEPS_16[:, :, :3])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (np.array([[[np.nan]]]), "numbers which are not finite"),
        (np.zeros((4, 4, 3)), "one of 3 channels where data.channels=1"),
        (np.zeros((2, 4, 4, 1)), r"an array of shape \[2, 4, 4, 1\]"),
        (np.array([["a"]]), "type <U1"),
        (np.array([[None]], dtype=object), "ValueError"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(tmp_path, content, expected):
    np.save(tmp_path / "odd.npy", content)
    with pytest.raises(UnreadableImage, match=f"odd.npy: expected an image that can be read, got .*{expected}"):
        read_stored(tmp_path / "odd.npy", 1)


def test_a_damaged_file_is_refused_by_its_name():
    as_npy = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (90000, 90000, 9), }"
    for content in (b"\x93NUMPY", b"II*\0", b"\x89PNG\r\n\x1a\n" + bytes(30), as_npy.ljust(128) + b"\n"):
        with pytest.raises(UnreadableImage, match="^here: expected an image that can be read"):
            stored(content, "here", 1)


def test_unsigned_numbers_count_as_0_to_1_and_others_as_they_are():
    assert channels.numbers(np.array([0, 255], np.uint8)).tolist() == [0, 1]
    assert channels.numbers(np.array([0, 65535], np.uint16)).tolist() == [0, 1]
    assert channels.numbers(np.array([-3, 7], np.int16)).tolist() == [-3, 7]
    assert channels.numbers(np.array([-0.5, 300.0])).tolist() == [-0.5, 300]


@pytest.mark.parametrize("seed", range(5))
def test_views_of_three_channels_are_those_of_the_photograph_to_its_rounding(seed):
    """Draws, crops, resampling, rotations and flips are the same; but photographs are rounded to 8 bits after each
    step, and floats are not.
    """
    pixels = ndimage.gaussian_filter(np.random.default_rng(seed).integers(0, 256, (40, 50, 3)).astype(float), (2, 2, 0))
    image = np.clip(128 + 4 * (pixels - 128), 30, 225).round().astype(np.uint8)
    view = View(rotate=10, shift=0.1, jitter=[0.1, 0.1, 0.1, 0.0], jitter_p=1.0, gray_p=0.5, blur_p=0.0, flip_p=0.5)
    u = uniforms(mixed_seed(seed, 0), np.array([3]), 0)[0].tolist()
    photograph = np.asarray(view.draw(Image.fromarray(image), 24, u)) / 255
    assert np.abs(channels.draw(view, channels.numbers(image), 24, u) - photograph).max() < 5 / 255


def test_brightness_contrast_and_solarization_by_hand():
    image = np.array([[[0.0, 10.0], [4.0, 30.0]]], np.float32).repeat(2, 0)  # two channels, means 2 and 20
    u = [0.0] * 39
    whole = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip_p": 0.0, "gray_p": 1.0}
    u[35], u[36] = 1.0, 0.0  # brightness 1 + 0.5, contrast 1 - 0.5
    u[31:35] = [0.0, 0.1, 0.2, 0.3]  # the order of the steps
    made = channels.draw(View(**whole, jitter=[0.5, 0.5, 0.9, 0.5], jitter_p=1.0), image, 2, u)
    assert np.allclose(made[0], [[1.5, 22.5], [4.5, 37.5]])  # times 1.5, then half way to the means 3 and 30
    made = channels.draw(View(**whole, jitter_p=0.0, solarize_p=1.0), image, 2, u)
    assert made[0].tolist() == [[0, 10], [0, 10]]  # values in the upper half of each channel's range are inverted


def test_a_view_depends_on_seed_epoch_image_and_view_alone(spectra):
    source = folder(root=str(spectra), channels=5, in_memory_mb=0).pretrain
    held = folder(root=str(spectra), channels=5).pretrain
    views = ChannelViews(recipe(), mean=[0.5] * 5, std=[2.0] * 5)
    made = {}
    for name, images, batch, workers in (("one", source, 20, 0), ("four", source, 4, 2), ("memory", held, 5, 2)):
        loader = TorchLoader(num_workers=workers).bind(images, views, batch=batch, seed=1)
        batches = list(loader.epoch(3))
        made[name] = [
            torch.cat([one.views[v].clone() for one in batches])[torch.cat([one.index for one in batches]).argsort()]
            for v in range(3)
        ]
        loader.close()
    for v in range(3):
        assert made["one"][v].shape == (20, 5, 8 if v < 2 else 6, 8 if v < 2 else 6)
        assert torch.equal(made["one"][v], made["four"][v]) and torch.equal(made["one"][v], made["memory"][v])
    assert not torch.equal(made["one"][0], made["one"][1])


def recipe(**settings):
    views = {"two": View(count=2, blur_p=0.5, solarize_p=0.5, **settings), "small": View(size=6)}
    return Views(size=8, views=views, mean=[0.5] * 3, std=[0.2] * 3)


def test_an_image_that_cannot_be_read_is_stood_in_for_as_a_photograph_is(spectra, tmp_path):
    np.save(tmp_path / "a.npy", wave(0, 5))
    np.save(tmp_path / "b.npy", wave(0, 4))
    source = folder(root=str(tmp_path), channels=5).pretrain
    views = ChannelViews(recipe(), mean=[0.0] * 5, std=[1.0] * 5)
    (batch,) = TorchLoader(num_workers=0, corrupt="skip").bind(source, views, batch=2, seed=0).epoch(0)
    assert batch.index.tolist() == [0, 0]
    with pytest.raises(UnreadableImage, match="b.npy"):
        TorchLoader(num_workers=0).bind(source, views, batch=2, seed=0)


def test_mean_and_deviation_are_those_of_all_pixels_on_any_number_of_ranks(spectra, monkeypatch):
    source = folder(root=str(spectra), channels=5).pretrain
    every = np.concatenate([source.pixels(i).astype(np.float64).reshape(-1, 5) for i in range(len(source))])
    mean, std = mean_and_std(source)
    assert np.allclose(mean, every.mean(0), rtol=1e-6) and np.allclose(std, every.std(0), rtol=1e-6)

    shares = {}

    def together(work):
        shares[distributed.rank()] = work()
        return [shares.get(rank, []) for rank in range(3)]

    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(distributed, "together", together)
    for rank in (1, 2, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        if rank:
            with pytest.raises(IndexError):
                mean_and_std(source)  # so far only one of the others was called
    assert mean_and_std(source) == (mean, std)


def test_a_channel_that_is_the_same_everywhere_has_a_deviation_of_1(tmp_path):
    for i in range(3):
        image = np.full((4, 4, 2), 255, np.uint8)
        image[:, :, 0] = RNG.integers(0, 256, (4, 4))
        np.save(tmp_path / f"{i}.npy", image)
    mean, std = mean_and_std(folder(root=str(tmp_path), channels=2).pretrain)
    assert (mean[1], std[1]) == (1.0, 1.0) and std[0] < 0.5


def test_statistics_that_do_not_fit_the_channels_are_refused(spectra):
    for settings in (
        {"channels": 5, "mean": [0.5] * 5},
        {"channels": 5, "mean": [0.5], "std": [1.0]},
        {"mean": [0.5] * 3, "std": [1.0] * 3},
    ):
        with pytest.raises(UserError, match="data.mean and data.std: expected both"):
            folder(root=str(spectra), **settings)


def test_npy_files_without_the_setting_are_named_with_it(spectra):
    with pytest.raises(UserError, match="there are .npy files: say how many channels these have, data.channels=N"):
        folder(root=str(spectra))


def test_people_are_shown_a_picture():
    picture = np.asarray(shown(wave(0, 5)))
    assert picture.dtype == np.uint8 and picture.shape == (12, 12, 3) and (picture.min(), picture.max()) == (0, 255)


def test_the_setting_is_no_part_of_the_identity_of_a_run_of_photographs():
    names = identity(job_config(compose(["data=folder", "data.root=/nowhere"])))
    assert not {"data.channels", "data.mean", "data.std"} & names.keys()
    assert identity(job_config(compose(["data=folder", "data.root=/nowhere", "data.channels=4"])))["data.channels"] == 4


BASE = ["data=folder", "data.root=/nowhere", "data.channels=4", "tracking=ledger"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["augmentation.views.first.gray_p=0.2"],
            r"augmentation.views.first.gray_p: images of 4 channels have no hue, saturation or grey",
        ),
        (
            ["augmentation.views.first.jitter=[0.4,0.4,0.2,0.1]"],
            "augmentation.views.first.jitter: images of 4 channels have no hue",
        ),
        (
            ["augmentation.mean=[0.5,0.5,0.5]"],
            "augmentation.mean: applies to photographs only; with data.channels=4 set data.mean",
        ),
        (["augmentation=infomin", "method=infomin"], "~augmentation.views.both.then"),
        (["augmentation=cmc", "method=cmc"], "augmentation.colours: expected rgb with data.channels=4"),
        (["eval=[transfer]", "eval.transfer.root=/nowhere"], "eval.transfer: this evaluator reads its own photographs"),
        (["backbone.in_channels=4"], "in_channels"),
    ],
)
def test_what_needs_red_green_and_blue_is_refused_before_anything_is_read(overrides, expected):
    cfg = None
    with pytest.raises(Exception, match=expected):  # noqa: B017 - Hydra's own error for an unknown key
        cfg = compose([*BASE, *overrides])
        check(job_config(cfg), overrides=[*BASE, *overrides], choices=dict(cfg.hydra.runtime.choices))


def test_what_stays_of_a_recipe_is_not_refused():
    overrides = [
        *BASE,
        "augmentation.views.first.gray_p=0",
        "augmentation.views.first.jitter=[0.4,0.4,0,0]",
        "~augmentation.views.second",
    ]
    cfg = compose(overrides)
    check(job_config(cfg), overrides=overrides, choices=dict(cfg.hydra.runtime.choices))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "name",
    [
        "resnet18_cifar",
        "small_resnet",
        *(pytest.param(name, marks=LONG) for name in ("resnet18", "vit_small", "mocov3_vit_small", "resnet50_preact")),
    ],
)
def test_the_first_layer_follows(name):
    node = job_config(compose([f"backbone={name}"])).backbone
    with torch.device("meta"):
        network = backbone_of(node, 7)
        first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        assert first.in_channels == 7
        assert network.eval()(torch.empty(2, 7, 224, 224)).shape == (2, network.num_features)


def torchvision_resnet():
    from torchvision.models import resnet18

    network = resnet18(num_classes=1)
    network.fc, network.num_features = torch.nn.Identity(), 512
    return network


def test_the_first_layer_of_a_network_of_ones_own_follows_too():
    network = backbone_of({"_target_": f"{__name__}.torchvision_resnet"}, 2)
    assert network.conv1.in_channels == 2 and network(torch.zeros(2, 2, 32, 32)).shape == (2, 512)


RUN = [
    *(item for item in TINY if not item.startswith(("data=", "augmentation=", "batch=", "eval="))),
    "data=folder", "data.channels=5", "augmentation=cifar", "augmentation.size=16", "batch=10", "bank.size=20",
    "eval=[knn,probe]", "eval.knn.k=2",
]  # fmt: skip


def test_a_run_notes_what_it_measured_and_is_evaluated_and_exported_with_it(spectra, tmp_path, capfd, monkeypatch):
    from caco import evaluate, export
    from caco.engine.training import run_training

    run_dir, overrides = tmp_path / "run", [*RUN, f"data.root={spectra}"]
    cfg = compose(overrides)
    check(job_config(cfg), overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
    summary = run_training(job_config(cfg), run_dir)
    assert {"knn2_20pct_top1", "probe_top1"} <= summary.keys()
    noted = json.loads((run_dir / "channels.json").read_text())
    assert noted["channels"] == len(noted["mean"]) == len(noted["std"]) == 5
    said = capfd.readouterr().err
    assert "mean and standard deviation of each channel, measured on folder/train" in said
    assert "the recipe's saturation, hue, grey are left out of the views" in said

    for command, arguments in (
        (evaluate, ["eval=[knn_all]", "eval.knn.k=2", "baselines=true"]),
        (export, [f"to={tmp_path / 'out'}"]),
    ):
        monkeypatch.setattr("sys.argv", ["caco", f"run={run_dir}", *arguments])
        command.main()
    assert "measured on" not in capfd.readouterr().err  # the run's own values are used
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 channels as stored" in card and str(noted["mean"]) in card


@LONG
def test_a_run_on_grey_of_16_bits_killed_at_whatever_instants_goes_on_to_the_same_bits(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "images" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 65536, (16, 16), dtype=np.uint16)).save(file)
    command = [
        *(word for word in RUN if not word.startswith(("eval", "data.channels"))), "data.channels=1", "eval=[]",
        f"data.root={tmp_path / 'images'}", "epochs=3", "checkpoint.every_steps=2", "loader.num_workers=1",
    ]  # fmt: skip
    code, _, told = Process(caco_train, *command, f"hydra.run.dir={tmp_path}/whole").end()
    assert code == 0 and "mean and standard deviation of each channel, measured on" in told, told
    command.append(f"hydra.run.dir={tmp_path}/killed")
    for seconds in draw.uniform(0.001, 0.05, 4):
        code, _, told = Process(train_killed, seconds, *command).end()
        assert code == -signal.SIGPROF and not (tmp_path / "killed" / "summary.json").exists(), told
    code, _, told = Process(caco_train, *command).end()
    assert code == 0 and "measured on" not in told, told
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    assert record(tmp_path / "whole") == record(tmp_path / "killed")
    assert (tmp_path / "whole/channels.json").read_bytes() == (tmp_path / "killed/channels.json").read_bytes()


def test_weights_of_any_number_of_channels_are_exported_once_it_is_said_what_they_are(tmp_path, monkeypatch, capsys):
    import timm
    from safetensors.torch import load_file

    from caco import export

    network = timm.create_model("resnet18", num_classes=0, in_chans=2)
    torch.save(network.state_dict(), tmp_path / "two.pth")

    def exported(*words):
        monkeypatch.setattr("sys.argv", ["caco", *words, "layouts=[timm]", f"to={tmp_path / 'out'}"])
        try:
            export.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    weights = [f"weights={tmp_path / 'two.pth'}", "backbone=resnet18"]
    said = ["data.channels=2", "data.mean=[0.3,0.1]", "data.std=[0.2,0.5]"]
    for words, expected in (
        (weights, "conv1.weight"),
        (
            [*weights, *said[:2]],
            "data: expected data.channels=N together with data.mean and data.std of N values each",
        ),
    ):
        code, told = exported(*words)
        assert code == 2 and expected in told, told
    assert not (tmp_path / "out").exists()
    assert exported(*weights, *said)[0] == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    about = timm.data.resolve_model_data_config(again)
    assert (again.conv1.in_channels, list(about["mean"]), list(about["std"])) == (2, [0.3, 0.1], [0.2, 0.5])

    data = {"data.channels": 2, "data.mean": [0.3, 0.1], "data.std": [0.2, 0.5]}
    loaded, preprocess = caco.load(weights=tmp_path / "two.pth", backbone="resnet18", **data)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    pixels = preprocess(np.full((260, 260, 2), 0.5, np.float32))
    assert pixels.shape[0] == 2 and pixels.flatten(1).mean(1).tolist() == pytest.approx([1.0, 0.8], abs=1e-3)


def test_a_beton_is_refused_with_the_reason(spectra, tmp_path):
    from caco.write import write_splits

    with pytest.raises(UserError, match="a .beton file holds photographs as 8-bit RGB"):
        write_splits(folder(root=str(spectra), channels=5), tmp_path)


@LONG
def test_a_plan_counts_the_channels():
    from caco.plan import plan

    with_more, with_three = (
        plan(
            job_config(compose([*BASE[:2], "backbone=small_resnet", "batch=16", f"data.channels={count}"])), images=100
        )
        for count in (64, 3)
    )
    assert with_more["model_flops_per_step"] > with_three["model_flops_per_step"]
    assert with_more["activation_bytes"] > with_three["activation_bytes"]
