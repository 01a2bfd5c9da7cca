"""eval=detect from the set on disk to the named results: it learns, resumes to the same bits, runs on several ranks,
and refuses mistakes early.
"""

import json
import re
from pathlib import Path

import detecting
import pytest
import torch
from pixelwise import store_of
from processes import ranks
from torch import nn

from caco.data.sets.sources import Splits
from caco.errors import UserError
from caco.evals.dense import detect
from caco.evals.dense.detect import Detect, Training, take_statistics
from caco.evals.dense.detection_rows import coco_row, rows_of
from caco.evals.dense.detector import Detection
from caco.evals.features import network_digest
from caco.installed import command_to_install
from caco.nn.backbones import small_resnet, timm_backbone
from experiments.toy_sets.detection import write_coco, write_voc

# Four steps of four images, with at most a fourth of the published number of regions.
FEW = {
    "name": "it", "images": 4, "steps": 1, "rate": 0.02, "warmup_steps": 0, "short_sides": [40, 48], "test_side": 48,
    "longest": 80,
    "anchors": [8, 16, 24], "proposal_samples": 16, "region_samples": 8, "region_cells": 4, "precise_batches": 2,
    "save_every_steps": 2,
}  # fmt: skip
VOC_NAMES = ["it/voc2007_ap50", "it/voc2007_ap75", "it/voc2007_ap"]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet(stem_stride=2)


def of(evaluator: Detect, store, network=None) -> dict[str, float]:
    evaluator.build(store, seed=3)
    return dict(evaluator.run(backbone() if network is None else network))


def test_voc_gives_its_numbers_and_leaves_the_backbone_and_the_draws_as_they_were(tmp_path):
    write_voc(tmp_path)
    network, said = backbone(), []
    digest, modes, draws = network_digest(network), [m.training for m in network.modules()], torch.get_rng_state()
    evaluator = Detect(root=str(tmp_path), **FEW)
    results = of(evaluator, store_of(said=said, num_workers=1), network)
    assert list(results) == VOC_NAMES and all(0 <= value <= 100 for value in results.values())
    assert network_digest(network) == digest and [m.training for m in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draws)
    assert said[0] == "it: training on 8 images, 4 steps of 4 images, rate 0.005" and said[-1].startswith(
        "it: trained for 4 steps, loss "
    )


def test_coco_gives_boxes_and_masks(tmp_path):
    write_coco(tmp_path)
    said = []
    results = of(Detect(root=str(tmp_path), dataset="coco", **FEW), store_of(said=said))
    wanted = {f"it/coco2017_{kind}_{measure}" for kind in ("box", "mask") for measure in ("ap", "ap50", "ap75")}
    assert (
        wanted
        <= set(results)
        <= wanted
        | {f"it/coco2017_{kind}_ap_{size}" for kind in ("box", "mask") for size in ("small", "medium", "large")}
    )


def test_killed_between_two_checkpoints_it_goes_on_to_the_same_numbers_and_bits(tmp_path, monkeypatch):
    """The detector finds little after four steps, so the networks are compared, too."""
    write_voc(tmp_path)
    tested = []
    monkeypatch.setattr(
        Detect,
        "_found",
        lambda self, network: tested.append({k: v.clone() for k, v in network.state_dict().items()}) or [],
    )

    class Killed(Exception):
        pass

    whole = of(Detect(root=str(tmp_path), **FEW), store_of())
    loss, calls = Training.loss, []

    def mortal(self, network, examples):
        calls.append(len(examples))
        if len(calls) == 4:
            raise Killed
        return loss(self, network, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "loss", mortal)
        with pytest.raises(Killed):
            of(Detect(root=str(tmp_path), **FEW), store_of(tmp_path / "kept"))
    said = []
    resumed = of(Detect(root=str(tmp_path), **FEW), store_of(tmp_path / "kept", said=said))
    assert "step 2 of 4" in said[0] and resumed == whole
    assert tested[0].keys() == tested[1].keys() and all(
        torch.equal(tested[0][name], tested[1][name]) for name in tested[0]
    )


def test_what_changes_the_weights_changes_the_checkpoint(tmp_path):
    write_voc(tmp_path)
    for changed in ({}, {"test_side": 40}, {"short_sides": [48]}, {"region_samples": 12}):
        of(Detect(root=str(tmp_path), **FEW | changed), store_of(tmp_path / "kept"))
    assert len(list((tmp_path / "kept" / "classifiers").iterdir())) == 3, (
        "the size of test images must not change the checkpoint of training"
    )


def test_statistics_taken_anew_are_the_mean_over_training_batches(tmp_path):
    """The expected values are the mean of the batches' statistics, which are read with a momentum of 1."""
    write_voc(tmp_path)
    task = Training(detect.READERS["voc"](tmp_path).train, [48], 80, masks=False)
    network, store = detecting.small(masks=False, num_classes=20), store_of()
    norm = network.regions.box_head.norm
    momenta = [m.momentum for m in detecting.norms_of(network)]
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    take_statistics(network, task, 4, 3, store, seed=5, precision="fp32")
    hook.remove()
    assert len(seen) == 3 and not network.training and [m.momentum for m in detecting.norms_of(network)] == momenta
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(
        norm.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0), rtol=1e-4
    )
    before = norm.running_mean.clone()
    take_statistics(network, task, 4, 0, store, seed=5, precision="fp32")
    assert torch.equal(norm.running_mean, before), "without batches the statistics from training stay"


@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_a_test_image_that_cannot_be_read_is_left_out_of_the_score_or_ends_it(tmp_path, dataset, monkeypatch, capsys):
    """The score counts only the objects in the other images; here all of them are found, so it is 100."""
    (write_voc if dataset == "voc" else write_coco)(tmp_path)
    test = detect.READERS[dataset](tmp_path).test
    damaged = max(range(len(test)), key=lambda index: len(test.objects(index).labels))
    test.files.path(damaged).write_bytes(test.files.path(damaged).read_bytes()[:300])

    def perfect(self, network):
        monkeypatch.setattr(network, "detect", lambda images: [found.pop(0)])
        found = [_truth(test, index, scale=48 / 96) for index in range(len(test)) if index != damaged]
        return real(self, network)

    real = Detect._found
    monkeypatch.setattr(Detect, "_found", perfect)
    settings = FEW | {"root": str(tmp_path), "dataset": dataset, "longest": 64}
    with pytest.raises(UserError, match=f"{test.files.path(damaged)}: expected an image that can be read"):
        of(Detect(**settings), store_of())
    results = of(Detect(**settings), store_of(corrupt="skip"))
    assert results["it/voc2007_ap50" if dataset == "voc" else "it/coco2017_box_ap50"] == pytest.approx(100)
    assert f"it: {test.files.path(damaged)} cannot be read and is left out (1 such so far)" in capsys.readouterr().err


def _truth(images, index, *, scale) -> Detection:
    objects = images.objects(index)
    boxes = torch.from_numpy(objects.boxes) * scale
    masks = None if objects.polygons is None else torch.ones(len(boxes), 28, 28)
    return Detection(boxes, torch.from_numpy(objects.labels), torch.ones(len(boxes)), masks)


def test_detections_are_scaled_to_the_image_and_cut_to_it():
    """The network sees the image at twice its size; the second box is outside the image."""
    found = Detection(
        torch.tensor([[20.0, 40, 300, 80], [250, 10, 260, 20]]),
        torch.tensor([4, 1]),
        torch.tensor([0.75, 0.5]),
        torch.ones(2, 4, 4),
    )
    (row,) = rows_of(7, found, (200, 100), (100, 50))
    assert {key: row[key] for key in ("image", "label", "score", "box")} == {
        "image": 7,
        "label": 4,
        "score": 0.75,
        "box": [10, 20, 100, 40],
    }
    assert row["mask"]["size"] == [50, 100]
    as_coco = coco_row({**row, "image": 1}, torch.tensor([9, 42]).numpy(), torch.tensor([1, 2, 3, 4, 90]).numpy())
    assert (as_coco["image_id"], as_coco["category_id"], as_coco["bbox"]) == (42, 90, [10, 20, 90, 20])


def test_rows_of_unequal_ranks_come_together(tmp_path):
    codes, outputs = ranks(2, detecting.write_rows, str(tmp_path / "rows.json"))
    assert codes == [0, 0], outputs[0][1][-3000:]
    assert json.loads(Path(tmp_path / "rows.json").read_text()) == [{"image": i, "score": i / 3} for i in (0, 2, 4, 1)]


def test_all_that_is_wrong_with_the_settings_is_refused_at_once():
    with pytest.raises(UserError, match="it short_sides: .*; longest: .*; anchors: .*five.*; region_cells: "):
        Detect(**FEW | {"short_sides": [8], "longest": 20, "head": "fpn", "region_cells": 5})
    with pytest.raises(
        UserError, match=r"dataset: expected voc \| coco, got 'voc2007'; head: .*; precision: .*; when: "
    ):
        Detect(**FEW | {"dataset": "voc2007", "head": "c5", "precision": "fp16", "when": "never"})


def test_a_missing_root_a_set_that_is_not_whole_a_vit_and_shared_images_are_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=(
            r"root: expected the folder that holds the set, as eval.NAME.root=PATH, got None. .*\n"
            r" .*VOC2007/Annotations"
        ),
    ):
        Detect(**FEW).build(store_of(), seed=0)
    with pytest.raises(UserError, match=r"as eval.detect_coco_2x.root=PATH, got None. .*\n .*instances_train2017.json"):
        Detect(**FEW | {"name": "detect_coco_c4_2x", "dataset": "coco"}).build(store_of(), seed=0)
    with pytest.raises(UserError, match="VOC is incomplete below"):
        Detect(root=str(tmp_path), **FEW).build(store_of(), seed=0)
    write_voc(tmp_path)
    evaluator = Detect(root=str(tmp_path), **FEW)
    evaluator.build(store_of(), seed=0)
    with pytest.raises(UserError, match="detect needs a ResNet of timm's"):
        next(evaluator.run(timm_backbone(name="vit_tiny_patch16_224")))
    store = store_of()
    test = detect.READERS["voc"](tmp_path).test.files
    store.splits = Splits(test, store.splits.train, store.splits.test)
    with pytest.raises(UserError, match="4 of the 4 images of voc/test07 are images of"):
        Detect(root=str(tmp_path), **FEW).build(store, seed=0)


def test_masks_without_pycocotools_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    told = f"need pycocotools, which is not installed; to install it: {command_to_install('dense')}"
    with pytest.raises(UserError, match=re.escape(told)):
        Detect(root=str(tmp_path), dataset="coco", **FEW).build(store_of(), seed=0)


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_what_it_takes_is_counted_and_timed_without_a_set(head):
    settings = FEW | ({"anchors": [4, 8, 16, 24, 32]} if head == "fpn" else {})
    train, test = Detect(dataset="coco", head=head, **settings).work(backbone)
    assert (train.images, test.images, train.what) == (16, 5000, "it: images of 58 x 44 px to train on")
    assert train.flops > 0 and test.flops > 0
    train.once(torch.device("cpu"))
    test.once(torch.device("cpu"))


LEARNS = {
    "name": "it", "images": 8, "rate": 0.04, "short_sides": [96], "test_side": 96, "longest": 128,
    "anchors": [16, 32, 48],
    "proposal_samples": 64, "region_samples": 32, "region_cells": 6, "warmup_steps": 10, "milestones": [0.8],
    "precise_batches": 10,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_it_finds_what_it_was_trained_on(tmp_path, dataset):
    """After 200 steps on eight toy images, boxes (and for COCO masks) reach more than 90 at an IoU of 0.5."""
    if dataset == "voc":
        write_voc(tmp_path, test=8, same_test=True)
    else:
        write_coco(tmp_path, train=8, val=8, same_val=True)
    store = store_of()
    store.overlap = "allow"
    results = of(Detect(root=str(tmp_path), dataset=dataset, steps=100, **LEARNS), store)
    found = {
        name: results[f"it/{name}"]
        for name in (["voc2007_ap50"] if dataset == "voc" else ["coco2017_box_ap50", "coco2017_mask_ap50"])
    }
    assert min(found.values()) > 90, found
