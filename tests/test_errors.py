"""UserError reports mistakes of a user; every command shows it in the same way, and a bug keeps its traceback."""

import ast
import errno
import importlib
import io
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator

import pytest
from test_imports import MODULES, ROOT

from caco import errors
from caco.errors import FileError, UserError

# Each command with arguments that it refuses only after it has read its command line.
COMMANDS = {
    "caco.evaluate": ("got nowhere, which does not exist", ["run=nowhere"]),
    "caco.export": ("got nowhere, which does not exist", ["run=nowhere", "to=x"]),
    "caco.embed": ("got nowhere, which does not exist", ["run=nowhere", "to=x.npz"]),
    "caco.plan": ("batch: expected a multiple of the 2 processes", ["batch=3", "world=2", "bank.size=8"]),
    "caco.write": ("nowhere", ["data=folder", "data.root=nowhere", "out=x"]),
    "caco.tracking.sync": ("expected a run directory", ["."]),
    "experiments.run": ("nowhere", ["table7", "scale=nowhere"]),
    "experiments.record": ("expected a finished run", ["nowhere"]),
    "analysis.table": ("nowhere", ["7", "--scale=nowhere"]),
    "analysis.figure": ("nowhere", ["4", "--scale=nowhere"]),
    "analysis.report": ("nowhere", ["--scale=nowhere"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_a_refusal_alone_and_ends_with_exit_code_2(command, tmp_path, monkeypatch, capsys):
    """The commands are run as by `python -m`, so that their functions belong to __main__."""
    importlib.import_module(command)
    monkeypatch.delitem(sys.modules, command)  # otherwise runpy warns
    expected, arguments = COMMANDS[command]
    monkeypatch.setattr("sys.argv", [command, *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(command, run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith("caco: ") and "Traceback" not in told and expected in told


def test_export_shows_what_it_refuses_itself_alone(tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    from caco.nn.backbones import small_resnet

    importlib.import_module("caco.export")
    monkeypatch.delitem(sys.modules, "caco.export")
    save_file(small_resnet(width=8).state_dict(), tmp_path / "w.safetensors")
    words = [
        f"weights={tmp_path}/w.safetensors",
        "format=timm",
        "backbone=small_resnet",
        "backbone.width=8",
        "augmentation=digits",
    ]
    monkeypatch.setattr("sys.argv", ["export.py", *words, f"to={tmp_path}/to", "layouts=[timm]"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("caco.export", run_name="__main__")
    assert end.value.code == 2
    counted, refused = capsys.readouterr().err.splitlines()
    assert "of the backbone's" in counted and refused.startswith(
        "caco: layouts: timm has no model with this backbone's stem"
    )


def test_a_bug_a_refusal_and_an_interruption(monkeypatch, capsys):
    def end(error, **options):
        try:
            with errors.shown(**options):
                raise error
        except SystemExit as end:
            return end.code, capsys.readouterr().err

    assert end(UserError("no")) == end(FileError("no")) == (2, "caco: no\n")
    assert end(KeyboardInterrupt(), interrupted="all is kept") == (130, "caco: interrupted; all is kept\n")
    with pytest.raises(ValueError, match="a bug"):
        end(ValueError("a bug"))
    monkeypatch.setenv("CACO_TRACEBACK", "1")
    with pytest.raises(UserError):
        end(UserError("no"))


def test_who_catches_value_errors_and_os_errors_catches_these():
    full = FileError(28, "No space left on device", "/x")
    assert isinstance(full, OSError) and isinstance(full, ValueError) and full.errno == 28
    assert str(pickle.loads(pickle.dumps(full))) == "[Errno 28] No space left on device: '/x'"


def test_a_component_s_arguments_are_the_user_s():
    """A component's arguments come from the user's configuration, so its errors are shown as mistakes of the user."""
    wrong = []
    for module, path in MODULES.items():
        for made in ast.walk(ast.parse(path.read_text())):
            if isinstance(made, ast.FunctionDef) and made.name in ("__init__", "__post_init__"):
                raised = [
                    node.exc.func
                    for node in ast.walk(made)
                    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
                ]
                wrong += [
                    f"{module}:{f.lineno}"
                    for f in raised
                    if isinstance(f, ast.Name) and f.id in ("ValueError", "OSError")
                ]
    assert wrong == []


def test_the_class_comes_without_anything_heavy():
    loaded = (
        "import sys; before = set(sys.modules); import caco.errors; print(sorted({m.partition('.')[0] for m in"
        " set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "hydra", "omegaconf"} & set(done.stdout.replace("'", " ").split())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room there"), (errno.EDQUOT, "a larger quota"),
        (errno.EROFS, "a place that can be written to"),
        (errno.EACCES, "a place that you may use"), (errno.EIO, "the disk or the network storage fails"),
        (errno.ESTALE, "check that it is mounted"),
    ],
)  # fmt: skip
def test_what_a_machine_cannot_do_is_one_sentence_with_exit_code_2(number, advice, capsys):
    with pytest.raises(SystemExit) as ended, errors.shown():
        try:
            raise OSError(number, os.strerror(number), "/disk/file")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert (
        told.startswith(f"caco: /disk/file: {os.strerror(number)}; what was written before is untouched. ")
        and advice.lower() in told.lower()
    )


def test_an_error_that_is_merely_on_the_way_to_a_slip_does_not_hide_it():
    with pytest.raises(ZeroDivisionError), errors.shown():
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "/file")
        except PermissionError:
            raise ZeroDivisionError  # noqa: B904


@pytest.fixture
def without_a_reader() -> Iterator[io.TextIOWrapper]:
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(os.fdopen(writing, "wb"), line_buffering=True) as stream:
        yield stream  # what is left in it has gone nowhere by then, or closing it fails


def test_who_reads_standard_error_may_go_and_the_work_goes_on(monkeypatch, without_a_reader):
    monkeypatch.setattr(sys, "stderr", without_a_reader)
    done = []
    with errors.shown():
        for step in range(3):
            print(f"step {step}", file=sys.stderr, flush=True)
            done.append(step)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("rows", [1, 10_000])
def test_where_nobody_reads_the_results_a_command_ends_quietly(monkeypatch, without_a_reader, rows):
    monkeypatch.setattr(sys, "stdout", without_a_reader)
    with pytest.raises(SystemExit) as end, errors.shown():
        print("row\n" * rows, end="")
    assert end.value.code == 128 + 13


def test_a_broken_pipe_that_is_none_of_the_commands_own_is_no_quiet_end():
    with pytest.raises(BrokenPipeError), errors.shown():
        raise BrokenPipeError(32, "Broken pipe")


def test_want_of_memory_is_said_in_a_sentence(capsys):
    import numpy as np
    import torch

    for ask in (lambda: np.empty(2**50), lambda: torch.empty(2**58), lambda: bytes(2**60)):
        with pytest.raises(SystemExit) as end, errors.shown():
            ask()
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.startswith("caco: there is not so much memory as this asks for"), told
