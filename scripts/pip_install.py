"""Run pip install with short output: one line for each large wheel, with the size that is left. All that pip prints
goes into a log file.

python scripts/pip_install.py LOG MEGABYTES ARGUMENT ...

MEGABYTES is the approximate total size of the wheels. An argument @NAME stands for the requirements of the extra NAME
in pyproject.toml, and @ for caco's own requirements.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

LARGE = 50  # megabytes
UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


def wheel(line: str) -> tuple[str, float] | None:
    """(package, megabytes) of the wheel that pip starts to download, from one line of its output; None for others."""
    if found := re.match(r"\s*(?:Downloading|Using cached) (\S+)\.whl \(([\d.]+) (\w+)\)", line):
        return found[1].partition("-")[0].replace("_", "-"), float(found[2]) * UNITS.get(found[3], 0)
    if found := re.match(r"Processing (/\S+\.whl)", line):
        return Path(found[1]).name.partition("-")[0].replace("_", "-"), Path(found[1]).stat().st_size / 1e6
    return None


def shown(megabytes: float) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 950 else f"{megabytes:.0f} MB"


def needs(argument: str) -> list[str]:
    if not argument.startswith("@"):
        return [argument]
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][argument[1:]] if argument[1:] else project["dependencies"]


def main() -> int:
    log, expected = Path(sys.argv[1]), float(sys.argv[2])
    arguments = [word for argument in sys.argv[3:] for word in needs(argument)]
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "-c", "constraints.txt", *arguments]
    begun = 0.0
    lines = []
    with open(log, "a", encoding="utf-8") as file:
        pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert pip.stdout is not None, "it is a pipe"
        for line in pip.stdout:
            lines.append(line)
            file.write(line)
            file.flush()
            if (found := wheel(line)) is not None:
                package, megabytes = found
                begun += megabytes
                if megabytes >= LARGE:
                    left = expected - begun
                    print(
                        f"    {package}, {shown(megabytes)}"
                        + (f"; about {shown(left)} after it" if left >= LARGE else ""),
                        flush=True,
                    )
            elif line.startswith("Installing collected packages") and expected >= 1000:
                print("    unpacking", flush=True)
    if code := pip.wait():
        print("".join(lines[-25:]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
