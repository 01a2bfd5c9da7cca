"""`python -m analysis.picture`: the picture shows what the run's ledger, bank and images say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny import BANK, TINY, train

from analysis import model, picture
from caco.config import composition
from caco.config.composition import instantiate
from caco.errors import UserError
from caco.runs.directory import open_run

LIMIT, STEPS_PER_EPOCH = 256, 4  # of the digits, at the tiny batch


def made(run_dir: Path, *overrides: str) -> Path:
    open_run(run_dir, composition.job_config(composition.compose([*TINY, *BANK, *overrides])))
    train(run_dir, *overrides)
    return run_dir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two warm-start steps and one epoch."""
    return made(tmp_path_factory.mktemp("runs") / "one", f"data.limit={LIMIT}", "max_steps=null", "epochs=1")


@pytest.fixture
def here(command):
    """main() in an empty directory: `here("runs/NAME")` returns (exit code, output, errors)."""
    return command(picture)


def colours(path: Path) -> int:
    """The number of colours in a picture; a blank picture has one."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        counted = image.convert("RGB").getcolors(2**24)
        assert counted is not None, "the picture has more colours than getcolors can count"
        return len(counted)


def drawn(run_dir: Path, monkeypatch, *arguments: str):
    """The figure that main() saves."""
    figures = []
    whole = picture.draw

    def kept(*args, **kwargs):
        figures.append(whole(*args, **kwargs))
        return figures[0]

    monkeypatch.setattr(picture, "draw", kept)
    monkeypatch.setattr(sys, "argv", ["picture", str(run_dir), *arguments])
    picture.main()
    return figures[0]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# The command.


def test_a_run_is_drawn_into_its_directory_the_same_each_time_and_the_path_is_printed_last(run, here):
    code, told, errors = here(str(run))
    assert code == 0, errors
    assert told.splitlines()[-1] == f"{run}/picture.png"
    assert colours(run / "picture.png") > 50
    code, told, _ = here(str(run), "--to", "elsewhere/again.png")
    assert code == 0 and told.splitlines()[-1] == "elsewhere/again.png"
    assert Path("elsewhere/again.png").read_bytes() == (run / "picture.png").read_bytes()


def test_the_overrides_that_trained_a_run_name_its_directory(monkeypatch, tmp_path):
    """`make demo` gives the same overrides to caco.train and to analysis.picture."""
    from caco import train as command

    monkeypatch.chdir(tmp_path)
    few = [item for item in TINY if not item.startswith(("eval", "max_steps"))]
    overrides = [*few, *BANK, f"data.limit={LIMIT}", "max_steps=1", "eval=[]", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["caco-train", *overrides])
    command.main()
    (summary,) = tmp_path.glob("runs/caco/*/summary.json")
    assert picture.directory(overrides) == summary.parent.relative_to(tmp_path)
    summary.parent.rename("elsewhere")
    assert picture.directory([*overrides, "hydra.run.dir=elsewhere"]) == Path("elsewhere")
    with pytest.raises(UserError, match="got no such directory"):
        picture.directory(overrides)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["nowhere"],
            "nowhere: expected a run's directory, or overrides such as preset=demo seed=1, got no such directory",
        ),
        (["."], "got a directory without a run's config.yaml"),
        (
            ["preset=demo", "seed=9"],
            "expected the run that python -m caco.train preset=demo seed=9 makes, got no such directory",
        ),
        (["preset=demo", "sed=9"], "sed: no such key; did you mean seed?"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(here, arguments, words):
    code, told, errors = here(*arguments)
    assert (code, told) == (2, "")
    assert errors.startswith("caco: ") and words in errors and errors.count("\n") == 1


@pytest.mark.parametrize("words", [["--to", "picture.xyz"], ["--to", "."], ["--images", "0"]])
def test_what_cannot_be_drawn_is_refused_before_the_run_is_read(run, here, words):
    code, told, errors = here(str(run), *words)
    assert (code, told) == (2, "") and errors.startswith(f"caco: {words[0]}: expected")


def test_a_refusal_imports_neither_torch_nor_matplotlib(tmp_path):
    program = (
        "import sys; from analysis import picture; sys.argv = ['picture', 'nowhere']\n"
        "try: picture.main()\n"
        "except SystemExit as end: print(end.code, [name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "2 []\n"


# The rows.


def test_the_rows_shown_are_those_that_the_keys_choose_and_the_images_those_nearest_to_them(run):
    """Compared with an independent dense computation in float64, image by image."""
    from caco.engine.assembly import build_method
    from caco.runs.checkpoint import Checkpoints

    shown = model.bank_rows(model.load(run), count=5, num_nearest=6)

    cfg = OmegaConf.load(run / "config.yaml")
    method = build_method(cfg)
    method.load_state_dict(Checkpoints(run / "checkpoints").load_newest()[0]["method"])
    views, images = instantiate(cfg.augmentation), instantiate(cfg.data).pretrain
    network = method.twin.encoder.eval().double()
    with torch.no_grad():
        pixels = torch.stack([torch.as_tensor(views.plain(images.image(i))) for i in range(len(images))]).double()
        k_ND = torch.nn.functional.normalize(network.projector(network.backbone(pixels)), dim=1)
        m_KD = torch.nn.functional.normalize(method.bank.rows.weight.detach().double(), dim=1)
    cosine_KN = m_KD @ k_ND.T
    uses_K = cosine_KN.argmax(0).bincount(minlength=len(m_KD))
    assert shown.num_used == (uses_K > 0).sum()
    assert shown.uses_R.tolist() == uses_K[shown.row_R].tolist()
    for r, row in enumerate(shown.row_R.tolist()):
        assert shown.cosine_RN[r].tolist() == pytest.approx(cosine_KN[row].topk(6).values.tolist(), abs=1e-5)
        assert shown.cosine_RN[r].tolist() == pytest.approx(cosine_KN[row, shown.image_RN[r]].tolist(), abs=1e-5)
        assert shown.label_RN[r].tolist() == images.labels[shown.image_RN[r].numpy()].tolist()

    # The rows shown are picked from the most chosen rows, which take half of the images: first the most chosen one,
    # then in turn the one farthest from those picked.
    used = [row for row in range(len(m_KD)) if uses_K[row]]
    ordered = sorted(used, key=lambda row: (-uses_K[row], row))
    half = next(n for n in range(1, len(used)) if 2 * uses_K[ordered[:n]].sum() >= len(images))
    frequent = ordered[: max(half, 3 * 5)]
    assert shown.num_frequent == len(frequent)
    assert shown.share_frequent == pytest.approx(uses_K[frequent].sum().item() / len(images))
    picked = [frequent[0]]
    while len(picked) < 5:
        nearest = (m_KD[frequent] @ m_KD[picked].T).amax(1)
        if nearest.min() > 0.99:
            break
        picked.append(frequent[int(nearest.argmin())])
    assert sorted(shown.row_R.tolist()) == sorted(picked)

    shares = [np.bincount(images.labels[cosine_KN[row].topk(6).indices.numpy()]).max() / 6 for row in used]
    assert shown.agreement == pytest.approx(np.mean(shares), abs=0.02)  # float32 may swap two images
    # The expected largest share of one class among 6 images that are drawn from ten classes.
    assert shown.chance == pytest.approx(0.36, abs=0.03)


def test_each_line_says_what_its_images_have_in_common_and_frames_those_of_another_label(run, monkeypatch):
    axes = drawn(run, monkeypatch).axes[-1]
    shown = model.bank_rows(model.load(run))
    assert len(axes.images) == shown.image_RN.numel()
    said = texts(axes)
    odd = 0
    for r, labels in enumerate(shown.label_RN):
        counts = np.bincount(labels)
        odd += len(labels) - counts.max()
        assert f"{counts.max()} of {len(labels)}: {counts.argmax()}" in said
        assert f"cosine {shown.cosine_RN[r, 0]:.2f} to {shown.cosine_RN[r, -1]:.2f}" in said
        assert f"row {shown.row_R[r]:,}" in said and f"chosen by {shown.uses_R[r]:,}" in said
    assert len(axes.patches) == odd


def test_the_most_chosen_rows_take_half_of_the_images_or_are_as_many_as_asked_for():
    uses_K = torch.tensor([0, 3, 10, 3, 0, 2, 2])
    assert model.most_chosen(uses_K, least=1).tolist() == [2]
    assert model.most_chosen(uses_K + 1, least=1).tolist() == [2, 1], (
        "11 of 27 uses are less than half, so a second row is needed"
    )
    assert model.most_chosen(uses_K, least=3).tolist() == [2, 1, 3]
    assert model.most_chosen(uses_K, least=9).tolist() == [2, 1, 3, 5, 6], "a row that no image chooses is never shown"


def test_near_duplicates_are_shown_once():
    m_RD = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.001], [0.0, 1.0], [1.0, 1.0], [0.001, 1.0]]), dim=1
    )
    assert model.far_apart(m_RD, 8).tolist() == [0, 2, 3]
    assert model.far_apart(m_RD, 2).tolist() == [0, 2]
    assert model.far_apart(m_RD[:2], 8).tolist() == [0], "a collapsed bank is shown as one row"


def test_a_large_set_is_sampled_and_the_picture_says_so(run, monkeypatch):
    figure = drawn(run, monkeypatch, "--images", "100")
    note = " ".join(figure.texts[-1].get_text().split())
    assert note.startswith("The keys of 100 training images choose")
    assert {image.get_size() for image in figure.axes[-1].images} == {(16, 16)}


def test_a_queues_rows_are_shown_too_and_the_encoder_embeds_where_there_is_no_twin(tmp_path, monkeypatch):
    overrides = [
        "method=nnclr",
        "projector=small",
        "projector.hidden_dim=16",
        "projector.dim=8",
        f"data.limit={LIMIT}",
        "max_steps=2",
    ]
    figure = drawn(made(tmp_path / "queue", *overrides), monkeypatch)
    curve, rows = figure.axes
    assert len(rows.images) > 0 and "of the 128 rows" in " ".join(figure.texts[-1].get_text().split())
    assert not any("warm start" in text for text in texts(curve))


def test_images_without_labels_are_shown_without_words_about_them(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(64):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{i:02}.png"
        )
    data = ["data=folder", f"data.root={tmp_path}/images", "eval=[]"]
    run_dir = made(tmp_path / "run", *data, "batch=32", "bank.size=32", "max_steps=2")
    figure = drawn(run_dir, monkeypatch)
    (axes,) = figure.axes
    assert len(axes.images) % 8 == 0 and len(axes.images) > 0
    assert not axes.patches and not any(" of 8" in text for text in texts(axes))
    assert not any("label" in text.get_text() for text in figure.texts)


# The curve.


def row(step, epochs, knn, **more):
    return {"kind": "eval", "step": step, "time": 0.0, "epochs": epochs, "knn20_top1": knn, **more}


def test_what_came_before_epoch_0_is_left_of_it():
    ledger = [
        row(0, 0.0, 50.0),
        {"kind": "train", "step": 10, "time": 0.0, "epoch": 0, "loss": 3.0},
        row(40, 0.0, 60.0, phase="warm start"),
        row(60, 1.0, 70.0),
        row(80, 2.0, 80.0, probe_top1=90.0),
        {"kind": "eval", "step": 80, "time": 0.0, "knn20_top1": 81.0},  # added by caco.evaluate after the training
    ]
    curve = picture.curve_of(ledger, "knn20_top1", 20)
    assert curve == picture.Curve(
        "knn20_top1", [-2.0, 0.0, 1.0, 2.0], [50.0, 60.0, 70.0, 80.0], steps_before=40, starts_at_0=True
    )
    old = [entry for entry in ledger if "phase" not in entry]
    assert picture.curve_of(old, "knn20_top1", 20) == picture.Curve(
        "knn20_top1", [-2.0, 1.0, 2.0], [50.0, 70.0, 80.0], 40, True
    )
    assert picture.curve_of(ledger[:3], "knn20_top1", 20) == picture.Curve(
        "knn20_top1", [-2.0, 0.0], [50.0, 60.0], 40, True
    ), "a run that was killed after its warm start"
    assert picture.curve_of(ledger[:1], "knn20_top1", 20) == picture.Curve("knn20_top1", [0.0], [50.0], 0, True)
    assert picture.curve_of(ledger[1:2], "knn20_top1", 20) is None


def test_a_runs_warm_start_is_shaded(run, monkeypatch):
    axes = drawn(run, monkeypatch).axes[0]
    assert "warm start: 2 steps" in texts(axes)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(-2 / STEPS_PER_EPOCH)
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(1.0)


def test_a_run_without_a_bank_is_its_curve_beside_untrained_and_raw_pixels(tmp_path, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    from caco.evals.knn import balanced_share
    from caco.tracking.ledger import read_rows

    run_dir = tmp_path / "none"
    overrides = ["pn=none", f"data.limit={LIMIT}", "max_steps=3", "epochs=1"]
    open_run(run_dir, composition.job_config(composition.compose([*TINY, *overrides])))
    train(run_dir, *overrides, bank=False)
    figure = drawn(run_dir, monkeypatch)
    (axes,) = figure.axes
    evaluated = [entry for entry in read_rows(run_dir / "ledger.jsonl")[0] if entry["kind"] == "eval"]
    assert list(axes.lines[0].get_ydata()) == [entry["knn20_20pct_top1"] for entry in evaluated] and len(evaluated) == 2

    cfg = OmegaConf.load(run_dir / "config.yaml")
    splits, views = instantiate(cfg.data), instantiate(cfg.augmentation)

    def pixels(source, indices):
        flat = np.stack([np.asarray(views.plain(source.image(int(i)))).reshape(-1) for i in indices]).astype(np.float64)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    bank = balanced_share(splits.train.labels, fraction=cfg.eval.knn.fraction, seed=cfg.seed)
    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    knn.fit(pixels(splits.train, bank), splits.train.labels[bank])
    raw = 100 * knn.score(pixels(splits.test, range(len(splits.test))), splits.test.labels)
    levels = {text: float(value) for value, text in zip(texts(axes)[::2], texts(axes)[1::2], strict=True)}
    assert levels == {
        "raw pixels": pytest.approx(raw, abs=0.3),  # 0.25 is one of 397 images, with a tie between two classes
        "untrained": pytest.approx(evaluated[0]["knn20_20pct_top1"], abs=0.05),
        "trained": pytest.approx(evaluated[-1]["knn20_20pct_top1"], abs=0.05),
    }
    assert f"of {len(splits.test)} images of digits/test, in percent" in [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("levels", [[92.7, 93.7, 98.7], [97.9, 98.0, 98.0], [10.0, 10.1, 50.0]])
def test_the_values_beside_the_curve_never_lie_on_one_another(levels):
    places = picture.spread(levels, 0.8)
    assert min(np.diff(places)) >= 0.8 - 1e-9
    assert np.mean(places) == pytest.approx(np.mean(levels))
    if min(np.diff(levels)) >= 0.8:
        assert places == levels
