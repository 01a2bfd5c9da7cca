"""`python -m caco.export` and `caco-export`: write a trained backbone into files that other programs load."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco import metrics
from caco.config import pretrained
from caco.errors import FileError, UserError
from caco.evaluate import run_command
from caco.runs.directory import command
from caco.runs.environment import environment
from caco.runs.files import alone_in, remove_unfinished, write_text
from caco.runs.identity import plain
from caco.runs.paths import expanded, make_folder, require_writable
from caco.tracking import recorded

HELP = """\
caco: export a trained backbone to files for other programs.

  python -m caco.export run=RUN to=FOLDER                      model.safetensors and a model card
  python -m caco.export run=RUN to=FOLDER layouts=[safetensors,timm,torchvision,detectron2]    a plain ResNet: all four
  python -m caco.export weights=FILE format=moco backbone=resnet50 to=FOLDER layouts=[detectron2]

  safetensors   model.safetensors: the backbone's tensors by timm's names; caco itself reads it with format=timm
  timm          also config.json: timm.create_model("local-dir:FOLDER", pretrained=True)
  torchvision   torchvision.pth: load_state_dict(..., strict=False) of torchvision's resnet18, resnet34, resnet50
  detectron2    detectron2.pkl: MODEL.WEIGHTS of detectron2's R-50 and the like, for detection on VOC and COCO

docs/evaluation.md says more about each; docs/weights.md says what weights= can read.

Groups, chosen by group=option:

{groups}
"""


FILES = {
    "safetensors": ("model.safetensors",),
    "timm": ("model.safetensors", "config.json"),
    "torchvision": ("torchvision.pth",),
    "detectron2": ("detectron2.pkl",),
}  # the files of each layout
CARD = "README.md"  # the model card, which every export writes
_IMAGES = {
    "rgb": "RGB in 0..1", "lab": "L*a*b* (scikit-image's rgb2lab)", "ydbdr": "YDbDr (scikit-image's rgb2ydbdr)",
    "ycbcr": "YCbCr (scikit-image's rgb2ycbcr)",
}  # fmt: skip


def main() -> None:
    """The console script."""
    run_command("export", HELP, ("backbone", "augmentation"), _export)


def _export(cfg: DictConfig) -> None:
    location = None if cfg.run is None else pretrained.locate(cfg.run)
    require_writable(expanded(cfg.to), "to")
    from caco.engine.channels import backbone_of, stated
    from caco.engine.evaluating import load_pretrained  # not at the top of the file, because it imports torch

    images = stated(cfg, None if location is None else location.run_dir)
    backbone = backbone_of(cfg.backbone, images.get("channels"))
    path, step = load_pretrained(cfg, location, backbone)
    run = (
        {}
        if location is None
        else {"run": location.run_dir.name, "step": step, "summary": recorded.read(location.run_dir).summary}
    )
    about = {"weights": str(path), **run, "augmentation": plain(cfg)["augmentation"] | images}
    for file in export(backbone, plain(cfg)["backbone"], list(cfg.layouts), expanded(cfg.to), about):
        print(file)


def export(backbone: Any, node: dict[str, Any], layouts: list[str], folder: Path, about: dict[str, Any]) -> list[Path]:
    """Write the layouts and a model card; returns the files.

    Args:
        node: the backbone's part of the configuration.
        about: for the card: the source of the weights, the run's summary, the views' size, mean and std.
    Raises:
        UserError: the backbone does not fit a layout, or the folder holds files of a layout that is not asked for and
            so would stay beside the new ones; raised before anything is written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    is_plain = (
        node["_target_"] == "caco.nn.backbones.timm_backbone"
        and not node.get("cifar_stem")
        and not node.get("layer_norm")
    )
    colours = about["augmentation"].get("colours", "rgb")
    if colours != "rgb" and set(layouts) - {"safetensors"}:
        got = ", ".join(layouts)
        raise UserError(
            f"layouts: this backbone takes images in {colours}, which only safetensors can record; got {got}"
        )
    for layout in layouts:
        if layout == "timm" and not is_plain:
            raise UserError(
                "layouts: timm has no model with this backbone's stem or norms; expected safetensors alone, got timm"
            )
        if layout in ("torchvision", "detectron2"):
            if "channels" in about["augmentation"]:
                raise UserError(
                    f"layouts: {layout} expects images of red, green and blue; this backbone has"
                    f" {about['augmentation']['channels']} channels"
                )
            fits = is_plain and re.fullmatch(r"resnet(18|34|50|101|152)", node["name"])
            if not fits:
                expected = "a ResNet with its usual stem and BatchNorm (resnet18, resnet50, ...)"
                raise UserError(f"layouts: {layout} expects {expected}, got {node}")
    make_folder(folder, "to")
    with alone_in(folder):
        all_names = {CARD, *(name for names in FILES.values() for name in names)}
        for name in all_names:
            remove_unfinished(folder / name)
        others = all_names - {CARD, *(name for layout in layouts for name in FILES[layout])}
        if left := sorted(name for name in others if (folder / name).exists()):
            raise UserError(
                f"to: {folder} holds {', '.join(left)} of an earlier export, which may be another network's. Choose"
                " another folder, or move these files away, or ask for all layouts in one command (layouts=[...])"
            )
        return _written(backbone, state, node, layouts, folder, about)


def _written(
    backbone: Any, state: dict[str, Any], node: dict[str, Any], layouts: list[str], folder: Path, about: dict[str, Any]
) -> list[Path]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files = []

    def written(name: str, write: Callable[[Path], object]) -> None:
        aside = folder / f".{name}.partial"
        try:
            write(aside)
            aside.replace(folder / name)
        except (SafetensorError, RuntimeError) as error:  # what these libraries make of a full disk
            raise FileError(
                f"{folder / name} could not be written ({error.__context__ or error}); make room there, or choose"
                " another folder with to, then give the same command again"
            ) from error
        finally:
            aside.unlink(missing_ok=True)
        files.append(folder / name)

    def written_text(name: str, text: str) -> None:
        write_text(folder / name, text)
        files.append(folder / name)

    if {"safetensors", "timm"} & set(layouts):
        written("model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    if "timm" in layouts:
        written_text("config.json", json.dumps(timm_config(backbone, node, about), indent=1) + "\n")
    if "torchvision" in layouts:
        written("torchvision.pth", lambda path: torch.save(state, path))
    if "detectron2" in layouts:
        content = {"model": detectron2_names(state), "__author__": "caco", "matching_heuristics": True}
        written("detectron2.pkl", lambda path: path.write_bytes(pickle.dumps(content)))
    written_text(CARD, model_card(node, layouts, about))
    return files


def timm_config(backbone: Any, node: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, which timm reads beside model.safetensors."""
    from caco.nn.vit import vit_options

    views = about["augmentation"]
    size = node.get("image_size") or views["size"]
    own = {"num_heads": node["num_heads"]} if "num_heads" in node else {}
    own |= vit_options(**{key: node.get(key) for key in ("patch_size", "register_tokens", "pool")})
    return {
        "architecture": node["name"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": (
            own
            | ({"in_chans": views["channels"]} if "channels" in views else {})
            | ({"img_size": size, "dynamic_img_size": True} if node.get("image_size") else {})
        ),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [views.get("channels", 3), size, size],
            "interpolation": "bilinear",
            "crop_pct": views.get("plain_crop", 0.875),
            "mean": views["mean"],
            "std": views["std"],
            "first_conv": "patch_embed.proj" if node["name"].startswith("vit") else "conv1",
            "classifier": "head" if node["name"].startswith("vit") else "fc",
        },
    }


def detectron2_names(state: dict[str, Any]) -> dict[str, Any]:
    """A ResNet's tensors as arrays under detectron2's names: stem.conv1, res2.0.conv1, res2.0.conv1.norm,
    res2.0.shortcut.
    """
    named = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        block = re.fullmatch(r"layer(\d)\.(.+)", name)
        name = f"res{int(block[1]) + 1}.{block[2]}" if block else f"stem.{name}"
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        named[name] = tensor.numpy()
    return named


def model_card(node: dict[str, Any], layouts: list[str], about: dict[str, Any]) -> str:
    """The text of README.md: what the weights are, the results they gave, how to load them."""
    views, summary = about["augmentation"], about.get("summary", {})
    results = {k: v for k, v in summary.items() if isinstance(v, float) and metrics.is_percent(k)}
    table = "".join(f"| {name} | {value:.2f} |\n" for name, value in sorted(results.items()))
    usage = {
        "safetensors": 'safetensors.torch.load_file("model.safetensors")          # timm\'s names, no classifier',
        "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True)      # this folder',
        "torchvision": (
            f'torchvision.models.{node.get("name")}().load_state_dict(torch.load("torchvision.pth"), strict=False)'
            "  # all but fc"
        ),
        "detectron2": (
            "# detectron2: MODEL.WEIGHTS detectron2.pkl, INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False,\n#"
            f" MODEL.PIXEL_MEAN {[round(255 * m, 3) for m in views['mean']]}, MODEL.PIXEL_STD"
            f" {[round(255 * s, 3) for s in views['std']]}"
        ),
    }
    images = (
        f"{views['channels']} channels as stored, unsigned integers divided by their type's largest"
        if "channels" in views
        else _IMAGES[views.get("colours", "rgb")]
    )
    shown = "\n".join(usage[layout] for layout in usage if layout in layouts)
    tags = "library_name: timm\n" if "timm" in layouts else ""
    return (
        f"---\n{tags}tags: [self-supervised, contrastive-learning, caco]\n---\n\n"
        f"# {node.get('name') or node['_target_'].rpartition('.')[2]}, pre-trained without labels\n\n"
        f"A backbone without a classifier, from `{about['weights']}`"
        + (f", run `{about['run']}`, step {about['step']}" if "run" in about else "")
        + f".\n\nBackbone: `{json.dumps(node)}`. Images: {images}, {views['size']} px, "
        f"mean {views['mean']}, std {views['std']}.\n"
        + (
            f"\nResults in the run's summary, percent (data: {summary.get('data')}):\n\n| result | value"
            f" |\n|---|---|\n{table}"
            if table
            else ""
        )
        + f"\n```python\n{shown}\n```\n\nMade by `{command()}` with caco {environment()['git_sha']}. Method: CaCo and"
        " its relatives, arXiv 2203.14370.\n"
    )


if __name__ == "__main__":
    main()
