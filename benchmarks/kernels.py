"""What the bank's Triton kernels take of a card: compiled ahead of time, so no GPU is needed (and nothing is timed).

    python benchmarks/kernels.py                     sm_80 and sm_90, widths 64, 128, 256: registers, spills, shared memory
    python benchmarks/kernels.py --arch 89 120 --widths 96
"""

import argparse
import re
import subprocess
import tempfile
from typing import NamedTuple

import caco  # noqa: F401 - before torch, as CACO_INSTRUCTIONS asks

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from caco.banks import triton_kernels

MOST_KIB = {80: 163, 90: 227, 100: 227}  # shared memory of one program; 99 on the others
FLAGS = {"forward": {"SECOND": True, "SUMS": True}, "nearest": {"T": triton_kernels.TOP}, "update": {"NORMALISE": True}}
ARGUMENTS = {"positive_ptr": "*i32", "row_ptr": "*i32", "z_ptr": "*fp64", "z2_ptr": "*fp64", "N": "i32", "R": "i32", "rows_of_share": "i32"}


class Used(NamedTuple):
    registers: int  # of one thread
    spilled: int  # bytes of one thread
    shared_kib: float


def used(name: str, D: int, *, low: bool, arch: int) -> Used:
    """Compile one kernel, with all that it can compute, for sm_`arch`."""
    kernel = triton_kernels.KERNELS[name]
    fixed, options = triton_kernels.constants(name, D, low=low, hopper=arch // 10 in (9, 10))
    fixed |= FLAGS[name]
    signature = {
        argument: "constexpr" if argument in fixed
        else ARGUMENTS.get(argument, "*bf16" if argument == "q_ptr" and low else "*fp32" if argument.endswith("_ptr") else "fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    aligned = {(at,): [["tt.divisibility", 16]] for at, argument in enumerate(kernel.arg_names) if argument.endswith("_ptr")}
    source = ASTSource(kernel, signature, fixed, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    # Without calls the only use of a stack is for spilled registers.
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return Used(int(registers), int(stack), done.metadata.shared / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}\n\n| card | kernel | factors | D | queries x rows | warps | registers | spilled, B | shared, KiB (of) |\n|---|---|---|---|---|---|---|---|---|")
    for arch in arguments.arch:
        for name in triton_kernels.KERNELS:
            for low in (True, False):
                for D in arguments.widths:
                    fixed, options = triton_kernels.constants(name, D, low=low, hopper=arch // 10 in (9, 10))
                    one = used(name, D, low=low, arch=arch)
                    print(
                        f"| sm_{arch} | {name} | {'bfloat16' if low else 'float32'} | {D} | {fixed['BLOCK_N']} x {fixed['BLOCK_R']} | "
                        f"{options['num_warps']} | {one.registers} | {one.spilled} | {one.shared_kib:.1f} ({MOST_KIB.get(arch, 99)}) |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
