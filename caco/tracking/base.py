"""The contract of a tracker, and nothing else. Imports no torch: runs can be looked at and sent on where there is
none.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import nn

Row = Mapping[str, float | int | str]  # names and values; the ledger adds kind, step and time


class Tracker(Protocol):
    """Writes down what a run says of itself: always in its ledger, run_dir/ledger.jsonl, which is the record; and
    wherever else.

    Called by rank 0 alone, in this order: start; log, and state_dict at each checkpoint, as often as you like;
    log_model where the run came to its end; finish, also where it failed. By the Trainer and by caco.evaluate, which
    adds an evaluation's results to a run. Nothing but a full disk may reach the training: a server that is down, slow
    or wrong costs one warning and no time.

    package: what has to be installed for it beside caco's own needs; read from its source, before anything is imported.
    """

    package: ClassVar[str | None] = None

    @abstractmethod
    def start(
        self,
        run_dir: Path,
        *,
        params: dict[str, Any],
        tags: dict[str, str],
        run_name: str,
        state: dict[str, Any] | None,
        sweep: dict[str, Any] | None = None,
    ) -> None:
        """Open the record of a run, or go on with it from a checkpoint.

        Args:
            params, tags: by the names that a reader sees; the tags "data" and "data_digest" name the set of images.
            run_name: short; need not be unique.
            state: None for a new run, whose ledger begins anew; else what `state_dict` gave: the ledger keeps that many
                `rows`. The other keys may be missing, of a run that another tracker began.
            sweep: "name", unique in the experiment; "title"; "jobs", how many runs it has, 0 where nobody knows. None:
                in no sweep.
        Raises:
            UserError: the ledger has fewer rows than the checkpoint saw written.
            OSError: the directory cannot be written.
        """

    @abstractmethod
    def log(self, step: int, values: Row, kind: str = "train") -> None:
        """Add one row; it survives the death of the process once this returns. Takes microseconds: it is called in the
        loop.

        Raises:
            OSError: the disk is full; names the file.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: `rows`, how many the ledger has, which are on the disk when this returns; and what
        this tracker needs besides, as plain values."""

    @abstractmethod
    def log_model(self, make_backbone: "Callable[[], nn.Module]") -> None:
        """Keep the run's final backbone, if this tracker keeps models: what the function makes, in eval mode and on the
        CPU.
        """

    @abstractmethod
    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the record. A second call, or one without a start, does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            summary: the run's final numbers; empty where it did not come to its end.
        """
