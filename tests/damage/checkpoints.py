"""Damaged checkpoints of a run: what is loaded equals what was saved, to the bit, or a message says that no checkpoint
is intact.
"""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from damaging import damaged

from caco.runs.checkpoint import Checkpoints


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{i}.weight": torch.randn(8, 5 + i, generator=generator) for i in range(6)}
    return {
        "step": step,
        "method": weights,
        "optimizer": {"state": {0: {"momentum": torch.ones(40)}}, "param_groups": [{"lr": 0.1}]},
        "latest": {"a": 1.5},
    }


def prepare(folder: Path) -> tuple[Path, dict[int, bytes]]:
    checkpoints = Checkpoints(folder)
    return folder, {step: checkpoints.save(state(step), step).read_bytes() for step in (1, 2)}


def another(whole: bytes, rng: np.random.Generator) -> bytes:
    """Content that is not a checkpoint at all."""
    out = io.BytesIO()
    match int(rng.integers(0, 6)):
        case 0:
            zipfile.ZipFile(out, "w").close()  # 22 bytes, an empty zip
        case 1:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(int(rng.integers(1, 2**22))))
        case 2:
            torch.save([torch.zeros(3)], out)
        case 3:
            out.write(rng.bytes(int(rng.integers(0, 200))))
        case 4:
            with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(out, "w") as less:
                names = archive.namelist()
                for name in rng.permutation(names)[: rng.integers(0, len(names))]:
                    less.writestr(str(name), archive.read(str(name)))
        case 5:
            with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(out, "w") as other:
                for name in archive.namelist():
                    content = archive.read(name)
                    other.writestr(name, damaged(content, rng) if name.endswith("data.pkl") else content)
    return out.getvalue()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b if not isinstance(a, list) else len(a) == len(b) and all(map(same, a, b))


def case(prepared: tuple[Path, dict[int, bytes]], rng: np.random.Generator) -> str:
    folder, whole = prepared
    forged = False  # whether the file has correct checksums for other content, which no broken disk produces
    for step, content in whole.items():
        if step == 2 or rng.integers(0, 4) == 0:
            is_other = rng.integers(0, 3) == 0
            forged |= is_other
            content = another(content, rng) if is_other else damaged(content, rng)
        (folder / f"step_{step:09d}.pt").write_bytes(content)
    with open(os.devnull, "w") as nobody, contextlib.redirect_stderr(nobody):
        newest = Checkpoints(folder).load_newest()
    assert newest is not None, "there are checkpoint files, so the run must not start from scratch"
    loaded, path = newest
    assert forged or same(loaded, state(int(path.stem[-9:]))), f"{path} is not what was saved"
    return f"step {int(path.stem[-9:])} read"
