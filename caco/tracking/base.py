"""The contract of a tracker. Imports no torch, so runs can be looked at and sent on from machines without it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import nn

Row = Mapping[str, float | int | str]  # names and values; the ledger adds kind, step and time


class Tracker(Protocol):
    """Logs a run: always to its ledger, run_dir/ledger.jsonl, which is the record, and optionally to another place.

    Rank 0 alone calls it, in this order: start; then log and, at each checkpoint, state_dict, as often as needed;
    log_model if the run reached its end; finish, also if the run failed. The callers are the Trainer and caco.evaluate,
    which adds an evaluation's results to a run. Only a full disk may disturb the training: a server that is down, slow
    or wrong costs one warning and no time.

    package: a package that the tracker needs besides caco's own requirements. It is read from the tracker's source
    before anything is imported.
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
        """Open the record of a run, or continue it from a checkpoint.

        Args:
            params, tags: by the names shown to readers; the tags "data" and "data_digest" name the set of images.
            run_name: short; need not be unique.
            state: None for a new run, whose ledger starts empty. Else what `state_dict` returned: the ledger keeps its
                first `rows` rows. Other keys may be missing if another tracker began the run.
            sweep: "name", unique in the experiment; "title"; "jobs", the number of its runs, 0 if unknown. None: the
                run is in no sweep.
        Raises:
            UserError: the ledger has fewer rows than were written when the checkpoint was saved.
            OSError: the directory cannot be written.
        """

    @abstractmethod
    def log(self, step: int, values: Row, kind: str = "train") -> None:
        """Add one row, which survives the death of the process once this returns. Takes microseconds, because the
        training loop calls it.

        Raises:
            OSError: the disk is full; names the file.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values: `rows`, the number of rows in the ledger, all of which are on the
        disk when this returns; and whatever else this tracker needs."""

    @abstractmethod
    def log_model(self, make_backbone: "Callable[[], nn.Module]") -> None:
        """Keep the run's final backbone, if this tracker keeps models.

        Args:
            make_backbone: returns the backbone in eval mode, on the CPU.
        """

    @abstractmethod
    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the record. A second call, or one without a start, does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            summary: the run's final numbers; empty if it did not reach its end.
        """
