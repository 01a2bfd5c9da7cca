"""How much work it is to read a pickle, before it is read: a few bytes can ask for hours.

A tuple that holds one tuple twice, which holds another twice, and so on, is short in a file, and as a key in it (or in
a set) each of its 2^n paths is gone along to hash it, in C, where nothing can interrupt it. So are thousands of huge
whole numbers that have one hash. Nothing is run here: the standard library's `pickletools` names each instruction and
what it takes from the stack and puts there.
"""

import pickletools
from typing import IO, Any

from caco.errors import UserError

ALLOWED, ALLOWED_EACH = 1_000_000, 100  # parts that may be gone through, and so many more for each instruction
_HASHED_AS_THEY_ARE = 2**60  # whole numbers beyond have hashes that others have too
_WITH_CONTENTS = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "FROZENSET")
_FILLED = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")


def check(file: IO[bytes], name: str) -> None:
    """Go through one pickle, up to and with its STOP; of what is no pickle nothing is said, since its reader comes no
    further.

    Args:
        name: of the file.
    Raises:
        UserError: hashing what is in it may take more steps than its length allows.
    """
    try:
        _go_through(file, name)
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - damaged, which leads pickletools into errors of any type
        return


def _go_through(file: IO[bytes], name: str) -> None:
    stack: list[
        Any
    ] = []  # of each thing its parts, all counted, in a list that is shared where the thing is; None for a mark
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
            raise UserError(f"{name}: what is nested in it would take hours to read")
