"""Saves the final weights as a PyTorch model of MLflow, in the run directory; caco/tracking/feed.py sends it."""

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any


def save_model(backbone: Any, run_dir: Path) -> Path:
    """Write `backbone`, a torch module from images [B, C, H, W] to features [B, D], to run_dir/model, completely or not
    at all.

    `mlflow.pytorch.load_model` returns it as a module that can be trained further. Loading needs timm but not caco; for
    a backbone of the user's own it also needs that backbone's file on Python's import path.
    """
    target, aside = run_dir / "model", run_dir / f".model.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own code warns about types while it is imported
        _save(backbone, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _save(backbone: Any, folder: Path) -> None:
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # Its warning says that unpickling runs code. MLflow's safe format is a traced graph, which cannot be trained.
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
        # Without this list, MLflow would load the model in a new process to find the requirements.
        pip_requirements=["torch", "timm", "numpy"],
        serialization_format="pickle",
    )
