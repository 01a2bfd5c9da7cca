"""Damage files, disks, servers or processes, and print the outcomes as a row of docs/reliability.md.

  python tests/damage/run.py jpegs 10000      jpegs | betons | checkpoints | weights: damaged files are read
  python tests/damage/run.py betons 500 2000  the 500 cases from number 2000 on
  python tests/damage/run.py disks 200        disks that become full during a run
  python tests/damage/run.py servers 100      MLflow servers that are slow, hang, vanish, come back empty
  python tests/damage/run.py kills-train 200  a command is killed: -train | -evaluate | -export | -sync | -sweep | -jobs

The exit code is 1 if a case ended in anything but the promised results or a message.
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
    print(f"| {kind} | {count:,} | {command} | {datetime.date.today()} | {words}; {ended} |")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
