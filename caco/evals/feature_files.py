"""Features on disk, stored under a hash of everything that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caco.errors import FileError, UserError
from caco.runs.files import locked, read_json, remove_unfinished, write_json


def key_of(made_from: dict[str, Any]) -> str:
    """A hash, 16 hexadecimal digits, of plain values."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


class FeatureFiles:
    """Features in files; each is stored under a hash of what its features depend on. Memory is bounded, whatever the
    size of the set.

    A file is written row by row under a temporary name and renamed when it is complete. After a kill, a partial file is
    completed. If two processes want the same file, only one of them makes it.

    Args:
        folder: the folder of the files; it is made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def get(
        self,
        made_from: dict[str, Any],
        num_images: int,
        make: Callable[[int, Callable[[Tensor, Tensor], Any]], None],
        *,
        batch: int,
    ) -> Tensor:
        """Features [num_images, D], mapped from their file into memory.

        Args:
            made_from: plain values that decide every number.
            make: `make(first, take)` has to call take(features, labels) for each batch, from image `first` on.
            batch: a partial file is resumed at a multiple of it, so that the same batches give the same bits.
        Raises:
            OSError: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key_of(made_from)}.bin"
        with locked(path.with_suffix(".lock"), wait_s=24 * 3600):
            if not self._is_whole(path, num_images):
                self._write(path, made_from, num_images, make, batch)
        about = read_json(path.with_suffix(".json"))
        dtype, width = getattr(torch, about["dtype"]), about["width"]
        flat = torch.from_file(str(path), shared=False, size=num_images * width, dtype=dtype)
        return flat.view(num_images, width)

    def _is_whole(self, path: Path, num_images: int) -> bool:
        """Whether the file is there and has the size that its header says, so that neither was damaged from outside."""
        header = path.with_suffix(".json")
        try:
            about = read_json(header)
            row_bytes = about["width"] * getattr(torch, about["dtype"]).itemsize if about else 0
        except (UserError, LookupError, TypeError, AttributeError):
            row_bytes = 0
        if row_bytes == 0:  # without a valid header the files cannot be used
            for file in (path, path.with_suffix(".partial"), header):
                file.unlink(missing_ok=True)
        return path.is_file() and path.stat().st_size == num_images * row_bytes

    def _write(self, path: Path, made_from: dict[str, Any], num_images: int, make: Callable, batch: int) -> None:
        partial, header = path.with_suffix(".partial"), path.with_suffix(".json")
        remove_unfinished(header)
        about = read_json(header)
        row_bytes = about["width"] * getattr(torch, about["dtype"]).itemsize if about else 0
        done = partial.stat().st_size // row_bytes // batch * batch if about and partial.is_file() else 0
        try:
            with open(partial, "r+b" if done else "wb") as file:
                file.seek(done * row_bytes)
                file.truncate()

                def take(features_bD: Tensor, labels_b: Tensor) -> None:
                    if file.tell() == 0:
                        dtype = str(features_bD.dtype).removeprefix("torch.")
                        write_json(header, {"width": features_bD.shape[1], "dtype": dtype, "made_from": made_from})
                    file.write(features_bD.contiguous().view(torch.uint8).numpy().data)
                    file.flush()  # a kill then costs only the batch in progress

                if done < num_images:
                    make(done, take)
                file.flush()
                os.fsync(file.fileno())
                width = read_json(header)["width"]
                dtype = getattr(torch, read_json(header)["dtype"])
                assert file.tell() == num_images * width * dtype.itemsize, "every image gives one row"
        except OSError as error:
            if error.filename is not None or isinstance(error, UserError):
                raise
            raise FileError(
                error.errno, error.strerror, str(partial)
            ) from error  # the error of a full disk does not name the file
        os.replace(partial, path)
