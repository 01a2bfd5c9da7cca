"""The check of a GPU writes down the result of every stage, keeps within its minutes and sees a bank that is wrong.
A contender of the bank that is not installed, or fails on a GPU, is left out by its name. No test here needs a GPU.
"""

import json
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch

import benchmarks.bank
import benchmarks.contenders
import benchmarks.gpu_check
import benchmarks.gpu_stages
from benchmarks import common
from caco.checking import check_command


def test_the_check_of_a_gpu_packs_20_000_images_from_one_seed_and_says_where_there_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.gpu_check, "PACKED_IMAGES", 10)
    for split in ("train", "test"):
        for number in range(12):
            file = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{split} {number}".encode())
    benchmarks.gpu_check.pack(tmp_path / "images", tmp_path / "packed.zip")
    with zipfile.ZipFile(tmp_path / "packed.zip") as packed:
        names = packed.namelist()
        assert len([name for name in names if name.startswith("train/")]) == 8 and len(names) == 10
        assert all(packed.read(name) == (tmp_path / "images" / name).read_bytes() for name in names)
    first = (tmp_path / "packed.zip").read_bytes()
    benchmarks.gpu_check.pack(tmp_path / "images", tmp_path / "again.zip")
    assert zipfile.ZipFile(tmp_path / "again.zip").namelist() == names and len(
        (tmp_path / "again.zip").read_bytes()
    ) == len(first)
    monkeypatch.setattr(benchmarks.gpu_check, "PACKED_IMAGES", 20)
    with pytest.raises(SystemExit, match="expected at least 16 images in class folders below .*train, got 12"):
        benchmarks.gpu_check.pack(tmp_path / "images", tmp_path / "packed.zip")


def test_the_check_of_a_gpu_holds_the_bank_to_the_equations_and_sees_a_wrong_one(monkeypatch):
    found = benchmarks.gpu_stages.kernels(torch.device("cpu"), tiny=True)
    assert len(found["off"]) == 2 and all(off["rows"] < 3e-2 for off in found["off"].values())
    update = benchmarks.gpu_stages.LearnableBank.update
    monkeypatch.setattr(
        benchmarks.gpu_stages.LearnableBank,
        "update",
        lambda self, *, lr, keys_GD: update(self, lr=1.1 * lr, keys_GD=keys_GD),
    )
    with pytest.raises(AssertionError, match="fp32: off by"):
        benchmarks.gpu_stages.kernels(torch.device("cpu"), tiny=True)


HANGS = """if True:
    import pathlib, subprocess, sys, time
    to = pathlib.Path(sys.argv[1])
    to.write_text('{"known": 1}')
    (to.parent / "child").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    print("what it printed", flush=True)
    time.sleep(60)
"""


def test_a_stage_that_fails_or_takes_too_long_is_written_down_and_the_next_one_starts(monkeypatch, tmp_path):
    ran = {
        "fails": benchmarks.gpu_check.Stage("A", 60, [], ["-c", "raise SystemExit(3)"]),
        "hangs": benchmarks.gpu_check.Stage("A", 3, [], ["-c", HANGS, "{to}"]),
        "works": benchmarks.gpu_check.Stage(
            "A", 60, [], ["-c", "import sys; open(sys.argv[1], 'w').write('{}')", "{to}"]
        ),
        "other": benchmarks.gpu_check.Stage("B", 60, [], ["-c", ""]),
    }
    monkeypatch.setattr(benchmarks.gpu_check, "STAGES", ran)
    monkeypatch.setattr(benchmarks.gpu_check, "lacks_gpu", lambda: "PyTorch sees none here")
    assert benchmarks.gpu_check.stages(["A"], tmp_path, None) == 2
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fails", "hangs", "works")}
    results = {name: file["stage"]["result"] for name, file in files.items()}
    assert results == {"fails": "failed with exit code 3", "hangs": "stopped at its time limit", "works": "done"}
    assert files["hangs"]["known"] == 1, "the file must keep what the stage wrote before it was stopped"
    assert "what it printed" in files["hangs"]["stage"]["printed_last"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "child", "fails.json", "hangs.json", "stages.json", "works.json",
    ]  # fmt: skip
    child = int((tmp_path / "child").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # it was killed with its parent; the process that inherits it needs time to notice
            os.kill(child, 0)
            time.sleep(0.1)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is the check itself: make gpu-check")
def test_the_stages_of_the_check_of_a_gpu_run_at_a_tiny_size_without_one(tmp_path, monkeypatch):
    """Stages that run another benchmark are tested with that benchmark, in test_benchmarks.py. The methods that learn
    differ only in their settings, so one is trained here and the settings of all are composed.
    """
    all_stages = benchmarks.gpu_check.STAGES
    chosen = {name: all_stages[name] for name in ("kernels", "waits", "learn-caco")}
    for stage in chosen.values():
        monkeypatch.setattr(stage, "limit_s", 300)  # two cores, shared with other tests
    monkeypatch.setattr(benchmarks.gpu_check, "STAGES", chosen)
    assert benchmarks.gpu_check.stages(["A", "B"], tmp_path, None) == 0
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in chosen}
    assert all(file["stage"]["result"] == "done" for file in files.values())
    assert files["waits"]["waits"] == {"caco": {"places": {}}} and files["learn-caco"]["knn"] > 10
    assert len(list(tmp_path.iterdir())) == len(chosen) + 1, "runs and images must not be left among the results"
    for name, settings in benchmarks.gpu_stages.LEARNING.items():
        check_command(
            [*benchmarks.gpu_stages.TRAINING, *settings, "data=digits", "augmentation=digits", "batch=64", "epochs=2"],
            multirun=False,
        )
        assert f"learn-{name}" in all_stages


def test_the_sets_of_the_check_keep_within_their_minutes():
    limits = {
        chosen: sum(stage.limit_s for stage in benchmarks.gpu_check.STAGES.values() if stage.set == chosen)
        for chosen in "AB"
    }
    assert limits["A"] <= 4 * 60 and limits["B"] <= 6 * 60


def test_the_images_of_the_check_lie_in_a_folder_that_git_ignores(repo_root):
    assert f"/{benchmarks.gpu_check.DATA.parent.name}/" in (repo_root / ".gitignore").read_text().splitlines()


def test_the_settings_of_the_check_are_settings(monkeypatch):
    """Composes the settings of all methods of the stage `waits`; none is run."""
    composed = []
    monkeypatch.setattr(
        benchmarks.gpu_stages, "run_training", lambda cfg, folder: composed.append(cfg.method._target_) or {}
    )
    found = benchmarks.gpu_stages.waits(Path("nowhere"), tiny=False, write=lambda known: None)
    assert found["waits"] == {name: {"places": {}} for name in benchmarks.gpu_stages.WAITING}
    assert len(composed) == len(benchmarks.gpu_stages.WAITING)


def test_a_contender_that_fails_on_a_gpu_is_left_out_by_its_name(monkeypatch, tmp_path):
    """On a GPU it may run for the first time; on a CPU, a failure would be an error of ours."""
    contender = benchmarks.bank.contenders(torch.device("cpu"))["attention"]

    class Fails(contender):
        def step(self, q_ND, k_ND):
            raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(benchmarks.bank, "contenders", lambda device: {"attention": Fails})
    monkeypatch.setattr(benchmarks.bank, "lacks", lambda name, device: None)
    _, q, k = benchmarks.bank.problem(8, 16, 4, torch.device("cpu"))
    published = benchmarks.bank.Published(torch.eye(16, 4) + 1)
    for device, fails in (("cuda", False), ("cpu", True)):
        how, report = benchmarks.bank.How(torch.device(device), "wall", 1, 64), common.Report(["what"])
        if fails:
            with pytest.raises(RuntimeError, match="no kernel image"):
                benchmarks.bank.contenders_that_serve(report, published, q, k, how)
        else:
            assert benchmarks.bank.contenders_that_serve(report, published, q, k, how) == {}
            assert report.left_out["attention"] == "RuntimeError: no kernel image is available"


def test_contenders_of_a_gpu_that_are_not_there_are_named(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(benchmarks.contenders.importlib.util, "find_spec", lambda name: None)
    reasons = {name: benchmarks.contenders.lacks(name, gpu) for name in benchmarks.contenders.contenders(gpu)}
    assert reasons == {
        "linear_cross_entropy": f"PyTorch {torch.__version__} has no such function", "attention": None,
        "Liger": "liger_kernel is not installed", "cut-cross-entropy": "cut_cross_entropy is not installed",
    }  # fmt: skip
