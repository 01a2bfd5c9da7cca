"""What the person who compares did wrong, and what is said meanwhile: as caco.errors has it, of which this package
takes nothing.
"""

import sys


class Refused(ValueError):
    """A question that makes no sense, or that cannot be answered here: its message alone is shown, and the exit code is
    2.

    CACO_TRACEBACK=1 in the environment asks for the traceback.
    """


def say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)
