"""Real photographs: all ways to decode a JPEG give the same pixels, and views agree with torchvision's transforms on
Pillow images.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from caco.data.sets.beton import beton
from caco.data.sets.folders import folder
from caco.data.views import native
from caco.data.views.augmentation import View, Views
from caco.data.views.draws import uniforms
from caco.data.views.geometry import crop_box
from caco.write import write_splits

CONF = Path(__file__).resolve().parents[2] / "conf" / "augmentation"
WHOLE = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "jitter_p": 0.0, "gray_p": 0.0, "flip_p": 0.0}


@pytest.fixture(scope="module")
def photo_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sixth of the 250 photographs."""
    if native.library() is None or native.turbojpeg() is None:
        pytest.skip("the compiled views or libturbojpeg are missing")
    top = tmp_path_factory.mktemp("photos")
    with zipfile.ZipFile(shared_data / "imagenet-samples.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".JPEG"))[::6]:
            (top / Path(name).name).write_bytes(archive.read(name))
    return top


@pytest.fixture(scope="module")
def photographs(photo_folder: Path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in sorted(photo_folder.iterdir())]


def compiled(images: list[Image.Image], size: int, samples: np.ndarray | None = None, **settings) -> np.ndarray:
    """One compiled view of each image, uint8 [B, size, size, 3], with the random numbers of stream 4."""
    arrays = [np.asarray(image) for image in images]
    views = Views(size=size, views={"one": View(**settings)}, mean=[0.5] * 3, std=[0.5] * 3)
    out = [np.empty((len(arrays), size, size, 3), np.uint8)]
    samples = np.arange(len(arrays)) if samples is None else samples
    native.make_views(views.settings(), native.table(arrays), samples, 4, out, num_threads=2)
    return out[0]


def test_photographs_decode_alike_from_files_and_from_a_beton(photo_folder, tmp_path):
    """Pillow's libjpeg-turbo and the system's give the same pixels, so a run can resume with another loader."""
    files = folder(root=str(photo_folder), in_memory_mb=0).pretrain
    write_splits(folder(root=str(photo_folder), in_memory_mb=0), tmp_path)
    source = beton(root=str(tmp_path)).pretrain
    settings = OmegaConf.to_container(OmegaConf.load(CONF / "caco.yaml"))
    settings.pop("_target_")
    views = Views(**settings | {"size": 96})
    indices = np.arange(len(files))
    expected = views.batch_pixels([np.asarray(files.image(i)) for i in indices], indices, 4)
    made = [np.empty_like(view) for view in expected]
    assert not native.make_views(views.settings(), source.rows(indices), indices, 4, made, num_threads=2).any()
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))
    plain = np.empty((len(files), 96, 96, 3), np.uint8)
    assert not views.plain_batch(source.rows(indices), plain, num_threads=2).any()
    assert np.array_equal(plain, np.stack([views.plain_pixels(files.image(i)) for i in indices]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_torchvisions(photographs, interpolation):
    """They agree to one level of 255 (twelve for bicubic). Pillow 13 swaps the order of the two passes for tall crops,
    caco does not.
    """
    made = compiled(
        photographs, 224, scale=[0.2, 1.0], jitter_p=0.0, gray_p=0.0, flip_p=0.0, interpolation=interpolation
    )
    differ = 0
    for image, ours, u in zip(photographs, made, uniforms(4, np.arange(len(made)), 0).tolist(), strict=True):
        left, top, right, bottom = crop_box(*image.size, [0.2, 1.0], [3 / 4, 4 / 3], u[:20], u[20], u[21])
        theirs = F.resized_crop(
            image,
            top,
            left,
            bottom - top,
            right - left,
            [224, 224],
            v2.InterpolationMode(interpolation),
            antialias=True,
        )
        error = np.abs(ours.astype(int) - np.asarray(theirs))
        assert error.max() <= (1 if interpolation == "bilinear" else 12) and error.mean() < 0.35
        differ += error.any()
    assert differ < len(made) / 2


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation", "hue", "gray", "solarize", "flip"])
def test_steps_are_torchvisions(photographs, step):
    """With the same drawn parameters they are equal bit for bit."""
    squares = [image.resize((64, 64)) for image in photographs]
    jitter = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
    if step in jitter:
        strengths = [0.0] * 4
        strengths[jitter[step]] = 0.4
        made = compiled(squares, 64, **WHOLE | {"jitter_p": 1.0, "jitter": strengths})
    else:
        made = compiled(squares, 64, **WHOLE | {f"{step}_p": 1.0})
    for image, ours, u in zip(squares, made, uniforms(4, np.arange(len(made)), 0).tolist(), strict=True):
        if step in jitter:
            value = -0.4 + 0.8 * u[38] if step == "hue" else 0.6 + (1.4 - 0.6) * u[35 + jitter[step]]
            theirs = getattr(F, f"adjust_{step}")(image, value)
        else:
            theirs = {
                "gray": lambda image: F.rgb_to_grayscale(image, num_output_channels=3),
                "solarize": lambda image: F.solarize(image, 128),
                "flip": F.horizontal_flip,
            }[step](image)
        assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_pillows_and_near_the_gaussian(photographs, sigma):
    """Pillow approximates the Gaussian by three boxes; in this test that is within 12 levels of 255, 0.7 on average."""
    squares = [image.resize((96, 96)) for image in photographs]
    made = compiled(squares, 96, **WHOLE | {"blur_p": 1.0, "blur": [sigma, sigma]})
    exact = np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))) for image in squares])
    assert np.array_equal(made, exact)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in squares])).permute(0, 3, 1, 2).float()
    gauss = F.gaussian_blur(pixels, [17, 17], [sigma, sigma]).permute(0, 2, 3, 1).numpy()
    # at the border torchvision mirrors the image, and Pillow repeats its edge
    error = np.abs(made - gauss)[:, 8:-8, 8:-8]
    assert error.max() <= 12 and error.mean() < 0.7


def test_the_papers_pipelines_agree_with_torchvisions_in_means_and_variances(photographs):
    blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item())))

    def theirs(blur_p: float, solarize_p: float) -> v2.Transform:
        return v2.Compose(
            [
                v2.RandomResizedCrop(64, scale=(0.2, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([blur], p=blur_p),
                v2.RandomSolarize(128, p=solarize_p),
                v2.RandomHorizontalFlip(),
            ]
        )

    torch.manual_seed(0)
    small = [image.resize((image.width // 2, image.height // 2)) for image in photographs]
    repeats = 12
    common = {"scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1]}
    for blur_p, solarize_p in ((1.0, 0.0), (0.1, 0.2)):
        transform = theirs(blur_p, solarize_p)
        expected = np.stack([np.asarray(transform(image)) for image in small for _ in range(repeats)])
        many = [image for image in small for _ in range(repeats)]
        made = compiled(many, 64, **common, blur_p=blur_p, solarize_p=solarize_p)
        # Mean and standard deviation over the pixels of each view. Both sides see the same photographs, so only the
        # noise of
        # the draws remains.
        for statistic in (np.mean, np.std):
            ours, others = (
                statistic(views.reshape(len(small), repeats, -1, 3), axis=2).mean(1) for views in (made, expected)
            )
            difference = ours - others
            assert (np.abs(difference.mean(0)) < 4 * difference.std(0) / len(small) ** 0.5).all()
            # of 255: the noise is small enough for the test to mean something
            assert np.abs(difference.mean(0)).max() < 3
