"""Damage files of one kind, read them, and print the outcomes as a row of docs/reliability.md.

  python tests/damage/run.py jpegs 10000      jpegs | betons | checkpoints | weights | disks
  python tests/damage/run.py betons 500 2000  the 500 cases from number 2000 on

The exit code is 1 if a file was neither read nor refused with a message.
"""

import datetime
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent), str(Path(__file__).parents[1])]
import damaging  # noqa: E402


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    found, bad = damaging.outcomes(kind, count, first=first)
    print("\n".join(bad))
    words = ", ".join(f"{found[word]:,} {word}" for word in sorted(found))
    ended = ", ".join(
        f"{found[word]} {plural}"
        for word, plural in (("crash", "crashes"), ("hang", "hangs"), ("traceback", "tracebacks"))
    )
    command = f"`python tests/damage/run.py {kind} {count}{f' {first}' if first else ''}`"
    print(f"| damaged {kind} | {count:,} | {command} | {datetime.date.today()} | {words}; {ended} |")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
