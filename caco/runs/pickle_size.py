"""Bounds the work of reading a pickle before it is read: a few bytes can ask for hours.

A tuple that holds another tuple twice, which holds another twice, and so on, takes little space in a file. If it is a
key of a dict or in a set, hashing it walks all of its 2^n paths, in C code that nothing can interrupt. Thousands of
huge integers with the same hash are as slow. Nothing from the file is run here: the standard library's `pickletools`
lists the instructions, and what each takes from the stack and puts there.
"""

import pickletools
from typing import IO, Any

from caco.errors import UserError

ALLOWED, ALLOWED_EACH = 1_000_000, 100  # parts that may be visited in all, and in addition for each instruction
_HASHED_AS_THEY_ARE = 2**60  # smaller integers are their own hash; larger ones can be made to share one
_WITH_CONTENTS = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "FROZENSET")
_FILLED = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")


def check(file: IO[bytes], name: str) -> None:
    """Check one pickle, up to its STOP. A file that is no valid pickle passes, because its reader will fail on it at
    the same place.

    Args:
        name: how a message calls the file.
    Raises:
        UserError: hashing the content may take more steps than the pickle's length allows.
    """
    try:
        _go_through(file, name)
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - a damaged file, which can make pickletools raise any type of error
        return


def _go_through(file: IO[bytes], name: str) -> None:
    # For each object on the stack a list of one number, its count of parts; references to one object share the list.
    # None is a mark.
    stack: list[Any] = []
    memo: dict[Any, list[int]] = {}
    count = total = huge = 0
    for code, argument, _ in pickletools.genops(file):
        count += 1
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if code.name == "MARK":
            stack.append(None)
            continue
        taken = []
        if pickletools.markobject in code.stack_before:
            while (top := stack.pop()) is not None:
                taken.append(top)
        of_known_number = [
            item for item in code.stack_before if item not in (pickletools.markobject, pickletools.stackslice)
        ]
        below = [stack.pop() for _ in of_known_number]
        inside = sum(parts[0] for parts in taken + below[: -1 if code.name in _FILLED else None])
        if code.name in _FILLED:
            below[-1][0] += inside
            made = below[-1:]
        elif "GET" in code.name:
            made = [memo[argument]]
        elif code.name == "DUP":
            made = below * 2
        else:
            if isinstance(argument, int) and abs(argument) >= _HASHED_AS_THEY_ARE:
                huge += 1
                total += huge
            made = [[1 + (inside if code.name in _WITH_CONTENTS else 0)] for _ in code.stack_after]
        stack += made
        total += sum(parts[0] for parts in made)
        if total > ALLOWED + ALLOWED_EACH * count:
            raise UserError(f"{name}: its objects are nested so deeply that reading it would take hours")
