"""Keeps figures of a run in its directory, and sends them to its MLflow run as artifacts."""

import io
import logging
import os
from pathlib import Path
from typing import Any

from caco.errors import UserError
from caco.tracking.store import first_line, import_mlflow
from caco.tracking.sync import sync_run
from caco.tracking.watermark import Watermark

_log = logging.getLogger(__name__)
_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".html")


def add_figure(run_dir: Path, name: str, figure: Any) -> Path:
    """Save a figure as run_dir/figures/NAME, completely or not at all, and send it where the run was sent; returns its
    path.

    If the server is not reachable, the figure stays there and `python -m caco.tracking.sync` sends it later. A figure
    of the same name is replaced.

    Args:
        name: a file name, such as "bank_use.png".
        figure: a matplotlib figure or another object with savefig(); or the file's bytes.
    Raises:
        ValueError: run_dir is no run's directory, or `name` is not the name of an image file.
    """
    if not (run_dir / "tracking.json").exists():
        raise UserError(f"expected a run directory, with tracking.json, got {run_dir}")
    if Path(name).name != name or Path(name).suffix not in _SUFFIXES:
        raise ValueError(f"name: expected a file name ending in {', '.join(_SUFFIXES)}, got {name!r}")
    content = figure
    if not isinstance(figure, bytes):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(name).suffix[1:], bbox_inches="tight")
        content = buffer.getvalue()
    path = run_dir / "figures" / name
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)
    if Watermark.load(run_dir).run_id:
        try:
            import_mlflow()
            sync_run(run_dir, check=False)
        except BlockingIOError:
            pass  # the run is still being sent, and sends the figure at its end
        except Exception as error:  # noqa: BLE001 - databases, HTTP and MLflow raise anything
            _log.warning("not sent: %s; later: python -m caco.tracking.sync %s", first_line(error), run_dir)
    return path
