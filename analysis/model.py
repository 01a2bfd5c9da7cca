"""Figures that show what a trained model has learned. They read its checkpoint and images, and import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from analysis import style
from caco import metrics
from caco.banks.base import Bank
from caco.banks.rows import TWIN_COSINE
from caco.banks.scoring import unit_rows
from caco.config import folders
from caco.config.composition import instantiate
from caco.data.loaders.plain import plain_batches
from caco.data.sets.choosing import choose
from caco.data.sets.sources import Source, Splits, labels_of
from caco.engine.assembly import build_method
from caco.engine.channels import views_of
from caco.errors import UserError
from caco.evals.evaluation import Evaluation
from caco.evals.extraction import extract
from caco.evals.knn import nearest
from caco.evals.pixels import RawPixels
from caco.methods.base import Method
from caco.runs.checkpoint import Checkpoints
from caco.runs.renamed import read_config

Data = list[dict[str, Any]]
SAME, OTHER = "#0072B2", "#D55E00"
MOST_PIXELS = 60_000  # largest number of images for k-NN on raw pixels, which would take hours on ImageNet


@dataclass(frozen=True)
class Trained:
    """A run's method with the weights of its newest checkpoint, and the run's images."""

    cfg: DictConfig
    method: Method
    splits: Splits
    views: Any
    step: int

    @property
    def bank(self) -> Bank | None:
        """The method's bank, or None if it has none."""
        return getattr(self.method, "bank", None)

    @property
    def key_encoder(self) -> torch.nn.Module:
        """The network that embeds the keys, which choose the positive rows (Eq. 11): the momentum twin, or the encoder
        of a method without a twin.
        """
        parts = dict(self.method.named_children())
        return parts["twin"].get_submodule("encoder") if "twin" in parts else parts["encoder"]

    def outputs(self, network: torch.nn.Module, source: Source) -> torch.Tensor:
        """A network's outputs for the plain (not augmented) views of all images, [N, D] float32."""
        return extract(network, plain_batches(source, self.views, batch=256), device="cpu", precision="fp32")[0]


def load(run_dir: Path, data_root: str | None = None) -> Trained:
    """Load a run's method and images.

    Args:
        data_root: where the images are now; None if they are where the run read them.
    Raises:
        UserError: there is no run in this directory, it has no checkpoint, or the images are not those that it was
            trained on.
    """
    if not (run_dir / "config.yaml").is_file():
        made = sorted(str(path.parent.parent) for path in Path("runs").glob("*/*/checkpoints/step_*.pt"))
        listed = "".join(f"\n  {name}" for name in dict.fromkeys(made[-8:]))
        raise UserError(f"{run_dir}: expected a run's directory, got none." + (f" There are:{listed}" if made else ""))
    cfg = OmegaConf.create(read_config(run_dir))
    folders.use_recorded(cfg.get("config_dir"))
    if data_root is not None:
        cfg.data.root = data_root
    newest = Checkpoints(run_dir / "checkpoints").load_newest()
    if newest is None:
        raise UserError(f"{run_dir}: this run has no checkpoint; start its command again to train it")
    splits = instantiate(cfg.data)
    digest = splits.pretrain.digest()
    if digest != newest[0]["data_digest"]:
        raise UserError(
            f"{run_dir}: expected the images that it was trained on ({newest[0]['data_digest']}), got others ({digest})"
        )
    method = build_method(cfg)
    method.load_state_dict(newest[0]["method"])
    return Trained(cfg, method.eval(), splits, views_of(cfg, splits, run_dir=run_dir), newest[0]["step"])


def figure_3(run_dir: Path, *, data_root: str | None, queries: int, seed: int) -> tuple[Figure, Data]:
    """The paper's Figure 3: for some test images, the training images nearest to their positive and negative rows.

    A row of the bank is not an image, so the figure shows the training image whose embedding is nearest to it. The
    momentum encoder computes all embeddings, as it does when positives are chosen (Eq. 11). The negatives shown are the
    next most probable rows, which are the hardest, and some rows drawn at random.
    """
    trained = load(run_dir, data_root)
    method, bank = trained.method, trained.bank
    if bank is None:
        raise UserError(
            f"{run_dir}: this run has no bank, and so no learned positives and negatives; expected a run with pn=both"
            " or pn=negative"
        )
    train, test = trained.splits.labelled("Figure 3")
    train_labels, test_labels = labels_of(train), labels_of(test)
    generator = np.random.default_rng(seed)
    chosen = _one_of_each_class(test_labels, queries, generator)
    with torch.inference_mode():
        k_TD, images_ND = trained.outputs(trained.key_encoder, test), trained.outputs(trained.key_encoder, train)
        m_KD = unit_rows(bank.rows.weight)[0].float()
        positive_T = nearest(k_TD, m_KD, k=1)[1][:, 0]
        cosine_K1, image_K1 = nearest(m_KD, images_ND, k=1)
        tau = bank.temperature or float(getattr(method, "temperature"))
        p_QK = torch.softmax(k_TD[chosen] @ m_KD.T / tau, dim=1)
        hard, drawn = 4, 3
        order_QR = p_QK.topk(1 + hard, dim=1).indices
        others_QR = torch.from_numpy(generator.integers(bank.size, size=(len(chosen), drawn)))
        rows_QR = torch.cat([order_QR, others_QR], 1)
    cosine_QR, index_QR = cosine_K1[rows_QR, 0], image_K1[rows_QR, 0]

    columns = [
        "query",
        "positive:\nmost probable",
        *(f"hard\nnegative {i}" for i in range(1, hard + 1)),
        *["random\nnegative"] * drawn,
    ]
    figure = Figure(figsize=(style.PAGE, 0.93 * len(chosen) + 0.55))
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    names = train.classes or [str(label) for label in range(int(train_labels.max()) + 1)]
    data: Data = []
    for q, image in enumerate(chosen):
        label = int(test_labels[image])
        _show(axes[q, 0], test.image(int(image)), names[label], "#000000", solid=True)
        for r in range(rows_QR.shape[1]):
            found = int(index_QR[q, r])
            p, same = float(p_QK[q, rows_QR[q, r]]), int(train_labels[found]) == label
            caption = f"{names[int(train_labels[found])]}\np {_small(p)}"
            _show(axes[q, r + 1], train.image(found), caption, SAME if same else OTHER, solid=same)
            kind = "positive" if r == 0 else "hard negative" if r <= hard else "random negative"
            data.append(
                {"query": int(image), "query_class": names[label], "kind": kind, "row": int(rows_QR[q, r]),
                "probability": p,
                 "nearest_image": found, "class": names[int(train_labels[found])], "cosine": float(cosine_QR[q, r])}
            )  # fmt: skip
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=6)
    # The footnote's shares are over all test images, not only those shown.
    label_K = train_labels[image_K1[:, 0].numpy()]
    share = np.mean(label_K[positive_T.numpy()] == test_labels)
    chance = (np.bincount(label_K, minlength=len(names)) / bank.size)[test_labels].mean()
    style.footnote(
        figure,
        "Each bank row is shown as the training image nearest to it, with a solid blue frame if that image has the"
        " query's class and a dashed orange frame if not. p: the row's probability in the softmax over all"
        f" {bank.size:,} rows. Step {trained.step:,}. Of all {len(test):,} test images,"
        f" {share:.0%} have a positive of their class (a row drawn at random: {chance:.0%}). Together the test images"
        f" choose {len(positive_T.unique()):,} different rows.",
    )
    return figure, data


def _one_of_each_class(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of up to `count` images, drawn from the classes in turn."""
    classes = generator.permutation(np.unique(labels))
    turns = [classes[i % len(classes)] for i in range(count)]
    chosen: list[int] = []
    for c in turns:
        free = np.setdiff1d(np.flatnonzero(labels == c), chosen)
        chosen += [int(generator.choice(free))] if len(free) else []
    return np.array(chosen)


def _small(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")


def _show(axes: Any, image: Any, caption: str, colour: str, *, solid: bool) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.set_xlabel(caption, fontsize=5.5, labelpad=1.5)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.6, linestyle="-" if solid else (0, (2, 1.2)), capstyle="butt")


def figure_5(run_dir: Path, *, data_root: str | None, images: int, seed: int) -> tuple[Figure, Data]:
    """The paper's Figure 5: t-SNE of the backbone's features of test images, by class."""
    from sklearn.manifold import TSNE  # not at the top: the import takes a second, and only this figure needs it

    trained = load(run_dir, data_root)
    _, test = trained.splits.labelled("Figure 5")
    chosen = choose(test.labels, min(images, len(test)), len(test), seed=seed, balanced=True)
    some = test.part(chosen, "some")
    labels = labels_of(some)
    features_ND = torch.nn.functional.normalize(trained.outputs(trained.method.backbone, some), dim=1).numpy()
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    placed = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features_ND)
    figure = Figure(figsize=(style.PAGE * 0.75, 3.6))
    axes = figure.subplots()
    names = test.classes or [str(label) for label in range(int(labels_of(test).max()) + 1)]
    for number, label in enumerate(np.unique(labels)):
        of_class = placed[labels == label]
        look = {"color": style.CLASS_COLOURS[number % 10], "marker": "os^Dv"[number // 2 % 5]}
        axes.scatter(of_class[:, 0], of_class[:, 1], s=7, linewidths=0, alpha=0.8, label=names[int(label)], **look)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2", aspect="equal")
    axes.grid(visible=False)
    if len(names) <= 20:
        figure.legend(loc="outside right upper", markerscale=2)
    style.footnote(
        figure,
        f"{len(chosen):,} images of {test.name}; features of the backbone at step {trained.step:,}; t-SNE with"
        f" perplexity {perplexity:g}. Distances between groups, and the sizes of groups, mean little in t-SNE.",
    )
    data = [
        {"image": int(image), "class": names[int(label)], "x": float(x), "y": float(y)}
        for image, label, (x, y) in zip(chosen, labels, placed, strict=True)
    ]
    return figure, data


@dataclass(frozen=True)
class BankRows:
    """R rows of a bank, each with the N training images nearest to it. An image chooses the row most probable for it.

    Args:
        images: the images that were embedded.
        row_R: the index of each row in the bank.
        uses_R: how many of the images choose each row.
        image_RN: positions of the nearest images in `images`, the nearest first.
        cosine_RN: cosines between row and image.
        label_RN: the labels of these images; None if the images have no labels.
        num_used: how many rows of the whole bank are chosen by some image.
        num_frequent: from how many of the most chosen rows the R rows were picked.
        share_frequent: the share of the images that choose one of those rows.
        agreement: how many of a row's N nearest images have the most common label among them, as a share, averaged over
            all rows that are chosen; None without labels.
        chance: the same for N images drawn at random.
    """

    images: Source
    row_R: torch.Tensor
    uses_R: torch.Tensor
    image_RN: torch.Tensor
    cosine_RN: torch.Tensor
    label_RN: np.ndarray | None
    num_used: int
    num_frequent: int
    share_frequent: float
    agreement: float | None
    chance: float | None


def bank_rows(trained: Trained, *, count: int = 8, num_nearest: int = 8, num_images: int = 10_000) -> BankRows:
    """Pick rows that are often chosen and far from one another, and find the training images nearest to them.

    As in training, the key of an image chooses its row, but here the key is that of the plain view.

    Args:
        count: the largest number of rows; there are fewer if the rest are near-duplicates of rows already taken.
        num_nearest: how many images to find for each row.
        num_images: the largest number of images to embed; from a larger set this many are drawn, balanced over classes.
    """
    images, bank = trained.splits.pretrain, trained.bank
    assert bank is not None, "the caller has checked that there is a bank"
    if num_images < len(images):
        images = images.part(choose(images.labels, num_images, len(images), seed=0, balanced=True), images.name)
    num_nearest = min(num_nearest, len(images))
    with torch.inference_mode():
        k_ND = trained.outputs(trained.key_encoder, images)
        m_KD = unit_rows(bank.rows.weight)[0].float()
        uses_K = torch.bincount(bank.rows.most_probable(k_ND), minlength=bank.size)
        used, frequent = uses_K.nonzero()[:, 0], most_chosen(uses_K, least=3 * count)
        row_R = frequent[far_apart(m_KD[frequent], count)]
        cosine_RN, image_RN = nearest(m_KD[row_R], k_ND, k=num_nearest)
        label_RN = agreement = chance = None
        if images.labels is not None:
            label_RN = images.labels[image_RN.numpy()]
            alike = most_common(label_RN)[0].argsort(kind="stable")  # show rows with the same label side by side
            row_R, cosine_RN, image_RN, label_RN = row_R[alike], cosine_RN[alike], image_RN[alike], label_RN[alike]
            of_used = images.labels[nearest(m_KD[used], k_ND, k=num_nearest)[1].numpy()]
            drawn = np.random.default_rng(0).choice(images.labels, (1000, num_nearest))
            agreement, chance = (float(most_common(labels)[1].mean() / num_nearest) for labels in (of_used, drawn))
    share = float(uses_K[frequent].sum() / len(images))
    return BankRows(
        images, row_R, uses_K[row_R], image_RN, cosine_RN, label_RN, len(used), len(frequent), share, agreement, chance
    )


def most_chosen(uses_K: torch.Tensor, *, least: int) -> torch.Tensor:
    """The most used rows, as few as have half of all uses together, but at least `least` (or all that are used).

    They are sorted by use, the most used first, and then by index.
    """
    order = uses_K.argsort(descending=True, stable=True)
    half = int((uses_K[order].cumsum(0) * 2 < uses_K.sum()).sum()) + 1
    return order[: max(half, min(least, int((uses_K > 0).sum())))]


def far_apart(m_RD: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of at most `count` unit rows that are far apart, by farthest-point sampling from the first row on.

    Stops early when all remaining rows are near-duplicates of a row already taken.
    """
    taken = [0]
    closest_R = m_RD @ m_RD[0]
    while len(taken) < count and closest_R.min() < TWIN_COSINE:
        taken.append(int(closest_R.argmin()))
        closest_R = torch.maximum(closest_R, m_RD @ m_RD[taken[-1]])
    return torch.tensor(taken)


def most_common(label_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most common label of each row (the smallest if several are), and how often it occurs; both [R]."""
    found = [np.unique(labels, return_counts=True) for labels in label_RN]
    return np.array([values[counts.argmax()] for values, counts in found]), np.array(
        [counts.max() for _, counts in found]
    )


def pixels_knn(trained: Trained) -> float | None:
    """The accuracy in percent of the run's k-NN evaluator on raw pixels, with the same images; None for sets that would
    take too long.
    """
    (name, node), *_ = ((name, node) for name, node in trained.cfg.eval.items() if metrics.knn_metric({name: node}))
    splits = trained.splits
    train, test = splits.labelled("k-NN of raw pixels")
    if node.fraction * len(train) + len(test) > MOST_PIXELS:
        return None
    # The features are the pixels themselves, so precision and device do not matter.
    evaluation = Evaluation(
        {name: instantiate(node)},
        splits,
        trained.views,
        batch=256,
        device="cpu",
        precision="fp32",
        seed=trained.cfg.seed,
    )
    (accuracy,) = evaluation.run(
        RawPixels(trained.cfg.augmentation.size, channels=trained.views.channels or 3), "end"
    ).values()
    return accuracy
