"""Refuses published lists, tables and annotations whose content is not what their authors published."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from caco.errors import UserError, of_the_machine


@contextlib.contextmanager
def as_published(name: str, path: Path) -> Iterator[None]:
    """A context for using what a published file holds. If its content is something else, whatever it is, the error
    names the set and the file.

    Args:
        name: the name of the image set.
        path: the file.
    Raises:
        UserError: the code inside failed, for a reason other than the machine's (a full disk, missing rights).
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if of_the_machine(error) is not None:
            raise
        got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name}: {path} is not as published ({got}): unpack the set again") from error
