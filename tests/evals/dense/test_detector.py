"""The detector: its layers, its losses computed by hand, its random draws, and two ranks with images of different
sizes.
"""

import detecting
import pytest
import torch
from detecting import UNEQUAL, example, losses_and_gradients, norms_of, small
from processes import ranks
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from caco.errors import UserError
from caco.evals.dense.detector import detector, stages_of
from caco.evals.dense.proposals import Anchors, SeededSampler
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.regions import AlignedPool, box_losses, level_of, mask_loss
from caco.nn.backbones import small_resnet, timm_backbone


def test_anchors_are_a_stride_apart_and_not_rounded():
    """With a stride of 16, an image of 33 x 17 pixels has 3 x 2 places; torchvision would use the strides 11 and 8."""
    anchors = Anchors([[32, 64]], [16])
    (found,) = anchors(ImageList(torch.zeros(1, 3, 33, 17), [(33, 17)]), [torch.zeros(1, 8, 3, 2)])
    assert found.shape == (3 * 2 * 6, 4)
    places = found.view(3, 2, 6, 4)
    assert torch.allclose(places[2, 1] - places[0, 0], torch.tensor([16.0, 32, 16, 32]).expand(6, 4), atol=1e-5)
    w, h = (places[0, 0, :, 2:] - places[0, 0, :, :2]).unbind(1)
    assert torch.allclose(h / w, torch.tensor([0.5, 1, 2] * 2)) and torch.allclose(
        (w * h).sqrt(), torch.tensor([32.0] * 3 + [64.0] * 3)
    )
    assert torch.allclose(places[0, 0, :, :2], -places[0, 0, :, 2:]) and places[0, 0, 0, 2] == pytest.approx(
        16 * 2**0.5
    )


def test_a_region_of_224_pixels_takes_the_third_level_and_the_others_by_factors_of_two():
    sides = torch.tensor([20.0, 111.0, 112.0, 224.0, 447.0, 448.0, 2000.0])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert level_of(boxes, 4).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert level_of(boxes, 1).tolist() == [0] * 7


def test_regions_of_several_levels_come_back_in_their_order():
    levels = {str(s): torch.randn(2, 3, 128 // s, 128 // s, generator=torch.Generator().manual_seed(s)) for s in (1, 2)}
    boxes = [torch.tensor([[0.0, 0, 120, 120], [3, 4, 20, 30]]), torch.tensor([[5.0, 5, 110, 125]])]
    pooled = AlignedPool([1, 2], 4)(levels, boxes)
    wanted = [(1, 0, boxes[0][0]), (0, 0, boxes[0][1]), (1, 1, boxes[1][0])]
    for row, (level, image, box) in zip(pooled, wanted, strict=True):
        stride = (1, 2)[level]
        assert torch.equal(
            row, roi_align(levels[str(stride)][image : image + 1], [box[None]], 4, 1 / stride, 0, aligned=True)[0]
        )


def test_draws_are_an_images_own_and_no_more_than_a_share_is_positive():
    labels = [torch.tensor([1.0] * 30 + [0.0] * 30 + [-1.0] * 30), torch.tensor([1.0] * 2 + [0.0] * 5)]
    sampler = SeededSampler(16, 0.25)
    sampler.seeds = [1, 2]
    positive, negative = sampler(labels)
    assert [int(p.sum()) for p in positive] == [4, 2] and [int(n.sum()) for n in negative] == [12, 5]
    assert all(
        (label[p] == 1).all() and (label[n] == 0).all() for label, p, n in zip(labels, positive, negative, strict=True)
    )
    sampler.seeds = [2, 1]
    swapped = sampler(labels[::-1])
    assert torch.equal(swapped[0][1], positive[0]) and torch.equal(swapped[1][1], negative[0])
    sampler.seeds = [3, 2]
    assert not torch.equal(sampler(labels)[0][0], positive[0])


def test_box_losses_by_hand():
    """Two regions with the classes 2 and 0 (background): the mean of the cross entropies, and the L1 loss of the box of
    class 2, divided by both regions.
    """
    logits = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    deltas = torch.zeros(2, 12)
    deltas[0, 8:] = torch.tensor([0.5, 0.0, -1.0, 0.0])
    deltas[1] = 7.0
    losses = box_losses(logits, deltas, torch.tensor([2, 0]), torch.tensor([[0.0, 0.25, 0.0, 0.0]] * 2))
    assert losses["box"].item() == pytest.approx((0.5 + 0.25 + 1.0) / 2)
    assert losses["class"].item() == pytest.approx(F.cross_entropy(logits, torch.tensor([2, 0])).item())


def test_mask_loss_is_of_the_regions_own_class_and_zero_without_regions():
    square = [[torch.tensor([[0.0, 0], [5, 0], [5, 10], [0, 10]]).numpy()]]
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.tensor([2]), square, torch.tensor([[0.0, 0, 10, 10]]))
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    loss.backward()
    assert (
        torch.allclose(logits.grad[0, 2], torch.tensor([-0.5, -0.5, 0.5, 0.5]).expand(4, 4) / 16)
        and not logits.grad[0, :2].any()
    )
    none = torch.zeros(0, 3, 4, 4, requires_grad=True)
    assert mask_loss(none, torch.zeros(0, dtype=torch.int64), [], torch.zeros(0, 4)).item() == 0


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_every_layer_learns_and_all_of_the_body_is_the_encoders(head):
    backbone = small_resnet(stem_stride=2)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = small(head)
    torch.manual_seed(0)
    with torch.no_grad():
        encoder = small_resnet(stem_stride=2)
    of_body = {
        name: value
        for name, value in network.state_dict().items()
        if "layer" in name and "mask_layers" not in name and "pyramid" not in name
    }
    theirs = {name: value for name, value in encoder.state_dict().items() if name.startswith("layer")}
    assert len(of_body) == len(theirs)
    assert all(torch.equal(value, theirs[name[name.index("layer") :]]) for name, value in of_body.items())
    losses = network.train()([example(1), example(2)])
    assert list(losses) == ["objectness", "proposal_box", "class", "box", "mask"]
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    norms = len(norms_of(encoder))
    assert len(norms_of(network)) == norms + (1 if head == "c4" else 8), (
        "c4 adds one norm, fpn two in each of four levels, and the heads none"
    )
    groups = Recipe(steps=1, images=1, rate=1.0, decay_norms=False).optimizer(network).param_groups
    assert {id(p) for p in groups[1]["params"]} == {id(p) for norm in norms_of(network) for p in norm.parameters()}


def test_new_layers_start_as_published():
    network = small("c4", num_classes=80)
    spread = {"scores": 0.01, "boxes": 0.001}
    for name, wanted in spread.items():
        layer = getattr(network.regions.box_predictor, name)
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05) and not layer.bias.any()
    assert network.regions.mask_layers[-1].weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert network.proposals.head.conv[0][0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all(
        not p.any()
        for name, p in network.named_parameters()
        if name.endswith("bias") and ("mask_layers" in name or "proposals" in name)
    )


def test_c4_in_the_test_is_what_is_written_down_here():
    """The same weights are applied by plain calls: pooling, conv5, norm, mean, two linear layers; then masks for the
    boxes that were found.
    """
    network = small("c4", seed=1).train()
    for norm in norms_of(network):
        norm.momentum = 1.0
    network([example(6), example(7)])  # set BatchNorm's statistics, without which the last stages would lose the image
    network.eval()
    image = example(6).image
    nn.init.normal_(network.regions.box_predictor.scores.weight, std=3.0)  # large scores, so that something is found
    (found,) = network.detect([image])
    assert len(found.boxes) > 3 and found.masks.shape == (len(found.boxes), 4, 4)
    with torch.no_grad():
        x = ((image / 255 - 0.5) / 0.25)[None]
        map_ = network.body.layer3(network.body.layer2(network.body.layer1(network.body.stem(x))))

        def conv5(boxes):
            pooled = roi_align(map_, [boxes], 4, 1 / 8, sampling_ratio=0, aligned=True)
            return network.regions.box_head.norm(network.regions.box_head.layer4(pooled))

        proposals, _ = network.proposals(ImageList(x, [tuple(image.shape[1:])]), {"c4": map_})
        rows = conv5(proposals[0]).mean((2, 3))
        scores = network.regions.box_predictor.scores(rows).softmax(1)
        masks = network.regions.mask_layers(conv5(found.boxes)).sigmoid()
    for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True):
        assert (scores[:, label + 1] - score).abs().min() < 1e-6
    assert found.scores.min() > 0.05 and torch.equal(found.scores, found.scores.sort(descending=True).values)
    own = masks[torch.arange(len(masks)), found.labels + 1]
    assert torch.allclose(found.masks, own, atol=1e-6)


def test_masks_of_c4_reuse_the_rows_of_one_pass_in_training():
    network, calls = small("c4").train(), []
    network.regions.box_head.register_forward_hook(lambda module, given, out: calls.append((len(given[0]), out)))
    network.regions.mask_layers.register_forward_pre_hook(lambda module, given: calls.append((len(given[0]), given[0])))
    network([example(1), example(2)])
    (regions, rows), (positives, reused) = calls
    assert regions == 2 * 16 and 0 < positives <= 2 * 4
    assert all((rows == row).flatten(1).all(1).any() for row in reused)


def test_bf16_keeps_boxes_in_float32():
    network = small("c4").train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network([example(1)])
        found = network.eval().detect([example(1).image])[0]
    assert {loss.dtype for loss in losses.values()} == {torch.float32} and found.boxes.dtype == torch.float32
    plain = small("c4").train()([example(1)])
    assert losses["class"].item() == pytest.approx(plain["class"].item(), rel=0.05)


def test_an_image_is_the_same_with_and_without_padding_beside_a_larger_one():
    """Padding is zeros to the right and below, after normalisation, and all detections are within the image itself."""
    network = small("c4")
    batch = network._batch([example(1).image, example(2, height=30, width=35).image])
    assert batch.tensors.shape == (2, 3, 48, 64) and batch.image_sizes == [(48, 64), (30, 35)]
    assert not batch.tensors[1, :, 30:].any() and not batch.tensors[1, :, :, 35:].any()
    assert torch.allclose(batch.tensors[1, :, :30, :35], (example(2).image[:, :30, :35] / 255 - 0.5) / 0.25)
    assert small("fpn")._batch([example(2, height=30, width=35).image]).tensors.shape == (1, 3, 32, 64)


def test_stages_are_those_of_the_network_itself():
    assert stages_of(small_resnet(width=8, stem_stride=2)) == ([8, 16, 32, 64], [2, 4, 8, 16])
    assert stages_of(timm_backbone(name="resnet18")) == ([64, 128, 256, 512], [4, 8, 16, 32])


def test_a_backbone_without_stages_is_refused_and_a_pyramid_with_other_anchors():
    settings = {"num_classes": 3, "masks": False, "mean": [0.5] * 3, "std": [0.25] * 3}
    vit = timm_backbone(name="vit_tiny_patch16_224")
    with pytest.raises(
        UserError, match="detect needs a ResNet of timm's, with a stem and four stages, got VisionTransformer"
    ):
        detector(vit, head="c4", **settings)
    with pytest.raises(UserError, match="expected a size for each of the five levels"):
        small("fpn", anchors=(32, 64))


@pytest.mark.parametrize("head", ["c4", pytest.param("fpn", marks=pytest.mark.long)])
def test_two_ranks_with_unequal_images_equal_one_process(tmp_path, head):
    """One rank has one image, the other has two smaller images of other sizes; losses and gradients are those of the
    three together.
    """
    codes, outputs = ranks(2, detecting.write_losses_and_gradients, str(tmp_path), head)
    assert codes == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    losses, gradients = torch.load(tmp_path / "two.pt", weights_only=True)
    wanted, by_name = losses_and_gradients(UNEQUAL, head, len(UNEQUAL))
    assert torch.allclose(losses, wanted, rtol=1e-9, atol=0)
    assert gradients.keys() == by_name.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, by_name[name], rtol=1e-6, atol=1e-10), name
