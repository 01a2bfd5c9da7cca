"""The bank's Triton kernels: correct in Triton's interpreter, compiled without a GPU, and not used where they fail."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels
from caco.banks.kernels import cards, fused, triton_passes


@pytest.mark.long
def test_what_is_promised_of_every_path_holds_in_the_interpreter(repo_root):
    """This needs a new process, because Triton decides at its import whether to use the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/banks/triton_interpreted.py"]
    done = subprocess.run(
        command, cwd=repo_root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", triton_passes.KERNELS)
@pytest.mark.parametrize(("arch", "bf16", "D"), [(80, False, 64), (90, True, 128)])
def test_kernels_compile_without_a_gpu_and_fit_the_card(name, arch, bf16, D):
    """benchmarks/kernels.py compiles for other widths and factors, too."""
    used = kernels.used(name, D, bf16=bf16, arch=arch)
    assert used.spilled == 0
    entry = kernels.entry(arch)
    assert used.shared_kib <= entry.shared_kib
    if name != "exact":
        blocks = entry.blocks[name, bf16][D > cards.WIDE]
        assert used.shared_kib <= cards.shared_kib(name, D, bf16, blocks) + 1, "the table's arithmetic is a bound"
    assert used.registers <= 255


def test_where_the_kernels_do_not_work_one_line_says_why_and_pytorch_streams(monkeypatch, capsys):
    def trial(device, width):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(triton_passes, "trial", trial)
    fused.on_cuda.cache_clear()
    try:
        assert [fused.on_cuda(torch.device("cuda", 0), 64) for _ in range(2)] == [None, None]
    finally:
        fused.on_cuda.cache_clear()
    assert (
        capsys.readouterr().err
        == "caco: the bank's Triton kernels cannot be used here (RuntimeError: no kernel image is available); "
        "PyTorch streams the bank instead, which is slower\n"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("D", [3, 64, 100, 128, 256])
def test_on_a_card_the_kernels_are_the_equations(D):
    triton_passes.trial(torch.device("cuda"), D)
