"""Figures of what a trained model has learned; these read a checkpoint and the images, and import torch."""

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
from caco.data.sets.sources import Source, Splits, choose, labels_of
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
MOST_PIXELS = 60_000  # images: k-NN of raw pixels takes seconds for a small set, and hours for ImageNet


@dataclass(frozen=True)
class Trained:
    """A run's method as its newest checkpoint has it, and the images that it saw."""

    cfg: DictConfig
    method: Method
    splits: Splits
    views: Any
    step: int

    @property
    def bank(self) -> Bank | None:
        """None where the method has none."""
        return getattr(self.method, "bank", None)

    @property
    def key_encoder(self) -> torch.nn.Module:
        """What embeds the keys, which choose rows (Eq. 11): the momentum twin, or the encoder where there is none."""
        parts = dict(self.method.named_children())
        return parts["twin"].get_submodule("encoder") if "twin" in parts else parts["encoder"]

    def outputs(self, network: torch.nn.Module, source: Source) -> torch.Tensor:
        """What a network makes of every image's plain view, [N, D] float32."""
        return extract(network, plain_batches(source, self.views, batch=256), device="cpu", precision="fp32")[0]


def load(run_dir: Path, data_root: str | None = None) -> Trained:
    """A run's method and images.

    Args:
        data_root: where the images are now; None is where the run read them.
    Raises:
        UserError: no run there, or none that has a checkpoint.
        ValueError: the images are not those that the run was trained on.
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
        raise UserError(f"{run_dir}: has no checkpoint; start its command again to train it")
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
    """The paper's Figure 3: for some test images, the training images nearest to their positive and negatives.

    A row of the bank is no image; in its place stands the training image whose embedding is nearest to it. The momentum
    encoder embeds, as it does when it picks positives (Eq. 11). Negatives: the rows that come next, which are the
    hardest, and some drawn from all rows.
    """
    trained = load(run_dir, data_root)
    method, bank = trained.method, trained.bank
    if bank is None:
        raise UserError(
            f"{run_dir}: has no bank, so no learned positives and negatives; expected a run with pn=both or pn=negative"
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
        "most probable:\npositive",
        *(f"negative,\nnext {i}" for i in range(1, hard + 1)),
        *["negative,\ndrawn"] * drawn,
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
            kind = "positive" if r == 0 else "negative, next" if r <= hard else "negative, drawn"
            data.append(
                {"query": int(image), "query_class": names[label], "kind": kind, "row": int(rows_QR[q, r]),
                "probability": p,
                 "nearest_image": found, "class": names[int(train_labels[found])], "cosine": float(cosine_QR[q, r])}
            )  # fmt: skip
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=6)
    # Of every test image, not only of those shown.
    label_K = train_labels[image_K1[:, 0].numpy()]
    share = np.mean(label_K[positive_T.numpy()] == test_labels)
    chance = (np.bincount(label_K, minlength=len(names)) / bank.size)[test_labels].mean()
    style.footnote(
        figure,
        "Rows of the bank, shown as the training image nearest to them. Solid blue: of the query's class; dashed"
        f" orange: of another. p: of {bank.size:,} rows. Step {trained.step:,}. Of all {len(test):,} test images,"
        f" {share:.0%} have a positive of their class (a row drawn at random: {chance:.0%}); they share"
        f" {len(positive_T.unique()):,} rows.",
    )
    return figure, data


def _one_of_each_class(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` images, of as many classes as there are."""
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
    from sklearn.manifold import TSNE  # here and not above: a second that the other figures do not need

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
        f"{len(chosen):,} images of {test.name}, features at step {trained.step:,}, perplexity {perplexity:g}."
        " Distances between groups, and their sizes, mean little in t-SNE.",
    )
    data = [
        {"image": int(image), "class": names[int(label)], "x": float(x), "y": float(y)}
        for image, label, (x, y) in zip(chosen, labels, placed, strict=True)
    ]
    return figure, data


@dataclass(frozen=True)
class BankRows:
    """Some rows of a bank, R of them, each with the N training images nearest to it.

    images: those that were embedded; `image_RN` are their positions, `label_RN` their labels, None where there are
    none. row_R, uses_R: which rows, and how many of the images choose each.
    image_RN, cosine_RN: nearest first.
    num_used: rows of the whole bank that some image chooses.
    num_frequent, share_frequent: rows among which those shown were picked, the most chosen ones, and how much of the
        images they take.
    agreement, chance: over all rows that are used, the mean share of the N nearest images that have the most common
        label among them, and the same of N images drawn at random; None without labels.
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
    """Rows that are often chosen and far from one another, and what lies nearest to them.

    As in training the images' keys choose; here those of their plain views.

    Args:
        count: rows, at most: of near-duplicates one is taken.
        num_images: embedded, at most: of a larger set so many are drawn, equally from the classes.
    """
    images, bank = trained.splits.pretrain, trained.bank
    assert bank is not None, "whoever asks for its rows has looked"
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
            alike = most_common(label_RN)[0].argsort(kind="stable")  # rows of one label stand together
            row_R, cosine_RN, image_RN, label_RN = row_R[alike], cosine_RN[alike], image_RN[alike], label_RN[alike]
            of_used = images.labels[nearest(m_KD[used], k_ND, k=num_nearest)[1].numpy()]
            drawn = np.random.default_rng(0).choice(images.labels, (1000, num_nearest))
            agreement, chance = (float(most_common(labels)[1].mean() / num_nearest) for labels in (of_used, drawn))
    share = float(uses_K[frequent].sum() / len(images))
    return BankRows(
        images, row_R, uses_K[row_R], image_RN, cosine_RN, label_RN, len(used), len(frequent), share, agreement, chance
    )


def most_chosen(uses_K: torch.Tensor, *, least: int) -> torch.Tensor:
    """As few rows as together have half of the uses, but `least` where so many are used; the most used first, then the
    lower index.
    """
    order = uses_K.argsort(descending=True, stable=True)
    half = int((uses_K[order].cumsum(0) * 2 < uses_K.sum()).sum()) + 1
    return order[: max(half, min(least, int((uses_K > 0).sum())))]


def far_apart(m_RD: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of at most `count` unit rows: the first, then in turn the one whose nearest among those taken is
    farthest.

    It ends early where all that are left are near-duplicates of one taken.
    """
    taken = [0]
    closest_R = m_RD @ m_RD[0]
    while len(taken) < count and closest_R.min() < TWIN_COSINE:
        taken.append(int(closest_R.argmin()))
        closest_R = torch.maximum(closest_R, m_RD @ m_RD[taken[-1]])
    return torch.tensor(taken)


def most_common(label_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the label that it has most of, the smallest of equals, and how often; [R] each."""
    found = [np.unique(labels, return_counts=True) for labels in label_RN]
    return np.array([values[counts.argmax()] for values, counts in found]), np.array(
        [counts.max() for _, counts in found]
    )


def pixels_knn(trained: Trained) -> float | None:
    """Raw pixels' k-NN accuracy in percent, by the run's own k-NN on the same images; None where it would take too
    long.
    """
    (name, node), *_ = ((name, node) for name, node in trained.cfg.eval.items() if metrics.knn_metric({name: node}))
    splits = trained.splits
    train, test = splits.labelled("k-NN of raw pixels")
    if node.fraction * len(train) + len(test) > MOST_PIXELS:
        return None
    # Nothing is multiplied to make these features, so no precision and no device changes them.
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
