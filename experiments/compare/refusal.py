"""The exception for wrong arguments, and progress messages. caco.errors has the same, but this package must not import
anything of caco.
"""

import sys


class Refused(ValueError):
    """The arguments make no sense, or the comparison cannot be done on this machine. The command shows the message and
    ends with exit code 2; with CACO_TRACEBACK=1 in the environment it shows the traceback, too.
    """


def say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)
