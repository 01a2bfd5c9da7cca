"""Every command that the project prints (tests/printed.py finds them) is accepted by its program, with real files in
place of PATH, RUN, FILE and the like.

How far each command is run, which is as far as a mistake in its words can show:

- caco.train: composed and checked as before a start, all runs of a sweep.
- caco.plan, caco.evaluate, caco.write: composed and checked. caco.export, caco.embed and short evaluations: run.
- experiments.run: lists every run, with --dry-run. analysis.*: parsed, and the named tables, scales and figures exist.
- all others: their argument parser accepts the words; `make` has the target; files and folders that are named exist.

Some pages also have a test that runs their commands from end to end (tests/test_second_day.py, test_runs_page.py,
tests/evals/dense/test_page.py).
"""

import argparse
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image
from printed import PAGES, ROOT, Command, commands

from caco.config import pretrained

ALL = commands()
FAST = ("README.md", "CONTRIBUTING.md")
# Commands that cannot be tested here, by words that they contain, with the reason.
NOT_HERE = {
    "mine": "parts of one's own, which the page shows: tests/test_config_dir.py and tests/config/test_negatives.py",
    "hydra/sweeper=optuna": "needs hydra-optuna-sweeper, which caco does not bring",
}


def whole(command: Command) -> bool:
    """Whether the command is complete, with nothing for a program or a reader to fill in."""
    return not command.has_holes and "..." not in command.words


def each() -> list:
    """Every command once. Those of README.md and CONTRIBUTING.md are in the fast tier, except benchmarks, whose imports
    are slow.
    """

    def is_fast(command: Command) -> bool:
        return command.where.startswith(FAST) and not command.program.startswith("benchmarks/")

    seen: dict[tuple, Command] = {}
    for command in ALL:
        if whole(command):
            seen.setdefault((command.program, command.words), command)
    ordered = sorted(seen.values(), key=lambda one: not is_fast(one))
    return [pytest.param(one, id=str(one), marks=[] if is_fast(one) else pytest.mark.long) for one in ordered]


def test_they_are_found():
    """At least this many commands of each program and place must be found, or the tests below would test nothing."""
    by_program = Counter(command.program for command in ALL)
    least = {
        "caco.train": 170, "experiments.run": 45, "caco.evaluate": 45, "make": 30, "analysis.table": 18,
        "caco.results": 15, "caco.embed": 10, "caco.export": 8, "caco.plan": 8, "caco.write": 5,
        "benchmarks/bank.py": 12, "pytest": 4,
    }  # fmt: skip
    assert {name: by_program[name] for name in least if by_program[name] < least[name]} == {}
    folders = Counter(command.where.partition(":")[0] for command in ALL)
    assert len(folders) > 130 and sum(not whole(command) for command in ALL) < 30
    over_two_lines = [
        command for command in ALL if command.where.startswith("docs/dense.md") if "data=digits" in command.words
    ]
    assert len(over_two_lines) == 3 and all(command.words[-1].startswith("to=") for command in over_two_lines)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder to work in, with files for the placeholders."""
    top = tmp_path_factory.mktemp("printed")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (top / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 40), (number * 60, 80, 120)).save(top / f"images/{split}/{name}/{number}.jpg")
    return top


@pytest.fixture(scope="module")
def run(things):
    """A finished run of a ResNet-18."""
    folder = things / "runs" / "caco" / "one"
    settings = ["max_steps=null", "epochs=1", "batch=64", "data.limit=256", "backbone=resnet18", "~backbone.width"]
    settings = [*settings, "eval=[]", "bank.size=64", "warm_start.steps=1", "log_every_steps=1"]
    small = [word for word in tiny.TINY if not word.startswith(("backbone", "batch", "eval", "epochs", "max_steps"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TINY", small)
        words = [word for word in settings if not word.startswith("~")]
        tiny.train(folder, *words)
        cfg = tiny.compose(*words)
    if not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return folder


def weights(folder: Path, words: list[str]) -> Path:
    """A weight file of the backbone and format that the command expects."""
    import timm
    import torch

    chosen = dict(word.split("=", 1) for word in words if "=" in word)
    kind = (chosen.get("backbone", "resnet50"), chosen.get("format", "timm"), int(chosen.get("data.channels", 3)))
    path = folder / f"{'-'.join(map(str, kind)).replace(':', '-')}.pth"
    if not path.exists():
        name = {"vit_small": "vit_small_patch16_224"}.get(kind[0], kind[0])
        state = timm.create_model(name, pretrained=False, num_classes=0, in_chans=kind[2]).state_dict()
        if kind[1] == "moco":
            state = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
            state |= {f"module.encoder_q.fc.{i}.{part}": torch.zeros(8) for i in (0, 2) for part in ("weight", "bias")}
            state = {"state_dict": state, "arch": kind[0]}
        torch.save(state, path)
    return path


FOLDERS = re.compile(
    r"(?<![\w/])(?:/path/to/\w+|/anywhere|PATH_OF_IMAGENET|PATH|PHOTOS|LABELLED|FOLDER|ROOT|scans|photos)(?![\w/])"
)
RUNS = re.compile(r"(?<![\w/])(?:RUN_DIR|RUN|runs/(?:\w+/)?NAME|runs/first|runs/longer)(?![\w/])")


@pytest.fixture
def typed(things, request, monkeypatch, tmp_path):
    """Replace the placeholders of a command by real files, and change to a new folder for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})

    def words(command: Command) -> list[str]:
        made = []
        for word in command.words:
            key, equals, value = word.rpartition("=")
            if RUNS.search(value):
                value = RUNS.sub(str(request.getfixturevalue("run")), value)
            elif key in ("weights",):
                value = str(weights(things, list(command.words)))
            elif key in ("to", "out"):
                value = value.replace("FILE", "file").replace("FOLDER", "made").replace("PATH", "made")
                value = "made" if value.startswith("/") else value
            elif key and not key.startswith("hydra"):
                value = FOLDERS.sub(str(things / "images"), value).replace("...", str(things / "images"))
            made.append(key + equals + value)
        return made

    return words


@pytest.mark.parametrize("command", each())
def test_it_can_be_typed(command, typed, monkeypatch):
    if reason := next((NOT_HERE[word] for word in command.words if word in NOT_HERE), None):
        pytest.skip(reason)
    program, words = command.program, typed(command)
    if program.startswith("caco-"):
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        program = scripts[program].partition(":")[0]
    if "/" in program:
        assert (ROOT / program).is_file()
        program = program.removesuffix(".py").replace("/", ".")
    if program in OTHERS:
        OTHERS[program](words)
    elif not words:
        assert importlib.util.find_spec(program) is not None
    else:
        monkeypatch.setattr(sys, "argv", [program, *words])
        OURS.get(program, read)(words, monkeypatch)


# Programs that do not belong to caco


def made_by_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if word.startswith("ARGS="):
            there(word.removeprefix("ARGS=").split())
        elif word not in ("-B", "PYTHON=python3.12"):
            assert word in targets


def there(words: list[str]) -> None:
    """Assert that the files and folders of the checkout that a command names exist."""
    for word in words:
        assert "/" not in word or word.startswith("/path/to/") or (ROOT / word).exists(), word


OTHERS = {"make": made_by_make, "pytest": there, "ruff": lambda words: there(words[1:])}


def test_every_target_of_the_makefile_says_what_it_does():
    named = {word for command in ALL if command.program == "make" for word in command.words[:1]}
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert named <= set(targets)
    dry = subprocess.run(["make", "-n", *sorted(named)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr


# Programs of caco


class Read(BaseException):
    """Raised when an argument parser has accepted the words, so that the program does not start."""


def stop(*_, **__):
    raise Read


def read(words: list[str], monkeypatch) -> argparse.Namespace | None:
    """The arguments that the program's parser makes from the words; None for --help."""
    module = importlib.import_module(sys.argv[0])
    parse = argparse.ArgumentParser.parse_args
    taken = []

    def parse_and_stop(parser, *arguments, **keywords):
        taken.append(parse(parser, *arguments, **keywords))
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    try:
        getattr(module, "main", None) or importlib.import_module(f"{sys.argv[0]}.__main__")
        (module if hasattr(module, "main") else sys.modules[f"{sys.argv[0]}.__main__"]).main()
    except Read:
        monkeypatch.undo()
        return taken[0]
    except SystemExit as end:
        assert end.code in (0, None) and words == ["--help"]
        return None
    raise AssertionError("its words were not read")


def train(words, monkeypatch):
    from hydra._internal.utils import get_args_parser

    from caco import checking, train
    from caco.config import folders

    arguments = get_args_parser().parse_args(folders.take(words))
    launched = checking.is_launched(arguments.overrides)
    if launched:
        train.offer_launcher()
    if not arguments.help:
        checking.check_command(arguments.overrides, multirun=arguments.multirun or launched)


def plan(words, monkeypatch):
    from caco import plan

    monkeypatch.setattr(plan, "report", lambda cfg, **numbers: "")
    monkeypatch.setattr("caco.plan.speed.measure", lambda cfg: {})
    plan._main(words)


def write(words, monkeypatch):
    from caco import write

    monkeypatch.setattr("caco.config.composition.instantiate", stop)
    with pytest.raises(Read):
        write.main(words)


def evaluate(words, monkeypatch):
    cfg = pretrained.compose("evaluate", words)
    # these take seconds on any images
    if cfg.run is not None and set(cfg.eval) <= {"knn", "knn_all", "probe", "geometry"}:
        importlib.import_module("caco.evaluate").main()


def done(words, monkeypatch):
    importlib.import_module(sys.argv[0]).main()
    to = Path(next(word for word in words if word.startswith("to=")).removeprefix("to="))
    assert to.exists()


def embed(words, monkeypatch):
    if any("/" in word and word.startswith("data.channels") for word in words) or "data.channels=1" in words:
        pretrained.compose("embed", words)
    else:
        done(words, monkeypatch)


def experiments_run(words, monkeypatch):
    from experiments import run

    monkeypatch.setattr(run, "estimate", lambda experiment, world: "")
    more = [] if any(word.startswith("seed=") for word in words) else ["seed=0"]
    sys.argv[2:2] = more
    sys.argv += [] if "--dry-run" in words else ["--dry-run"]
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 0


def of_results(words, monkeypatch):
    from analysis import figure
    from experiments.tables import experiments, load_scale, load_table

    given = read([word.partition("|")[0] for word in words], monkeypatch)
    if scale := getattr(given, "scale", None):
        load_scale("mini" if scale == "SCALE" else scale)
    if sys.argv[0] == "analysis.figure":
        assert set(given.figure.split("|")) <= set(figure.FIGURES)
    elif (table := getattr(given, "table", None)) and table != "TABLE":
        assert load_table(table).rows and (
            not scale or list(experiments(load_table(table), load_scale(scale))) is not None
        )


def a_record(words, monkeypatch):
    given = read(words, monkeypatch)
    for path in given.paths:
        assert not str(path).startswith("experiments/") or (ROOT / path).exists()


OURS = {
    "caco.train": train,
    "caco.plan": plan,
    "caco.write": write,
    "caco.evaluate": evaluate,
    "caco.export": done,
    "caco.embed": embed,
    "experiments.run": experiments_run,
    "experiments.record": a_record,
    **dict.fromkeys(("analysis.table", "analysis.figure", "analysis.report"), of_results),
    "tests.damage.run": lambda words, monkeypatch: int(words[1]),
    "scripts.pip_install": lambda words, monkeypatch: None,
    "scripts.timm_models": lambda words, monkeypatch: None,
}


# Other printed texts that can be wrong


def test_extras_are_the_distribution_s():
    """In texts such as `caco-ssl[analysis]`, the name is that of the distribution, and the extra exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*(ROOT / "caco").rglob("*.py"), *(ROOT / "analysis").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    texts += [path for pattern in PAGES for path in ROOT.glob(pattern)]
    found = [match for path in texts for match in re.findall(r"\b(caco(?:-ssl)?)\[([a-z,]+)\]", path.read_text())]
    assert {name for name, _ in found} == {project["name"]}
    assert {part for _, parts in found for part in parts.split(",")} <= set(project["optional-dependencies"])
