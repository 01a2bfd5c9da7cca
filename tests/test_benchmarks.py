"""Benchmarks: each runs without an argument and ends with one table; what the machine has no unit for is said and not run."""

import json
import re
import subprocess
import sys

import pytest
import torch

import benchmarks.bank
import benchmarks.evals
import benchmarks.kernels
import benchmarks.loader
import benchmarks.reading
import benchmarks.step
from benchmarks import common
from caco import instructions

NAMES = ["bank", "evals", "kernels", "loader", "reading", "step"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, ...): what a benchmark prints at its tests' size, and its figures."""

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
    """A processor of AVX2, where a product of bfloat16 would take minutes: here it is an error."""
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
    """The others: the tests below, and the long one."""
    printed, figures = run("evals")
    progress, _, end = printed.partition("\n\n| ")
    assert re.match(r"\[ +\d+ s\] ", progress) and end.count("\n| ") > 1
    assert "; ".join(f"{fact}: {value}" for fact, value in common.machine().items()) in end.splitlines()[-1]
    assert figures["machine"] == common.machine() and len(figures) > 3


def test_the_bank_leaves_out_bfloat16_where_it_has_no_unit(run, no_bf16):
    printed, figures = run("bank", "speed", "step", "curve")
    for what in ("the bf16 matrix product", "the bank in bf16", "the step in bf16"):
        before, _, after = printed.partition(f"left out: {what}: ")
        assert after and figures["left_out"][what] in after
    assert printed.index("left out: the bf16 matrix product") < printed.index("turn 1 of 1")  # said before, not instead
    assert "bf16" not in figures["d128"] and "bf16_peak_gflops" not in figures["d128"]
    way = "streamed" if instructions.LEVEL == "torch" else "fp32"  # PyTorch's blocks, or the kernel
    assert figures["vs_published_d128"] == figures["d128"][way]["ratio"] and figures["d128"]["fp32_peak_gflops"] > 0
    assert figures["step"]["precision"] == "fp32" and figures["curve"][0]["way"] == way


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
        "loader=ffcv (caco is loader=torch then)", "FFCV's own crop", "decoding alone", "the first batch of loader=ffcv",
    }  # fmt: skip
    assert figures["vs_pil"]["median"] > 0 and "vs_ffcv" not in figures and "first_batch_s" not in figures


def test_reading_compares_features_with_decoding_and_looks_with_reading(run):
    printed, figures = run("reading", "--workers", "1")
    assert (figures["features"]["photos"], figures["digests"]["files"], figures["overlap"]["files"]) == (6, 200, 200)
    assert all(figures[name][of]["median"] > 0 for name, of in (("features", "vs_decode"), ("digests", "vs_read"), ("overlap", "vs_read")))
    assert "features / decoding alone, images a second" in printed


def test_made_photographs_have_the_texture_of_real_ones(tmp_path):
    """As many bytes as one of ImageNet's, 108,000 on average; nothing in them repeats."""
    common.make_photos(tmp_path / "photos", 3, 500)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "photos").iterdir())]
    assert all(80_000 < size < 140_000 for size in sizes) and len(set(sizes)) == 3


def test_kernels_without_triton_say_so(run, monkeypatch):
    monkeypatch.setattr(benchmarks.kernels, "lacks_triton", lambda: "Triton is not installed here")
    printed, figures = run("kernels")
    assert figures["left_out"] == {"every kernel": "Triton is not installed here"} and "kernels" not in figures


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_each_runs_without_an_argument_from_any_folder(name, repo_root, tmp_path):
    command = [sys.executable, str(repo_root / "benchmarks" / f"{name}.py"), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Exception ignored", done.stderr), done.stderr
    progress, _, end = done.stdout.partition("\n\n| ")
    assert re.match(r"\[ +\d+ s\] ", progress) and end.count("| ---") > 1
    last = end.splitlines()[-1]
    assert all(f"{fact}: {value}" in last for fact, value in common.machine().items() if fact not in ("threads", "instructions"))
    assert "instructions: " in last and "threads: " in last
    assert list(tmp_path.iterdir()) == []


def test_their_imports_go_one_way(repo_root):
    """common and published know no benchmark, and of those bank alone knows another."""
    known = {
        file.stem: set(re.findall(r"^from benchmarks(?:\.(\w+))? import (\w+)?", file.read_text(), re.MULTILINE))
        for file in (repo_root / "benchmarks").glob("*.py")
    }
    other = {name: {module or first for module, first in found} - {"common", "published"} for name, found in known.items()}
    assert other == {"bank": {"step"}, **{name: set() for name in ("common", "evals", "kernels", "loader", "published", "reading", "step")}}
