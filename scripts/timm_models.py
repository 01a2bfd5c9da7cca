"""Find out which of timm's models can be backbones, and write docs/backbones.md. Each model of timm.list_models() is
built once, on tensors without contents.

  python scripts/timm_models.py          continues after the last model in docs/backbones.csv; takes some 30 minutes on
                                         an idle core; Ctrl-C stops it
  python scripts/timm_models.py NAME...  tries only these models, and prints the results without writing them
"""

import collections
import csv
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from caco.nn.backbones import own_size, why_unfit  # noqa: E402

RECORD, PAGE = ROOT / "docs" / "backbones.csv", ROOT / "docs" / "backbones.md"
COLUMNS = ("name", "timm", "pixels", "at_its_own_size", "at_224", "at_224_with_image_size")
YES, UNTRIED = "yes", ""


def tried(name: str) -> dict[str, str]:
    pixels = own_size(name)

    def word(size: int, **settings: int) -> str:
        return why_unfit(size, name=name, **settings) or YES

    own = word(pixels)
    at_224 = own if pixels == 224 else word(224)
    sized = word(224, image_size=224) if own == YES and at_224 != YES else UNTRIED
    return dict(zip(COLUMNS, (name, timm.__version__, str(pixels), own, at_224, sized), strict=True))


def page(rows: list[dict[str, str]], num_models: int) -> str:
    fits = [row for row in rows if row["at_its_own_size"] == YES]
    at_224 = [row for row in fits if row["at_224"] == YES]
    sized = [row for row in fits if row["at_224"] != YES and row["at_224_with_image_size"] == YES]
    own = [row for row in fits if row not in at_224 and row not in sized]
    unfit = [row for row in rows if row["at_its_own_size"] != YES]
    reasons = collections.defaultdict(list)
    for row in unfit:
        reasons[row["at_its_own_size"][:110]].append(row["name"])
    lines = [
        "# Backbones from timm",
        "",
        (
            "`backbone.name=NAME` chooses a model of timm as the backbone. It must turn images [B, 3, H, W] into one"
            " feature vector each, [B, width]. caco"
        ),
        (
            "checks this before a run draws its weights, on tensors without contents and with the sizes of the run's"
            " views. A model that does not fit is"
        ),
        (
            "refused with a hint: another `backbone.image_size`, another `augmentation.size`, or the nearest names"
            " that fit. If a model has a layer between"
        ),
        "pooling and classifier (MobileNetV3, VGG, ...), the feature is the output of that layer.",
        "",
        f"Of the {num_models:,} models in `timm.list_models()` of timm {timm.__version__},"
        f" {'all' if len(rows) == num_models else f'{len(rows):,}'} were tried",
        "by `python scripts/timm_models.py`; [backbones.csv](backbones.csv) has the result of each:",
        "",
        "| result | number of models |",
        "|---|---|",
        f"| fits, also for images of 224 pixels, the size of our ImageNet configurations | {len(at_224):,} |",
        f"| fits for 224 pixels with `backbone.image_size=224` | {len(sized):,} |",
        f"| fits only for images of its own size (`augmentation.size`) | {len(own):,} |",
        f"| is refused | {len(unfit):,} |",
        "",
    ]
    if unfit:
        lines += ["| refused | reason |", "|---|---|"]
        lines += [
            f"| {', '.join(f'`{name}`' for name in names)} | {reason.replace('|', '/')} |"
            for reason, names in sorted(reasons.items())
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    for name in dir(nn.init):  # initial weights do not matter, and drawing them takes half of the time
        if name.endswith("_") and not name.startswith("_"):
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(tried(name))
        return
    names = timm.list_models()
    rows = list(csv.DictReader(RECORD.open())) if RECORD.is_file() else []
    rows = [row for row in rows if row["timm"] == timm.__version__ and row["name"] in names]
    done = {row["name"] for row in rows}
    try:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            for name in names:
                if name not in done:
                    rows.append(tried(name))
                    writer.writerow(rows[-1])
                    file.flush()
    finally:  # also after Ctrl-C: the page says how many models were tried
        PAGE.write_text(page(rows, len(names)))


if __name__ == "__main__":
    main()
