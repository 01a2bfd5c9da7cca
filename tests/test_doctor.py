"""`python -m caco.doctor` reports what works on this machine, what does not, and what to do; each finding is tested
with a simulated machine.
"""

import importlib.util
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from caco import doctor, instructions
from caco.data.sets.recognising import dataset_at
from caco.doctor import Finding, verdict

ROOT = Path(doctor.__file__).parents[1]
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def only(findings):
    (finding,) = findings
    return finding


def images(folder: Path, *, suffix: str = ".png") -> None:
    folder.mkdir(parents=True)
    (folder / f"1{suffix}").touch()


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_command_says_what_is_here_and_what_stops_one_by_its_exit_code(tmp_path):
    images(tmp_path / "mine" / "cats")
    command = [sys.executable, "-m", "caco.doctor", "mine", "absent", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], done.stderr) == (1, False, "")
    assert "data" in told["stops"]
    states = {(found["part"], found["what"]): found["state"] for found in told["findings"]}
    assert states["data", "data=folder data.validation_fraction=0.1 data.root=mine"] == "works"
    assert states["data", "absent: no such folder"] == "broken"
    assert {"python", "caco", "torch", "gpu", "ffcv", "slurm", "mlflow", "disk", "data"} <= {part for part, _ in states}
    assert all(found["do"] for found in told["findings"] if found["state"] != "works"), (
        "every finding that does not work must say what to do"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"], "the doctor must write nothing"


def test_what_is_absent_stops_only_those_who_need_it():
    findings = [
        Finding("torch", "works", ""),
        Finding("gpu", "absent", ""),
        Finding("slurm", "works", ""),
        Finding("slurm", "absent", ""),
    ]
    assert verdict(findings, []) == []
    assert verdict(findings, ["slurm"]) == []
    assert verdict(findings, ["gpu", "native"]) == ["gpu", "native"]
    assert verdict([*findings, Finding("disk", "broken", "")], []) == ["disk"]


def test_the_exit_code_is_that_of_the_verdict(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PARTS", {"gpu": lambda: iter([Finding("gpu", "absent", "none", "buy one")])})
    assert doctor.main([]) == 0
    assert doctor.main(["--need", "gpu"]) == 1
    assert "       buy one\n" in capsys.readouterr().out.replace("        ", "")


def test_a_partition_is_shown_with_its_gpus(monkeypatch, tmp_path):
    for name in ("sbatch", "squeue", "scontrol"):
        program(tmp_path / "bin", name, "exit 0")
    program(tmp_path / "bin", "sinfo", "echo 'long* 4 64 gpu:a100:8'; echo 'short 2 8 (null)'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert [found.what for found in doctor.slurm() if found.state == "works"] == [
        "partition long*: 4 nodes of 64 CPUs, gpu:a100:8",
        "partition short: 2 nodes of 8 CPUs, no GPUs",
    ]
    program(tmp_path / "bin", "sinfo", "echo 'sinfo: error: no controller' >&2; exit 1")
    assert next(doctor.slurm()).what == "sinfo: error: no controller"
    (tmp_path / "bin" / "sbatch").unlink()
    assert next(doctor.slurm()) == Finding("slurm", "absent", "no sbatch", next(doctor.slurm()).do)


@needs_mlflow
def test_the_store_is_opened_and_a_damaged_one_is_told_from_a_good_one(tmp_path, monkeypatch):
    store = tmp_path / "mlflow.db"
    assert "will be made by the first run" in only(doctor.mlflow()).what
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE runs (lifecycle_stage TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("active",), ("active",), ("deleted",)])
    database.close()
    assert f"; 2 runs in {store}" in only(doctor.mlflow()).what
    store.write_bytes(b"no database" * 1000)
    found = only(doctor.mlflow())
    assert found.state == "broken" and "file is not a database" in found.what and "move" in found.do
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        found = only(doctor.mlflow())
        assert found.state == "broken" and "does not answer" in found.what and "sync" in found.do
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///x")
    assert only(doctor.mlflow()).state == "broken"


@needs_mlflow
def test_a_store_may_lie_in_a_folder_of_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "50% of #1"
    folder.mkdir()
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("CREATE TABLE runs (lifecycle_stage TEXT)")
    database.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    assert "; 0 runs in" in only(doctor.mlflow()).what


@needs_mlflow
def test_a_server_is_asked_with_the_password_in_its_address_and_without_showing_it(monkeypatch):
    asked, answers = (
        [],
        [b"HTTP/1.0 200 OK\r\n\r\nOK", b"HTTP/1.0 401 Unauthorized\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"],
    )

    def serve(listener):
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096).decode())
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:l%40rge-secret@127.0.0.1:{port}/at")
        found = [only(doctor.mlflow()) for _ in answers]
        thread.join(10)
    assert [one.state for one in found] == ["works", "broken", "broken"], found
    assert "answers: HTTP Error 401" in found[1].what and "does not answer" in found[2].what
    assert not any("rge-secret" in one.what for one in found)
    assert asked[0].startswith("GET /at/health ") and "Authorization: Basic bWU6bEByZ2Utc2VjcmV0" in asked[0]


def test_a_small_dev_shm_hinders_nobody(monkeypatch):
    usage = types.SimpleNamespace(total=2**26, free=2**40)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert only(doctor.disk()).state == "works"


def test_a_folder_of_images_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    images(tmp_path / "train" / "cats")

    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor.os, "scandir", refuses)
    found = list(doctor.data([tmp_path]))[-1]
    assert found.state == "broken" and "Permission denied" in found.what


def test_an_ffcv_whose_libraries_are_gone_is_broken_and_not_absent(tmp_path, monkeypatch):
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").touch()
    (tmp_path / "ffcv" / "_libffcv.cpython.so").write_bytes(b"\x7fELF, but torn")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    found = only(doctor.ffcv())
    assert found.state == "broken" and "_libffcv" in found.what and "libturbojpeg0-dev" in found.do
    (tmp_path / "ffcv" / "_libffcv.cpython.so").unlink()
    assert "no _libffcv" in only(doctor.ffcv()).what
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    assert only(doctor.ffcv()).state == "absent"


def test_a_native_part_that_setup_py_has_and_the_package_has_not_is_named(tmp_path, monkeypatch):
    (tmp_path / "setup.py").write_text('setup(ext_modules=[Extension("caco.banks._never_built", [])])')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    found = next(doctor.native())
    assert found.state == "absent" and found.what == "not built: caco.banks._never_built" and "pip install" in found.do


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, as the native parts do")
def test_the_native_parts_are_built_where_a_compiler_is_and_the_level_at_which_they_serve_is_said(monkeypatch):
    """setup.py continues without them, and their tests are skipped then, so no other test would notice that they fail
    to build.
    """
    monkeypatch.setattr(instructions, "LEVEL", "plain")
    assert only(doctor.native()) == Finding(
        "native", "works", "caco.banks.kernels._kernel (plain), caco.data.views._views (plain)"
    )
    assert only(doctor.cpu()).what.endswith(f": {', '.join(instructions.processor())}; CACO_INSTRUCTIONS=plain")
    monkeypatch.setattr(instructions, "LEVEL", "torch")
    found = only(doctor.native())
    assert (found.state, found.what) == (
        "absent",
        "turned off by CACO_INSTRUCTIONS=torch: caco.banks.kernels._kernel, caco.data.views._views",
    )
    monkeypatch.setattr(instructions, "LEVEL", None)
    assert only(doctor.cpu()).what.endswith("; the best is used, because CACO_INSTRUCTIONS is not set")


def test_a_driver_whose_gpus_torch_does_not_see_is_no_machine_without_gpus(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    assert [found.state for found in doctor.torch() if found.part == "gpu"] == ["absent"]
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA 1.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    found = only(found for found in doctor.torch() if found.part == "gpu")
    assert found.state == "broken" and found.do.startswith("CUDA_VISIBLE_DEVICES='9' hides them")


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuses(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuses)
    found = next(doctor.disk())
    assert found.state == "broken" and "Permission denied" in found.what


@pytest.mark.parametrize(
    "folders, option",
    [
        (["cifar-10-batches-py"], "cifar10"),
        (["stl10_binary"], "stl10"),
        (["train/cats", "test/cats"], "folder"),
        (["train/cats", "val/cats"], "folder"),
        (["train/cats", "val"], "folder data.validation_fraction=0.1"),
        (["cats", "dogs"], "folder data.validation_fraction=0.1"),
        (["."], "folder eval=[]"),
        (["train/n00000001", "val/n00000001"], "folder"),
        ([], ""),
    ],
)
def test_what_lies_in_a_folder_is_read_by_this_option(tmp_path, folders, option):
    root = tmp_path / "set"
    for folder in folders or ["empty/emptier"]:
        images(root / folder) if folders else (root / folder).mkdir(parents=True)
    assert dataset_at(root) == option


def test_imagenet_is_known_by_its_thousand_classes(tmp_path):
    for part in ("train", "val"):
        for number in range(1000):
            (tmp_path / "set" / part / f"n{number:08d}").mkdir(parents=True)
        (tmp_path / "set" / part / "n00000000" / "a.JPEG").touch()
    assert dataset_at(tmp_path / "set") == "imagenet"
    (tmp_path / "set" / "val" / "n00000000" / "a.JPEG").unlink()
    assert dataset_at(tmp_path / "set") == "folder data.validation_fraction=0.1"
