"""python -m caco.doctor : what of caco works on this machine, and how to fix the rest. Takes seconds; changes nothing.

Exit code 0: caco can train here. Exit code 1: a part that caco needs is broken, or a part named by --need is missing.
"""

import argparse
import base64
import ctypes
import fcntl
import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from caco import instructions
from caco.data.sets.recognising import dataset_at
from caco.errors import shown
from caco.installed import command_to_install, version
from caco.redaction import redacted
from caco.runs.environment import environment
from caco.runs.paths import expanded
from caco.saying import amount
from caco.tracking.store import resolve_uri

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finding:
    """What was found out about one part.

    state: works; absent (caco runs without it); broken.
    """

    part: str
    state: Literal["works", "absent", "broken"]
    what: str
    do: str = ""


def python() -> Iterator[Finding]:
    ours = environment()
    wanted = (3, 11) <= sys.version_info[:2] < (3, 14)
    do = "" if wanted else "use Python 3.11 to 3.13: make -B setup PYTHON=python3.12"
    yield Finding("python", "works" if wanted else "broken", platform.python_version(), do)
    changed = {"true": ", with changes", "false": ""}.get(ours["git_dirty"], "")
    yield Finding(
        "caco",
        "works",
        f"{version()}, {ROOT}, commit {ours['git_sha'][:10]}{changed}; {ours['cores']} cores, {ours['memory_gib']} GiB",
    )


def cpu() -> Iterator[Finding]:
    """The processor's instruction sets, and the one asked for. `native` and `torch` report which are used."""
    wanted = (
        f"{instructions.VARIABLE}={instructions.LEVEL}"
        if instructions.LEVEL
        else f"the best is used, because {instructions.VARIABLE} is not set"
    )
    yield Finding("cpu", "works", f"{environment()['cpu']}: {', '.join(instructions.processor())}; {wanted}")


def torch() -> Iterator[Finding]:
    install = command_to_install()
    try:
        import torch

        assert torch.ones(8, 8).matmul(torch.ones(8, 8)).sum() == 512
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        yield Finding("torch", "broken", _line(error), install)
        return
    for package in ("torchvision", "timm", "hydra-core", "psutil"):
        if _version(package) is None:
            yield Finding("torch", "broken", f"no {package}", install)
    yield Finding(
        "torch",
        "works",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    if torch.cuda.is_available():
        try:
            for index in range(torch.cuda.device_count()):
                torch.ones(1, device=f"cuda:{index}").add_(1).item()
                about = torch.cuda.get_device_properties(index)
                yield Finding("gpu", "works", f"{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
        except RuntimeError as error:
            yield Finding(
                "gpu", "broken", _line(error), "see nvidia-smi; torch wheels for this GPU and driver are at pytorch.org"
            )
    elif driver := _driver():
        do = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}; install a wheel that fits the driver,"
            " or a newer driver"
        )
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            do = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides them, or: {do}"
        yield Finding("gpu", "broken", f"there is a driver ({driver}), but torch sees no GPU", do)
    else:
        yield Finding(
            "gpu", "absent", "none", "device=cpu and precision=fp32 train small networks; preset=demo takes minutes"
        )


def _driver() -> str:
    """NVIDIA's driver, as the kernel names it; "" if there is none."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return ""


def native() -> Iterator[Finding]:
    """The parts that setup.py compiles. An installed wheel has no setup.py; there, the compiled parts that are
    present.
    """
    declared = re.findall(r'"(caco\.[\w.]+\._\w+)"', _read(ROOT / "setup.py"))
    package = Path(__file__).parent
    built = [
        ".".join(["caco", *path.parent.relative_to(package).parts, path.name.partition(".")[0]])
        for path in package.rglob("_*.so")
    ]
    missing = [name for name in declared if importlib.util.find_spec(name) is None]
    if missing:
        compiler = "" if shutil.which("g++") else "install a C++ compiler (Debian: g++), then "
        do = f"{compiler}pip install --no-deps --no-build-isolation -e {ROOT}; without them caco uses slower code"
        yield Finding("native", "absent", f"not built: {', '.join(missing)}", do)
    found = sorted({*declared, *built} - {*missing})
    if found and instructions.LEVEL == "torch":
        do = f"unset {instructions.VARIABLE}; without them caco uses slower code"
        yield Finding("native", "absent", f"turned off by {instructions.VARIABLE}=torch: {', '.join(found)}", do)
    elif found:
        yield Finding("native", "works", ", ".join(f"{part} ({instructions.used(part)})" for part in found))


def ffcv() -> Iterator[Finding]:
    """Checks whether FFCV's library loads, or names what it lacks. FFCV itself is not imported, which takes seconds."""
    found = importlib.util.find_spec("ffcv")
    libraries = "libopencv-dev libturbojpeg0-dev pkg-config g++"
    if found is None:
        do = (
            f"loader=torch works without it; to install it, as root: apt-get install {libraries}; then"
            f" {command_to_install('ffcv')}"
        )
        yield Finding("ffcv", "absent", "not installed", do)
        return
    places = [Path(folder) for folder in found.submodule_search_locations or ()]
    for library in (
        file for place in places for file in (*place.glob("_libffcv*.so"), *place.parent.glob("_libffcv*.so"))
    ):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            do = (
                f"as root: apt-get install {libraries}; then pip install --force-reinstall --no-deps --no-cache-dir"
                " ffcv"
            )
            yield Finding("ffcv", "broken", _line(error), do)
            return
        yield Finding("ffcv", "works", f"{_version('ffcv')}, with OpenCV and TurboJPEG")
        return
    yield Finding(
        "ffcv",
        "broken",
        f"no _libffcv in {places[0] if places else 'it'}",
        "pip install --force-reinstall --no-deps ffcv",
    )


def slurm() -> Iterator[Finding]:
    commands = ("sbatch", "squeue", "sinfo", "scontrol")
    if missing := [name for name in commands if shutil.which(name) is None]:
        do = "launcher=local runs sweeps on this machine; on a cluster, run caco on a login node"
        yield Finding("slurm", "absent", f"no {', '.join(missing)}", do)
    else:
        try:
            command = ["sinfo", "--noheader", "--format=%P %D %c %G"]
            output = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True).stdout.splitlines()
        except subprocess.CalledProcessError as error:
            output, why = [], error.stderr.strip().splitlines()[-1:] or ["sinfo fails"]
            yield Finding("slurm", "absent", why[0], "a cluster's login node has it set up; or set SLURM_CONF")
        except OSError as error:
            output = []
            yield Finding("slurm", "broken", f"sinfo: {_line(error)}", "see to it that this user may run it")
        except subprocess.TimeoutExpired:
            output = []
            yield Finding("slurm", "broken", "sinfo has not answered for 15 s", "check the controller: scontrol ping")
        for fields in (line.split(maxsplit=3) for line in output):
            if len(fields) != 4:
                continue  # a warning that sinfo printed
            partition, nodes, cpus, gpus = fields
            gpus = "no GPUs" if gpus == "(null)" else gpus
            yield Finding("slurm", "works", f"partition {partition}: {nodes} nodes of {cpus} CPUs, {gpus}")
    if _version("submitit") is None:
        yield Finding(
            "slurm", "absent", "no submitit", f"for launcher=slurm and launcher=local: {command_to_install('slurm')}"
        )


def mlflow() -> Iterator[Finding]:
    version = _version("mlflow")
    if version is None:
        do = (
            "a run's ledger keeps everything, and python -m caco.tracking.sync sends it later; to install MLflow:"
            f" {command_to_install('mlflow')}"
        )
        yield Finding("mlflow", "absent", "not installed", do)
        return
    try:
        uri = resolve_uri(None)
    except ValueError as error:
        yield Finding("mlflow", "broken", str(error), "unset MLFLOW_TRACKING_URI, or set it to one of these")
        return
    if uri.startswith("http"):
        do = "runs go on without it; python -m caco.tracking.sync sends what it missed. Or unset MLFLOW_TRACKING_URI"
        try:
            urllib.request.urlopen(_health(uri), timeout=5).close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers = "answers" if isinstance(error, urllib.error.HTTPError) else "does not answer"
            yield Finding("mlflow", "broken", f"{version}; {redacted(uri)} {answers}: {_line(error)}", do)
            return
        yield Finding("mlflow", "works", f"{version}; {redacted(uri)} answers")
        return
    if not uri.startswith("sqlite:///"):
        yield Finding("mlflow", "works", f"{version}; {uri.partition('://')[0]} database, not tested")
        return
    store = Path(uri.removeprefix("sqlite:///"))
    if not store.exists():
        yield Finding("mlflow", "works", f"{version}; {store} will be made by the first run")
        return
    try:
        with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as database:
            (runs,) = database.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'").fetchone()
    except sqlite3.Error as error:
        do = f"move {store} away; python -m caco.tracking.sync runs/ fills a new one from the ledgers"
        yield Finding("mlflow", "broken", f"{version}; {store}: {_line(error)}", do)
        return
    yield Finding(
        "mlflow", "works", f"{version}; {amount(runs, 'run')} in {store}; python -m caco.tracking.dashboard shows them"
    )


def _health(uri: str) -> urllib.request.Request:
    """A request that asks whether a server works. A name and a password in its address go into a header, because
    urllib would take them for a part of the host's name.
    """
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    name, separator, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, f"{parts.path}/health", "", "")))
    if separator:
        known = base64.b64encode(urllib.parse.unquote(name).encode()).decode()
        request.add_header("Authorization", f"Basic {known}")
    return request


def disk() -> Iterator[Finding]:
    """The place of new runs: the working directory."""
    folder = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield Finding(
            "disk", "broken", f"{folder}: {_line(error)}", "run caco in a folder where files can be written and locked"
        )
        return
    free = shutil.disk_usage(folder).free / 2**30
    low = free < 5
    do = "a ResNet-50 run keeps two checkpoints of 0.6 GB and its model" if low else ""
    yield Finding("disk", "broken" if free < 0.5 else "works", f"{free:.0f} GiB free in {folder}", do)


def data(roots: list[Path]) -> Iterator[Finding]:
    if importlib.util.find_spec("sklearn") is not None:
        yield Finding("data", "works", "data=digits: inside scikit-learn, nothing to download")
    for root in roots:
        try:
            option = dataset_at(root)
        except OSError as error:
            do = "see to it that this user may read it, and that the storage it is on is there"
            yield Finding("data", "broken", f"{root}: {_line(error)}", do)
            continue
        if option:
            yield Finding("data", "works", f"data={option} data.root={root}")
        else:
            what = "no such folder" if not root.is_dir() else "no images that caco can read"
            do = (
                "expected class folders of images, in train/ and val/ or test/ or directly, or a set as torchvision"
                " unpacks it"
            )
            if zips := sorted(file.name for file in root.glob("*.zip")) if root.is_dir() else []:
                do = f"unpack {', '.join(zips[:3])}; then {do}"
            yield Finding("data", "broken", f"{root}: {what}", do)
    if not roots:
        yield Finding(
            "data",
            "absent",
            "no other data set was looked for",
            "python -m caco.doctor /path/to/images ... tells how to read each folder",
        )


PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": python, "cpu": cpu, "torch": torch, "native": native, "ffcv": ffcv, "slurm": slurm, "mlflow": mlflow,
    "disk": disk,
}  # fmt: skip


def examine(roots: list[Path]) -> list[Finding]:
    """The findings on all parts, in order."""
    return [finding for part in PARTS.values() for finding in part()] + list(data(roots))


def verdict(findings: list[Finding], needed: list[str]) -> list[str]:
    """The parts that need fixing: broken ones, and those of `needed` that do not work."""
    broken = [finding.part for finding in findings if finding.state == "broken"]
    working = {finding.part for finding in findings if finding.state == "works"}
    return sorted({*broken, *(part for part in needed if part not in working)})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m caco.doctor", description=__doc__.splitlines()[0])
    parser.add_argument(
        "roots", nargs="*", type=expanded, metavar="FOLDER", help="images: tells which data= reads them; default data/"
    )
    needs = ("gpu", "native", "ffcv", "slurm", "mlflow")
    parser.add_argument(
        "--need", nargs="+", choices=needs, default=[], metavar="PART", help=f"of {', '.join(needs)}: exit 1 without"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    with shown():
        return _tell(options)


def _tell(options: argparse.Namespace) -> int:
    """Print what was found and return the exit code."""
    roots = options.roots or [path for path in [Path("data")] if path.is_dir()]
    findings = examine(roots)
    stops = verdict(findings, options.need)
    if options.json:
        print(
            json.dumps({"ok": not stops, "stops": stops, "findings": [vars(finding) for finding in findings]}, indent=1)
        )
        return int(bool(stops))
    signs = {"works": "ok", "absent": "-", "broken": "BROKEN"}
    for finding in findings:
        print(f"{signs[finding.state]:7}{finding.part:8}{finding.what}")
        if finding.do:
            print(f"{'':15}{finding.do}")
    print(f"\nto be fixed: {', '.join(stops)}" if stops else "\ncaco can train here: python -m caco.train preset=smoke")
    return int(bool(stops))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _line(error: Exception) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


if __name__ == "__main__":
    sys.exit(main())
