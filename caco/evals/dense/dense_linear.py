"""A linear segmentation head on frozen features of places: segmentation in minutes instead of days.

Shapes: N images, P places drawn in each, D features, K = 21 classes, S the side of an image.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from caco import distributed, metrics
from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.evals.base import Evaluator, Work
from caco.evals.dense import pixel_metric
from caco.evals.dense.counting import work_of
from caco.evals.dense.maps import Maps, as_evaluated
from caco.evals.dense.segment import found_voc2012, resized
from caco.evals.dense.segmentation_sets import CLASSES, IGNORED, NUM_IMAGES
from caco.evals.dense.training import one_by_one
from caco.evals.features import FeatureFiles, FeatureStore, Precision
from caco.evals.logistic import fit, moments
from caco.evals.pixels import RawPixels
from caco.ranges import AboveZero, Count, Side, held

BATCH = 16  # images in a forward pass; an interrupted computation of features resumes at a multiple of it
UNLABELLED = -1.0


class DenseLinear(Evaluator):
    """Segmentation of VOC 2012 val by a linear layer on frozen features: `<protocol>/voc2012_miou`, `_mean_accuracy`,
    `_pixel_accuracy`, percent. The protocol is called `dense_linear`; changed settings appear in its name
    (caco/metrics.py).

    The protocol is caco's own, and its numbers cannot be compared with those of `segment_fcn16`: nothing of the
    backbone is trained, and places are as coarse as in the backbone (32 pixels for a ResNet-50). Each image is resized
    to a square. Of its labelled places some are drawn, the same for every backbone with these places. An L2-regularised
    multinomial logistic regression of their standardised features, as in `probe`, gives a 1x1 convolution. Its scores
    are interpolated bilinearly from places to the pixels of the square, and then to the image's own size.

    Args:
        root, train: as in Segment.
        size: S, side of the square in pixels; for a ViT a multiple of its patch size.
        places: P, number of places drawn in each training image; fewer if it has fewer labelled ones.
        l2, max_iterations: as in Probe.
        precision: precision of the backbone, "fp32" or "bf16".
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True
    # Its own photographs, so a backbone for data.channels cannot be evaluated (caco/config/channels_needed.py).
    reads_photographs = True
    departures = ("dense_linear: a protocol of caco's own; its numbers cannot be compared with those of fine-tuning.",)

    @held
    def __init__(
        self,
        *,
        root: str | None = None,
        train: Literal["trainaug", "train"] = "trainaug",
        size: Side = 448,
        places: Count = 20,
        l2: AboveZero = 1e-3,
        max_iterations: Count = 500,
        precision: Precision = "fp32",
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        self.root, self.train, self.size, self.places, self.l2 = root, train, size, places, l2
        self.max_iterations, self.precision, self.when = max_iterations, precision, when
        self.protocol = metrics.dense_linear(
            train=train, size=size, places=places, l2=l2, max_iterations=max_iterations, precision=precision
        )

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Find the set.

        Raises:
            UserError: the set is incomplete, or tests on images that the encoder was trained on.
        """
        self._store, self._seed = store, seed
        self._set = found_voc2012(self.root, "dense_linear", self.train, store)

    def require(self, backbone: nn.Module) -> None:
        Maps(backbone, purpose="dense_linear")

    def inputs(self) -> list[Any]:
        """The images and labels, by cache key."""
        return [self._set.train.cache_key(), self._set.test.cache_key()]

    def image_sets(self) -> dict[str, str]:
        return {"voc2012": self._set.test.digest()}

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/voc2012_<measure>`, percent).

        Raises:
            UserError: the backbone is neither a ResNet nor a ViT from timm, or its features are not finite.
        """
        store = self._store
        if isinstance(backbone, RawPixels):
            store.say(f"{self.protocol} skips the baseline of raw pixels, which has no feature maps")
            return
        maps = Maps(backbone, purpose="dense_linear")
        with as_evaluated(backbone), torch.no_grad():
            x_ND, labels_N = self._labelled_places(maps)
            weight_DK, bias_K = torch.zeros(maps.width, len(CLASSES)), torch.zeros(len(CLASSES))
            if distributed.is_main():
                weight_DK, bias_K = self._fitted(x_ND, labels_N)
            distributed.wait_for_main()  # the regression may take longer than the time limit of a collective
            weight_DK, bias_K = (distributed.from_main(one.to(store.device)) for one in (weight_DK, bias_K))
            matrix_KK = self._confusion(maps, weight_DK, bias_K)
        for measure, value in pixel_metric.scores(matrix_KK).items():
            yield f"{self.protocol}/voc2012_{measure}", value

    def _labelled_places(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """The features, float32 [N P, D], and labels, int64 [N P], of the drawn places of all training images in order;
        on rank 0. Places without a label are left out.
        """
        store, images = self._store, self._set.train
        own = len(range(distributed.rank(), len(images), distributed.world()))
        if store.folder is None:
            pieces: list[Tensor] = []
            distributed.on_each(lambda: self._features_of(maps, 0, lambda rows, _: pieces.append(rows)))
            rows = torch.cat(pieces)
        else:
            made_from = {
                "dense_linear": store.digest_of(maps.backbone), "images": images.cache_key(), "size": self.size,
                "places": self.places,
                "seed": self._seed, "mean": store.views.mean, "std": store.views.std, "precision": self.precision,
                "device": store.device.type, "rank": distributed.rank(), "world": distributed.world(),
                **({"corrupt": "skip"} if store.loader.corrupt == "skip" else {}),
            }  # fmt: skip
            files = FeatureFiles(store.folder / "features")
            rows = distributed.on_each(
                lambda: files.get(made_from, own, lambda first, take: self._features_of(maps, first, take), batch=BATCH)
            )
        # Every rank has to send the same number of rows; a rank with one image less adds one without labels.
        each = -(-len(images) // distributed.world())
        padded = torch.cat([rows, torch.full((each - own, rows.shape[1]), UNLABELLED)])
        every = distributed.gather_on_main(padded.to(store.device)).cpu()
        if distributed.is_main():
            every = every.view(distributed.world(), each, -1).transpose(0, 1)
        placed = every.reshape(-1, maps.width + 1)
        labelled = placed[placed[:, -1] != UNLABELLED]
        return labelled[:, :-1], labelled[:, -1].long()

    def _features_of(self, maps: Maps, first: int, take: Callable[[Tensor, Tensor], Any]) -> None:
        """Call take([b, P (D + 1)], []) for each batch of this rank's images, from its image number `first` on. For
        each place the rows hold its features and its label. The label is -1 if an image has fewer than P labelled
        places, and everywhere in an unreadable image.
        """
        store, images, batch = self._store, self._set.train, list[tuple[Tensor, Tensor, Tensor]]()
        count = len(range(distributed.rank(), len(images), distributed.world()))

        def example(index: int) -> tuple[Tensor, Tensor, Tensor]:
            image, labels = images.read(index)
            pixels = np.array(resized(image, self.size, self.size))
            cells, classes = drawn_places(
                labels, maps.places(self.size), self.size, self.places, seed=mixed_seed(self._seed, index)
            )
            return torch.from_numpy(pixels), cells, classes

        nothing = (
            torch.zeros(self.size, self.size, 3, dtype=torch.uint8), torch.zeros(self.places, dtype=torch.int64),
            torch.full((self.places,), UNLABELLED),
        )  # fmt: skip
        made = one_by_one(example, images.files, store, name=self.protocol, verb="whose features are known", skip=first)
        for done, (_, one) in enumerate(made, start=first + 1):
            batch.append(nothing if one is None else one)
            if len(batch) == BATCH or done == count:
                pixels, cells, classes = (torch.stack(part).to(store.device) for part in zip(*batch, strict=True))
                features = self._maps_of(maps, pixels).flatten(2).transpose(1, 2)  # [b, places, D]
                chosen = features.gather(1, cells[..., None].expand(-1, -1, features.shape[-1]))
                take(torch.cat([chosen, classes[..., None]], dim=-1).flatten(1).cpu(), torch.empty(0))
                batch.clear()

    def _maps_of(self, maps: Maps, pixels: Tensor) -> Tensor:
        device = self._store.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = maps(self._store.views.normalise(pixels.to(device))).float()
        if not torch.isfinite(found).all():
            raise UserError("dense_linear: expected finite features, got inf or nan from the backbone")
        return found

    def _fitted(self, x_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [D, K] and bias [K] for features that are not standardised."""
        x_ND, labels_N = x_ND.to(self._store.device), labels_N.to(self._store.device)
        mean_D, scale_D = moments(x_ND)
        self._store.say(f"{self.protocol}: logistic regression of {len(x_ND):,} places")
        standardised_ND = (x_ND - mean_D) / scale_D
        weight_DK, bias_K = fit(
            standardised_ND, labels_N, num_classes=len(CLASSES), l2=self.l2, max_iterations=self.max_iterations
        )
        weight_DK = weight_DK / scale_D[:, None]
        return weight_DK, bias_K - mean_D @ weight_DK

    def _confusion(self, maps: Maps, weight_DK: Tensor, bias_K: Tensor) -> Tensor:
        """The confusion matrix of all test images, over all ranks, int64 [K, K]."""
        images, num_classes = self._set.test, len(CLASSES)
        matrix_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=self._store.device)

        def example(index: int) -> tuple[Tensor, Tensor]:
            image, labels = images.read(index)
            return torch.from_numpy(np.array(resized(image, self.size, self.size))), torch.from_numpy(labels)

        def count_pixels() -> None:
            for _, one in one_by_one(example, images.files, self._store, name=self.protocol):
                if one is None:
                    continue
                pixels, labels = one
                scores = (
                    torch.einsum("bdhw,dk->bkhw", self._maps_of(maps, pixels[None]), weight_DK) + bias_K[:, None, None]
                )
                square = maps.to_pixels(scores, self.size, self.size)
                whole = nn.functional.interpolate(square, labels.shape, mode="bilinear", align_corners=False)
                matrix_KK.add_(pixel_metric.confusion(labels.to(matrix_KK.device), whole[0].argmax(dim=0), num_classes))

        distributed.on_each(count_pixels)
        return distributed.sum_(matrix_KK)

    def work(self, backbone: Callable[[], nn.Module]) -> list[Work]:
        """The cost of computing features; that of the regression is unknown before it has run."""
        images, maps = NUM_IMAGES[self.train] + NUM_IMAGES["val"], Maps(backbone(), purpose="dense_linear")
        what = f"{self.protocol}: images of {self.size} px to take features of"
        return [work_of(what, images, maps, height=self.size, width=self.size, training=False)]


def drawn_places(labels: np.ndarray, at: Tensor, size: int, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw labelled places of an image that is resized to a square: their numbers, int64 [count], counted row by row,
    and their labels, float32 [count]. If there are fewer labelled places, the rest is place 0 with label -1.

    Args:
        labels: uint8 [H, W], of the image at its own size.
        at: the pixel of the square of each place in a row, from `Maps.places`; a place at `size` or beyond has no
            label.
        size: side of the square in pixels.
    """
    height, width = labels.shape
    inside = at.numpy()[at.numpy() < size]
    rows, columns = (((inside + 0.5) * pixels / size).astype(int) for pixels in (height, width))
    grid = np.full((len(at), len(at)), IGNORED)
    grid[: len(inside), : len(inside)] = labels[np.ix_(rows, columns)]
    labelled = np.flatnonzero(grid != IGNORED)
    cells = np.random.default_rng(seed).permutation(labelled)[:count]
    found = torch.full((count,), UNLABELLED)
    found[: len(cells)] = torch.from_numpy(grid.flatten()[cells]).float()
    return torch.from_numpy(np.pad(cells, (0, count - len(cells)))), found
