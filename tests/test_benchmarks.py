"""Each benchmark runs without an argument, ends with one table, and says what it leaves out because the machine lacks
the hardware or the software. What concerns a GPU is in test_gpu_benchmarks.py.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.bank
import benchmarks.evals
import benchmarks.kernels
import benchmarks.loader
import benchmarks.peers
import benchmarks.reading
import benchmarks.step
from benchmarks import common
from caco import instructions

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["bank", "evals", "kernels", "loader", "peers", "reading", "step"]


@pytest.mark.parametrize("name", [*NAMES, "gpu_check"])
def test_every_option_is_described_in_whole_sentences(name):
    for call in ast.walk(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith((".add_argument", "parser")):
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert "help" in words or ast.unparse(call.func) == "parser", ast.unparse(call)
            for text in {words.get(key, "argparse.SUPPRESS") for key in ("help", "runs", "full")}:
                assert re.fullmatch(r"""f?["'][A-Z`].*\.["']|argparse.SUPPRESS|counted""", text), text


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, ...) runs a benchmark at the size for tests; returns what it prints, and its figures."""

    def ran(name: str, *arguments: str) -> tuple[str, dict]:
        module, file = getattr(benchmarks, name), tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--json", str(file), *arguments])
        threads = torch.get_num_threads()
        try:
            module.main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out, json.loads(file.read_text())

    return ran


@pytest.fixture
def no_bf16(monkeypatch):
    """Simulate an AVX2 processor, on which bfloat16 products would take minutes; they raise an error here."""
    monkeypatch.setattr(instructions, "flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(instructions, "used", lambda part: "avx2")
    product, autocast = torch.Tensor.__matmul__, torch.autocast

    def checked(a, b):
        assert a.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu")
        return product(a, b)

    def off(device, dtype=torch.bfloat16, enabled=True):
        assert not enabled
        return autocast(device, dtype, enabled=enabled)

    monkeypatch.setattr(torch.Tensor, "__matmul__", checked)
    monkeypatch.setattr(torch, "autocast", off)


def test_without_an_argument_there_is_a_table_and_the_machine(run):
    """The other benchmarks are tested below and in the long tier."""
    printed, figures = run("evals")
    progress, _, end = printed.partition("\n\n| ")
    assert re.match(r"\[ *\d+ s\] ", progress) and end.count("\n| ") > 1
    assert "; ".join(f"{fact}: {value}" for fact, value in common.machine().items()) in end.splitlines()[-1]
    assert figures["machine"] == common.machine() and len(figures) > 3


def test_the_bank_leaves_out_bfloat16_where_it_has_no_unit(run, no_bf16):
    printed, figures = run("bank", "speed", "step", "curve")
    for what in ("the bf16 matrix product", "the bank in bf16", "the step in bf16"):
        before, _, after = printed.partition(f"left out: {what}: ")
        assert after and figures["left_out"][what] in after
    assert printed.index("left out: the bf16 matrix product") < printed.index("turn 1 of 1")  # before anything is timed
    assert "bf16" not in figures["d128"] and "bf16_peak_gflops" not in figures["d128"]
    way = "streamed" if instructions.LEVEL == "torch" else "fp32"  # PyTorch code in blocks, or the kernel
    assert figures["vs_published_d128"] == figures["d128"][way]["ratio"] and figures["d128"]["fp32_peak_gflops"] > 0
    assert figures["step"]["precision"] == "fp32" and figures["curve"][0]["way"] == way


def test_what_pytorch_has_for_parts_of_the_step_is_set_beside_the_bank_or_said_to_be_left_out(run, monkeypatch):
    """Each contender is compared with the published step before it is timed, so this fails if one computes something
    else.
    """
    printed, figures = run("bank", "speed")
    for name in ("linear_cross_entropy", "attention"):
        assert (figures["d128"][name]["ratio"] > 0) == (f"step of {name}, " in printed) is True
    assert (
        figures["d128"]["streamed"]["vs_linear_cross_entropy"] > 0
        and "GPUs" in figures["left_out"][benchmarks.bank.PYPI]
    )
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    printed, figures = run("bank", "speed")
    assert figures["left_out"]["linear_cross_entropy"] in printed and "linear_cross_entropy" not in figures["d128"]
    assert "vs_linear_cross_entropy" not in figures["d128"]["streamed"]


def test_bfloat16_that_was_asked_for_is_refused_where_it_has_no_unit(run, no_bf16, capsys):
    for name, argument in (("step", "precision=bf16"), ("bank", "--precision=bf16")):
        with pytest.raises(SystemExit):
            run(name, argument)
        assert "no unit that is known for products of bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["AVX2", "avx512_core_vnni"])
def test_units_that_pytorch_is_kept_from_count_as_none(monkeypatch, held):
    monkeypatch.setattr(instructions, "flags", lambda: {"avx512_bf16"})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert common.lacks_bf16() is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert f"ONEDNN_MAX_CPU_ISA={held.upper()}" in common.lacks_bf16()


def test_without_the_kernel_the_bank_is_pytorchs_alone(run, monkeypatch):
    monkeypatch.setattr(benchmarks.bank.fused, "library", lambda: None)
    monkeypatch.setattr(instructions, "used", lambda part: "not built")
    printed, figures = run("bank", "speed")
    for what in ("the bank in fp32", "the bank in bf16"):
        assert f"left out: {what}: {figures['left_out'][what]}" in printed
        assert figures["left_out"][what] == "the bank's compiled kernel is not built"
    assert "fp32" not in figures["d128"] and figures["vs_published_d128"] == figures["fallback_vs_published"]


def test_the_loader_without_ffcv_and_libturbojpeg(run, monkeypatch):
    monkeypatch.setattr(benchmarks.loader, "lacks_ffcv", lambda: "FFCV is not installed here")
    monkeypatch.setattr(benchmarks.loader, "what_ffcv_lacks", lambda source: "needs FFCV")
    monkeypatch.setattr(benchmarks.loader.native, "turbojpeg", lambda: None)
    printed, figures = run("loader", "--only", "large,first", "--workers", "1")
    assert "making 4 JPEGs of noise" in printed and figures["photos"] == "made"
    assert set(figures["left_out"]) == {
        "loader=ffcv (caco is loader=torch then)", "FFCV's own crop", "decoding alone",
        "the first batch of loader=ffcv",
    }  # fmt: skip
    assert figures["vs_pil"]["median"] > 0 and "vs_ffcv" not in figures and "first_batch_s" not in figures


def test_reading_compares_features_with_decoding_and_looks_with_reading(run):
    printed, figures = run("reading", "--workers", "1")
    assert (figures["features"]["photos"], figures["digests"]["files"], figures["overlap"]["files"]) == (6, 200, 200)
    assert figures["features"]["vs_decode"]["median"] > 0
    assert all(figures[name]["vs_read"]["median"] > 0 for name in ("digests", "overlap", "start"))
    assert figures["start"]["images"] == 800 and "the digest of the images" in figures["start"]["parts"][0]
    assert "features / decoding alone, images per second" in printed


def test_made_photographs_have_the_texture_of_real_ones(tmp_path):
    """A photograph has about as many bytes as an ImageNet image (108,000 on average), and no two are alike."""
    common.make_photos(tmp_path / "photos", 3, 500)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "photos").iterdir())]
    assert all(80_000 < size < 140_000 for size in sizes) and len(set(sizes)) == 3


def test_kernels_without_triton_say_so(run, monkeypatch):
    monkeypatch.setattr(benchmarks.kernels, "lacks_triton", lambda: "Triton is not installed here")
    printed, figures = run("kernels")
    assert figures["left_out"] == {"every kernel": "Triton is not installed here"} and "kernels" not in figures


@pytest.fixture
def few_images(tmp_path):
    """16 to train on and 10 to test with, of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def test_peers_train_the_same_and_one_without_an_environment_is_left_out_by_name(run, few_images, monkeypatch):
    """lightly from the environment of the tests; both trainings end with weights that the k-NN can read."""
    pytest.importorskip("lightly")
    peers = benchmarks.peers
    monkeypatch.setattr(peers, "ENVIRONMENTS", few_images / "none")
    lacks, python_of = peers.lacks, peers.python_of
    monkeypatch.setattr(peers, "lacks", lambda peer: None if peer == "lightly" else lacks(peer))
    monkeypatch.setattr(peers, "python_of", lambda peer: sys.executable if peer == "lightly" else python_of(peer))
    printed, figures = run("peers", "--images", str(few_images), "--methods", "mocov2", "--workers", "0")
    assert "MoCo v2, a tiny ResNet, batch 8: caco / lightly |" in printed
    found = figures["mocov2_small_resnet"]
    assert found["images"] == 16 and found["vs"]["lightly"]["median"] > 0
    assert {name: len(top1) for name, top1 in found["knn_top1"].items()} == {"caco": 1, "lightly": 1}
    why = f"it has no environment yet: {peers.MAKE}"
    assert figures["left_out"] == {"stable-pretraining": why} and f"left out: stable-pretraining: {why}" in printed
    assert figures["versions"]["lightly"]["torch"] == figures["versions"]["caco"]["torch"]


@pytest.mark.long
def test_stable_pretraining_trains_the_same(run, few_images):
    if why := benchmarks.peers.lacks("stable-pretraining"):
        pytest.skip(f"stable-pretraining: {why}")
    printed, figures = run("peers", "--images", str(few_images), "--peers", "stable-pretraining", "--workers", "0")
    for method in ("mocov2", "simclr"):
        assert figures[f"{method}_small_resnet"]["vs"]["stable-pretraining"]["median"] > 0
    assert "not the same: stable-pretraining: its MoCo v2 makes a third forward pass" in printed


def test_peers_refuse_what_they_do_not_know_before_anything_starts(run, capsys, tmp_path):
    for arguments, why in (
        (["--methods", "byol"], "--methods: expected some of mocov2, simclr; got byol"),
        (["--epochs", "1"], "--epochs: expected at least 2"),
        (["--images", str(tmp_path / "none")], "--images: expected a folder"),
    ):
        with pytest.raises(SystemExit):
            run("peers", *arguments)
        assert why in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_each_runs_without_an_argument_from_any_folder(name, repo_root, tmp_path):
    command = [sys.executable, str(repo_root / "benchmarks" / f"{name}.py"), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Exception ignored", done.stderr), done.stderr
    progress, _, end = done.stdout.partition("\n\n| ")
    assert re.match(r"\[ *\d+ s\] ", progress) and end.count("| ---") > 1
    last = end.splitlines()[-1]
    assert all(
        f"{fact}: {value}" in last
        for fact, value in common.machine().items()
        if fact not in ("threads", "instructions")
    )
    assert "instructions: " in last and "threads: " in last
    assert list(tmp_path.iterdir()) == []


def test_their_imports_go_one_way(repo_root):
    """common, published, contenders, peer_loops and gpu_stages import no benchmark, and of the benchmarks only bank
    imports another one.
    """
    known = {
        file.stem: set(re.findall(r"^from benchmarks(?:\.(\w+))? import (\w+)?", file.read_text(), re.MULTILINE))
        for file in (repo_root / "benchmarks").glob("*.py")
    }
    other = {
        name: {module or first for module, first in found}
        - {"common", "published", "contenders", "peer_loops", "gpu_stages"}
        for name, found in known.items()
    }
    assert other == {
        "bank": {"step"},
        **{
            name: set()
            for name in (
                "common",
                "contenders",
                "evals",
                "kernels",
                "loader",
                "peer_loops",
                "peers",
                "published",
                "reading",
                "step",
                "gpu_check",
                "gpu_stages",
            )
        },
    }


def test_figures_are_written_as_they_come(tmp_path):
    """The file of a benchmark that is stopped early contains what it had found."""
    report = common.Report(["what", "figure"], tmp_path / "figures.json")
    report.figures["peak"] = 3
    report.row("a product", "3 GFLOP/s")
    early = json.loads((tmp_path / "figures.json").read_text())
    assert (early["peak"], early["unfinished"], early["rows"]) == (3, True, [["a product", "3 GFLOP/s"]])
    report.end(tmp_path / "figures.json")
    whole = json.loads((tmp_path / "figures.json").read_text())
    assert whole["peak"] == 3 and "unfinished" not in whole and whole["machine"] == common.machine()
