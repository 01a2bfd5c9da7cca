"""Segmentation with MoCo's head: it follows the published protocol, learns toy images, resumes to the same bits, and
gives the same result on ranks with different numbers of images.
"""

import copy
import json
import shutil

import numpy as np
import pixelwise
import pytest
import segment_worker
import timm
import torch
from PIL import Image
from processes import ranks
from segment_worker import FEW, backbone, of
from torch import nn
from torch.nn import functional as F

from caco.config.composition import compose, instantiate
from caco.errors import UserError
from caco.evals.dense import segment as segment_module
from caco.evals.dense.dense_linear import DenseLinear
from caco.evals.dense.maps import Maps, stride_and_width
from caco.evals.dense.segment import FCN16, Crops, Segment, scored
from caco.evals.dense.segmentation_sets import voc2012
from caco.evals.dense.training import train
from caco.evals.pixels import RawPixels
from experiments.toy_sets import segmentation as toy_voc


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    toy_voc.write_voc(root)
    return root


@pytest.fixture
def store():
    made = pixelwise.store_of()
    made.overlap = "allow"  # because toy test images look like toy training images
    return made


# The protocol.


def test_the_option_is_mocos_protocol():
    segment = instantiate(compose(["eval=[segment]"], "evaluate").eval.segment)
    rates = segment.recipe.rates()
    assert len(rates) == 30_000 and segment.recipe.images == 16 and segment.recipe.decay_norms
    assert [rates[step] for step in (0, 20_999, 21_000, 26_999, 27_000)] == pytest.approx(
        [0.003, 0.003, 3e-4, 3e-4, 3e-5]
    )
    assert (segment.crop, segment.scale, segment.channels) == (513, [0.5, 2.0], 256)
    assert (segment.train, segment.precision) == ("trainaug", "fp32")
    assert (segment.recipe.momentum, segment.recipe.weight_decay, segment.protocol) == (0.9, 1e-4, "segment_fcn16")


@pytest.mark.parametrize(("name", "threes_of_conv5"), [("resnet50", 3), ("resnet18", 4), ("resnet26d", 2)])
def test_conv5_has_dilation_2_in_all_blocks_and_a_stride_of_1_so_that_the_whole_has_16(name, threes_of_conv5):
    body = timm.create_model(name, num_classes=0)
    network = FCN16(body, channels=8, seed=0)
    assert network.maps.stride == 16 and stride_and_width(body)[0] == 32, "the network must be changed in a copy"
    threes = [m for m in network.maps.backbone.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == threes_of_conv5 and all(
        (m.stride, m.dilation, m.padding) == ((1, 1), (2, 2), (2, 2)) for m in threes
    )
    assert all(m.stride == (1, 1) for m in network.maps.backbone.layer4.modules() if isinstance(m, nn.Conv2d))
    head = [m for m in network.head if isinstance(m, nn.Conv2d)]
    assert [(m.dilation[0], m.kernel_size[0], m.out_channels) for m in head] == [(6, 3, 8), (6, 3, 8), (1, 1, 21)]
    network.eval()
    with torch.no_grad():
        assert network.maps(torch.zeros(1, 3, 129, 129)).shape[2:] == (9, 9), "there are places at 0, 16, ..., 128"
        assert network(torch.zeros(1, 3, 50, 37)).shape == (1, 21, 50, 37)


def test_the_last_stage_computes_what_it_computed_at_every_second_place():
    """With a stride of 1, its first convolution gives the old values and others between them; with dilation 2, it reads
    inputs twice as far apart.
    """
    body = backbone().double().eval()
    with torch.no_grad():
        images = torch.rand(1, 3, 65, 65, dtype=torch.float64)
        before = body.layer3(body.layer2(body.layer1(body.maxpool(body.act1(body.bn1(body.conv1(images)))))))
        weight = body.layer4[0].conv1.weight
        old = F.conv2d(before, weight, stride=2, padding=1)
        dilated = FCN16(body, channels=16, seed=0).maps.backbone.layer4[0].conv1
        plain, found = F.conv2d(before, weight, padding=1), dilated(before)
    assert torch.allclose(plain[..., ::2, ::2], old, atol=1e-12)
    spread = torch.zeros(*weight.shape[:2], 5, 5, dtype=torch.float64)
    spread[..., ::2, ::2] = weight  # a kernel with zeros between the nine weights
    assert torch.allclose(found, F.conv2d(before, spread.detach(), padding=2), atol=1e-12)


def test_scores_stand_at_the_pixels_of_their_places_in_crops_and_in_whole_images():
    """If each place of a map has the number of its pixel, then resizing the map gives every pixel its own number:
    nothing is shifted or stretched.
    """
    maps = Maps(backbone(), purpose="it")
    assert maps.stride == 16
    for height, width in ((65, 65), (96, 128), (33, 50)):
        rows, columns = (maps.places(side).double() for side in (height, width))
        shape = maps(torch.zeros(1, 3, height, width)).shape[2:]
        assert shape == (len(rows), len(columns)) and rows[-1] >= height - 1
        pixels = maps.to_pixels(torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None], height, width)[0]
        assert torch.allclose(pixels[0], torch.arange(height)[:, None].expand(-1, width).float(), atol=1e-4)
        assert torch.allclose(pixels[1], torch.arange(width).expand(height, -1).float(), atol=1e-4)


def test_a_crop_keeps_pixels_and_labels_together_and_pads_with_the_mean_and_255(voc, store):
    images = voc2012(voc, "train").train
    task = Crops(images, store.views, crop=120, scale=[0.5, 2.0])
    sizes, flipped, padded = set(), set(), 0
    for seed in range(12):
        pixels, classes, (height, width) = task.example(0, seed)
        again = task.example(0, seed)
        assert torch.equal(pixels, again[0]) and pixels.shape == (120, 120, 3) and classes.shape == (120, 120)
        assert (classes[height:] == 255).all() and (classes[:, width:] == 255).all() and not pixels[height:].any()
        padded += height < 120
        sizes.add((height, width))
        # Cats are red, so in every crop the red pixels must be those with the label of a cat.
        inside, red = classes == 8, pixels[..., 0].int() - pixels[..., 1].int()
        if inside.sum() > 200:
            assert (
                red[inside].float().mean() > 100
                and red[:height, :width][(classes == 0)[:height, :width]].float().mean() < 20
            )
            flipped.add(bool(np.argwhere(inside.numpy())[:, 1].mean() > width / 2))
    assert len(sizes) > 3 and 0 < padded < 12 and flipped == {True, False}


def test_the_loss_is_the_mean_over_labelled_pixels_of_all_images_and_padding_is_zero(voc, store):
    task = Crops(voc2012(voc, "train").train, store.views, crop=140, scale=[1.0, 1.0])
    examples = [task.example(index, 0) for index in range(3)]
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, images):
            seen.append(images)
            return self.scale * images.mean(dim=1, keepdim=True) * torch.arange(21.0)[:, None, None]

    loss = task.loss(Network(), examples)
    logits = Network()(seen[0]).double()
    classes = torch.stack([classes for _, classes, _ in examples]).long()
    by_pixel = -logits.log_softmax(dim=1).gather(1, classes.clamp(max=20)[:, None])[:, 0]
    assert loss.item() == pytest.approx(by_pixel[classes != 255].mean().item(), rel=1e-5)
    assert (
        not seen[0][:, :, 96:].any()
        and not seen[0][..., 128:].any()
        and seen[0][:, :, :96, :128].all(dim=1).float().mean() > 0.9
    )


# Its results.


@pytest.mark.long
def test_it_learns_the_toy_images(voc, store):
    """It reaches more than 90, while an untrained network reaches only the score of predicting background."""
    settings = {"images": 3, "steps": 28, "rate": 0.5, "crop": 128, "scale": [1.0, 1.0], "channels": 32}
    learned = of(Segment(root=str(voc), train="train", **settings), store)
    assert learned["miou"] > 90 and learned["mean_accuracy"] > 90 and learned["pixel_accuracy"] > 95
    untrained = scored(
        FCN16(backbone(), channels=32, seed=0).eval(), voc2012(voc, "train").test, store, name="it", precision="fp32"
    )
    assert untrained["miou"] < 30


@pytest.mark.long
def test_two_unequal_ranks_give_what_one_process_gives(voc, tmp_path):
    """Each step has three images: one rank trains on one of them, the other on two, with different numbers of labelled
    pixels.
    """
    codes, outputs = ranks(2, segment_worker.write_both, str(voc), str(tmp_path))
    assert codes == [0, 0], outputs[0][1][-3000:]
    one, two = segment_worker.trained(voc), torch.load(tmp_path / "weights.pt", weights_only=True)
    untrained = FCN16(backbone(), channels=16, seed=0).state_dict()
    for name in one:
        moved, apart = (one[name] - untrained[name]).double().norm(), (one[name] - two[name]).double().norm()
        assert apart <= 1e-3 * moved + 1e-5, (
            name
        )  # float32 after three steps; with the pixels of one rank alone, the difference would be tenths
    found, expected = json.loads((tmp_path / "scores.json").read_text()), segment_worker.scores(voc)
    assert expected["segment"]["pixel_accuracy"] < 50 < expected["dense_linear"]["miou"]
    for evaluator in expected:
        assert found[evaluator] == pytest.approx(expected[evaluator], abs=0.1), (
            "rounding may change a few of 48,000 pixels"
        )


def test_killed_it_goes_on_to_the_same_bits_and_the_backbone_stays(voc, tmp_path, monkeypatch):
    network = backbone()
    before = copy.deepcopy(network.state_dict())

    def trained(folder, **settings):
        store = pixelwise.store_of(folder)
        store.overlap = "allow"
        found = []
        monkeypatch.setattr(segment_module, "train", lambda *a, **k: found.append(train(*a, **k)) or found[0])
        segment = Segment(root=str(voc), save_every_steps=2, **FEW, **settings)
        segment.build(store, seed=0)
        return dict(segment.run(network)), found[0].state_dict()

    whole, weights = trained(tmp_path / "whole")
    crops = []

    class Killed(Exception):
        pass

    def example(self, index, seed, example=Crops.example):
        if len(crops) == 3 * 9:
            raise Killed
        crops.append(index)
        return example(self, index, seed)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Crops, "example", example)
        trained(tmp_path / "cut")
    crops.clear()
    with monkeypatch.context() as patch:
        whole_example = Crops.example
        patch.setattr(
            Crops, "example", lambda self, index, seed: crops.append(index) or whole_example(self, index, seed)
        )
        results, resumed = trained(tmp_path / "cut")
    assert len(crops) == 3 * (11 - 8), (
        "two steps of 16 images become eleven of 3; the last three are made after the checkpoint at step eight"
    )
    assert results == whole and all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and network.training


def test_in_bf16_the_weights_are_others_by_as_much_as_bf16_rounds(voc):
    exact, rounded = (segment_worker.trained(voc, precision)["head.0.weight"] for precision in ("fp32", "bf16"))
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def test_damaged_images_end_it_by_name_or_others_are_trained_and_tested_on(voc, tmp_path, capsys):
    """With loader.corrupt=skip, the score is that of the readable images, and every damaged file is named."""
    root = tmp_path / "damaged"
    shutil.copytree(voc, root)
    top = root / "VOCdevkit/VOC2012"
    (top / "JPEGImages" / f"{toy_voc.TRAIN[1]}.jpg").write_bytes(b"nothing")
    (top / "SegmentationClass" / f"{toy_voc.VAL[2]}.png").write_bytes(b"nothing")
    toy_voc.write_list(top / "ImageSets/Segmentation/few.txt", [name for name in toy_voc.VAL if name != toy_voc.VAL[2]])

    def store_of(corrupt):
        made = pixelwise.store_of(corrupt=corrupt)
        made.overlap = "allow"
        return made

    with pytest.raises(UserError, match=f"{toy_voc.TRAIN[1]}.jpg: expected an image that can be read"):
        of(Segment(root=str(root), **FEW), store_of("fail"))
    found = of(Segment(root=str(root), **FEW), store_of("skip"))
    said = capsys.readouterr().err
    assert (
        f"image 1 cannot be read; image 2 stands in for it (1 such so far): {top}/JPEGImages/{toy_voc.TRAIN[1]}.jpg"
        in said
    )
    assert (
        "segment_fcn16_train-train_images-3_steps-2_rate-0.1_crop-65_channels-16:"
        f" {top}/JPEGImages/{toy_voc.VAL[2]}.jpg cannot" in said
    )
    linear = {"root": str(root), "train": "train", "size": 64, "places": 10}
    with pytest.raises(UserError, match="expected an image that can be read"):
        of(DenseLinear(**linear), store_of("fail"))
    of_linear = of(DenseLinear(**linear), store_of("skip"))

    whole, without = voc2012(root, "train"), tmp_path / "without"
    shutil.copytree(root, without)
    (without / "VOCdevkit/VOC2012/ImageSets/Segmentation/few.txt").rename(
        without / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    )
    assert len(whole.test) == 4 and len(voc2012(without, "train").test) == 3
    assert of(Segment(root=str(without), **FEW), store_of("skip")) == found
    assert of(DenseLinear(**linear | {"root": str(without)}), store_of("skip")) == of_linear


# What is refused.


def test_a_backbone_without_stages_is_refused_before_anything_is_read(voc, store, monkeypatch):
    monkeypatch.setattr(Crops, "example", lambda *_: pytest.fail("read"))
    segment = Segment(root=str(voc), **FEW)
    segment.build(store, seed=0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1)
    with pytest.raises(
        UserError, match="segment needs a ResNet of timm's, .* got VisionTransformer: choose backbone=resnet50"
    ):
        list(segment.run(vit))


def test_raw_pixels_are_left_out_and_said_so(voc):
    said = []
    store = pixelwise.store_of(said=said)
    store.overlap = "allow"
    segment = Segment(root=str(voc), **FEW)
    segment.build(store, seed=0)
    assert list(segment.run(RawPixels(32))) == [] and "skips the baseline of raw pixels" in said[-1]
    assert (
        said[0] == "segment: VOC 2012, 6 images to train on (published: 1,464), 4 images to test on (published: 1,449)"
    )


def test_test_images_that_are_training_images_are_refused(voc, tmp_path):
    top = toy_voc.write_voc(tmp_path)
    (top / "JPEGImages" / "2008_000003.jpg").write_bytes((top / "JPEGImages" / "2007_000002.jpg").read_bytes())
    for name in ("2008_000000", "2008_000001", "2008_000002"):  # the other images differ
        Image.new("RGB", (128, 96), (int(name[-1]) * 50, 3, 9)).save(top / "JPEGImages" / f"{name}.jpg")
    with pytest.raises(
        UserError, match=r"1 of the 4 images of voc2012/val are images of voc2012/train too .*2007_000002.jpg is"
    ):
        Segment(root=str(tmp_path), **FEW).build(pixelwise.store_of(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "all"}, r"train: expected trainaug \| train, got 'all'"),
        ({"precision": "fp16"}, r"precision: expected bf16 \| fp32, got 'fp16'"),
        ({"scale": [2.0, 0.5]}, r"scale as \[smallest, largest\]"),
        ({"milestones": [0.9, 0.7]}, "milestones: expected ascending"),
        ({"rate": 0.0}, "rate: expected a positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Segment(**settings)


def test_without_a_root_it_says_how_to_give_one(store):
    with pytest.raises(
        UserError, match="root: expected the folder that holds the set, as eval.segment.root=PATH, got None"
    ):
        Segment().build(store, seed=0)
