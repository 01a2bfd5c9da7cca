"""How many registers and how much shared memory the bank's Triton kernels need on a GPU. The kernels are compiled ahead
of time, so this needs no GPU and times nothing.

python benchmarks/kernels.py                     for sm_80, sm_89 and sm_90, widths 64, 128 and 256; takes a minute
python benchmarks/kernels.py --arch 89 120 --widths 96
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

if (
    not __package__
):  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.kernels does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Report, parser, say
from caco.banks.kernels import cards

KERNELS = ("forward", "nearest", "exact", "update")
ARGUMENTS = {
    "positive_ptr": "*i32",
    "row_ptr": "*i32",
    "z_ptr": "*fp64",
    "z2_ptr": "*fp64",
    "cosine_ptr": "*fp64",
    "count_ptr": "*i32",
    "wanted_ptr": "*i32",
    "N": "i32",
    "R": "i32",
    "rows_of_share": "i32",
}


class Used(NamedTuple):
    block: str  # queries x rows
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared_kib: float


def used(name: str, D: int, *, bf16: bool, arch: int) -> Used:
    """Compile one kernel for sm_`arch`, with all its optional outputs, and read its resource usage."""
    import triton  # not at the top, because it is not installed on every machine
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from caco.banks.kernels import triton_passes

    kernel = triton_passes.KERNELS[name]
    fixed, options = triton_passes.constants(name, D, bf16=bf16, on=entry(arch))
    block = f"{fixed.get('BLOCK_N', 1)} x {fixed['BLOCK_R']}"
    computed: dict[str, dict[str, Any]] = {
        "forward": {"SECOND": True, "SUMS": True},
        "nearest": {"T": triton_passes.TOP},
        "exact": {},
        "update": {"NORMALISE": True},
    }
    fixed |= computed[name]
    signature = {
        argument: "constexpr" if argument in fixed
        else ARGUMENTS.get(argument,
        "*bf16" if argument == "q_ptr" and bf16 else "*fp32" if argument.endswith("_ptr") else "fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, argument in enumerate(kernel.arg_names) if argument.endswith("_ptr")
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    # The kernels call no functions, so they use the stack only for spilled registers.
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert found is not None, output
    return Used(block, options["num_warps"], int(found[1]), int(found[2]), done.metadata.shared / 1024)


def entry(arch: int) -> cards.Card:
    """The table's entry for sm_`arch`; architectures without an entry of their own count as having 99 KiB."""
    return cards.card(divmod(arch, 10), 99)


def lacks_triton() -> str | None:
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--arch", type=int, nargs="+", help="Compile for GPUs of these compute capabilities. The default is 80 89 90."
    )
    options.add_argument(
        "--widths", type=int, nargs="+", help="Compile for embeddings of these widths D. The default is 64 128 256."
    )
    arguments = options.parse_args()
    archs = arguments.arch or ([90] if arguments.tiny else [80, 89, 90])
    widths = arguments.widths or ([32] if arguments.tiny else [64, 128, 256])
    report = Report(
        ["GPU", "kernel", "factors", "D", "queries x rows", "warps", "registers", "spilled, B", "shared, KiB (limit)"],
        arguments.json,
    )
    if not report.leave_out("every kernel", lacks_triton()):
        report.figures |= {"triton": importlib.metadata.version("triton"), "kernels": []}
        for arch in archs:
            for name in KERNELS:
                say(f"sm_{arch}: {name} in bfloat16 and float32, widths {', '.join(map(str, widths))}")
                for factors in ("float64",) if name == "exact" else ("bfloat16", "float32"):
                    for D in widths:
                        one = used(name, D, bf16=factors == "bfloat16", arch=arch)
                        shared = f"{one.shared_kib:.1f} ({entry(arch).shared_kib})"
                        report.row(
                            f"sm_{arch}", name, factors, D, one.block, one.warps, one.registers, one.spilled, shared
                        )
                        report.figures["kernels"].append(
                            {"arch": arch, "name": name, "factors": factors, "D": D, **one._asdict()}
                        )
    report.end(arguments.json)


if __name__ == "__main__":
    main()
