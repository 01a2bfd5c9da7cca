"""The final weights as MLflow's PyTorch model, in the run directory; caco/tracking/feed.py sends it."""

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any


def save_model(backbone: Any, run_dir: Path) -> Path:
    """Write `backbone`, a torch module from images [B, C, H, W] to features [B, D], to run_dir/model, as a whole or not
    at all.

    `mlflow.pytorch.load_model` gives it back as a module that can be trained on; it needs timm, not caco; and of a
    backbone of the user's own the file that it is in, on Python's path.
    """
    target, aside = run_dir / "model", run_dir / f".model.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about types in MLflow's own code, as it is imported
        _save(backbone, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _save(backbone: Any, folder: Path) -> None:
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # It warns that unpickling runs code, which MLflow's safe format avoids: a traced graph, which cannot be trained on.
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    numbers = np.dtype(np.float32)
    first = next((module for module in backbone.modules() if type(module).__name__ == "Conv2d"), None)
    channels = first.in_channels if first is not None else 3
    signature = ModelSignature(
        inputs=Schema([TensorSpec(numbers, (-1, channels, -1, -1))]),
        outputs=Schema([TensorSpec(numbers, (-1, backbone.num_features))]),
    )
    mlflow.pytorch.save_model(
        backbone,
        folder,
        signature=signature,
        # Given, or MLflow loads the model in a process of its own to find out.
        pip_requirements=["torch", "timm", "numpy"],
        serialization_format="pickle",
    )
