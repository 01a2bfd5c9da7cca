"""CACO_INSTRUCTIONS sets the instruction set of caco's compiled parts and of PyTorch, or is refused with one sentence;
the record of a run says what was used.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from instructions_used import bank_bits

from caco import instructions
from caco.banks.kernels import fused
from caco.data.loaders.bound import BoundLoader
from caco.data.views import native
from caco.instructions import LEVELS, Refused, child_environment
from caco.runs.files import read_json
from caco.tracking.ledger import read_rows

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
AMX = AVX512 | {"avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "amx_int8"}
PROCESSORS = [
    (set(), 1),
    (AVX2, 2),
    (AVX512, 3),
    (AVX512 - {"avx512vl"}, 2),
    (AMX - {"fma"}, 1),
    (AMX, 4),
]  # flags, and how many levels they allow
EXPECTED = "expected plain, avx2, avx512, amx or torch"


@pytest.fixture
def started(monkeypatch):
    """started(variables, flags) runs `import caco` with these environment variables on a processor with these flags,
    before torch is imported; returns the resulting environment and the level that is in use.
    """
    monkeypatch.setattr(instructions, "LEVEL", None)
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "torch")

    def start(variables, flags=AMX):
        monkeypatch.setattr(os, "environ", dict(variables))
        monkeypatch.setattr(instructions, "flags", lambda: flags)
        instructions.apply()
        return os.environ, instructions.LEVEL

    return start


@pytest.mark.parametrize(("flags", "count"), PROCESSORS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_that_the_processor_lacks_is_refused_and_those_that_it_has_are_named(started, flags, count, level):
    if LEVELS.index(level) < count:
        assert started({"CACO_INSTRUCTIONS": level}, flags)[1] == level
        return
    with pytest.raises(Refused) as refused:
        started({"CACO_INSTRUCTIONS": level}, flags)
    has = ", ".join(LEVELS[:count])
    assert (
        str(refused.value)
        == f"CACO_INSTRUCTIONS={level}: this processor has {has}; choose one of them, or unset it for the best"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("avx3", f"CACO_INSTRUCTIONS=avx3: {EXPECTED}; did you mean avx2?"),
        ("AVX-512", f"CACO_INSTRUCTIONS=AVX-512: {EXPECTED}; did you mean avx512?"),
        ("pytorch", f"CACO_INSTRUCTIONS=pytorch: {EXPECTED}; did you mean torch?"),
        ("3", f"CACO_INSTRUCTIONS=3: {EXPECTED}"),
    ],
)
def test_an_unknown_level_is_refused_with_the_nearest(started, value, message):
    with pytest.raises(Refused) as refused:
        started({"CACO_INSTRUCTIONS": value})
    assert str(refused.value) == message


@pytest.mark.parametrize("variables", [{}, {"CACO_INSTRUCTIONS": ""}, {"CACO_INSTRUCTIONS": "torch"}])
def test_without_it_or_with_torch_alone_pytorchs_own_variables_stay_as_they_are(started, variables):
    variables |= {"ATEN_CPU_CAPABILITY": "avx2"}
    assert started(variables) == (variables, variables.get("CACO_INSTRUCTIONS") or None)


def test_a_variable_that_says_otherwise_is_refused_and_one_that_says_the_same_is_not(started):
    ours, _ = started({"CACO_INSTRUCTIONS": "plain"})
    assert started(ours) == (ours, "plain"), "a child process inherits all variables and must accept them"
    message = (
        "CACO_INSTRUCTIONS=avx2 sets ATEN_CPU_CAPABILITY=avx2, but the environment has ATEN_CPU_CAPABILITY=default;"
        " unset one of the two"
    )
    with pytest.raises(Refused, match=message):
        started(ours | {"CACO_INSTRUCTIONS": "avx2"})


def test_where_torch_was_imported_before_caco_it_is_refused_unless_torch_found_its_variables(started, monkeypatch):
    ours, _ = started({"CACO_INSTRUCTIONS": "avx2"})
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(
        Refused,
        match="CACO_INSTRUCTIONS=avx2 came too late for torch, which is imported already; import caco before torch",
    ):
        started({"CACO_INSTRUCTIONS": "avx2"})
    assert started(ours) == (ours, "avx2")
    assert started({"CACO_INSTRUCTIONS": "torch"})[1] == "torch"


def test_a_child_process_can_run_at_another_level_and_keeps_the_users_variables(started):
    started({"CACO_INSTRUCTIONS": "plain", "MKL_NUM_THREADS": "1"})
    for level in ("amx", "torch", None):
        child = child_environment(level)
        assert child == {"MKL_NUM_THREADS": "1"} | ({"CACO_INSTRUCTIONS": level} if level else {})


COMMANDS = [
    ["-m", "caco.train", "preset=smoke"], ["-m", "caco.train", "--help"], ["-m", "caco.evaluate", "run=x"],
    ["-m", "caco.export", "run=x", "to=y"],
    ["-m", "caco.plan"], ["-m", "caco.doctor"], ["-m", "caco.write"], ["-m", "caco.tracking.sync", "runs"],
    ["-m", "experiments.run", "table7"],
    *([str(file)] for file in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in file.read_text()),
]  # fmt: skip


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: Path(command[-1]).name if len(command) == 1 else command[1]
)
def test_every_command_refuses_it_in_one_sentence_with_exit_code_2(command):
    environment = child_environment("avx3") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"caco: CACO_INSTRUCTIONS=avx3: {EXPECTED}; did you mean avx2?\n"


PROGRAMS = [
    str(file.relative_to(ROOT))
    for folder in ("analysis", "experiments", "benchmarks")  # modules of caco import it anyway
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text()
]


@pytest.mark.parametrize("program", [*PROGRAMS, "tests/conftest.py"])
def test_experiments_benchmarks_and_tests_import_caco_before_torch(program):
    """Otherwise a level would be refused as too late, even if the processor has it."""
    assert len(PROGRAMS) > 10
    code = f"""
import importlib.abc, runpy, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("caco" in sys.modules)
            raise SystemExit
sys.meta_path.insert(0, Watch())
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
runpy.run_path({str(ROOT / program)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "False" not in done.stdout.split(), f"{program} imports torch before caco"


def test_a_program_that_catches_the_refusal_goes_on():
    code = "try:\n    import caco\nexcept ValueError as error:\n    print(type(error).__name__)\n1 / 0"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=child_environment("avx3"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "Refused\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n"), "other errors must be shown as usual"


CAPABILITY = {"plain": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512", "amx": "AVX512"}
# oneDNN's names of the levels; a processor with all of AVX-512, including FP16, is AVX 10.1 for oneDNN.
ONEDNN = {"plain": ("SSE4.1",), "avx2": ("AVX2",), "avx512": ("AVX-512", "AVX 10.1"), "amx": ("AMX",)}


@pytest.mark.parametrize("level", [*LEVELS, "torch"])
def test_the_forced_level_is_the_one_in_use(level, monkeypatch):
    has = instructions.processor()
    if level not in (*has, "torch"):
        pytest.skip(f"this processor has {', '.join(has)}")
    environment = child_environment(level) | {"PYTHONPATH": str(ROOT), "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "instructions_used.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *told, last = done.stdout.splitlines()
    found = json.loads(last)
    serves = has[-1] if level == "torch" else level
    assert found["capability"] == found["record"]["instructions_torch"] == CAPABILITY[serves]
    assert found["record"]["instructions"] == level

    if torch.backends.mkldnn.is_available() and sys.platform == "linux" and len(has) > 1:
        isa = next(line for line in told if "cpu,isa:" in line)
        assert any(f"Intel {name}" in isa for name in ONEDNN[serves]) and (serves == "amx" or "AMX" not in isa)
        product = next(line for line in told if line.startswith("MKL_VERBOSE SGEMM"))
        assert ("CNR:COMPATIBLE" in product) == (level == "plain"), (
            "MKL must be kept from AVX2 on processors that are not Intel's"
        )

    if level == "torch":
        assert found["compiled"] is None
        assert found["record"]["instructions_bank"] == found["record"]["instructions_views"] == "off"
    elif found["compiled"] is not None:
        assert found["record"]["instructions_bank"] == level
        bits = {}
        for each in has:
            monkeypatch.setattr(instructions, "LEVEL", each)
            bits[each] = bank_bits()
        assert len(set(bits.values())) == len(has), (
            "each level must give different bits, or the test would prove nothing"
        )
        assert found["compiled"]["bank_bits"] == bits[level]
        # The views need more of AVX-512 than other parts, so on the first processors with AVX-512 they use AVX2.
        best = "avx512" if {"avx512vbmi", "avx512_vnni"} <= instructions.flags() else "avx2"
        expected = min(level, best, key=LEVELS.index)
        assert found["compiled"]["views_level"] == found["record"]["instructions_views"] == expected


def test_a_kernel_that_was_built_without_the_level_is_refused(monkeypatch):
    if instructions.compiled(instructions.BANK) is None:
        pytest.skip("the kernel is not here")
    monkeypatch.setattr(instructions, "LEVEL", "amx")
    monkeypatch.setattr(instructions, "used", lambda part: "avx512")
    fused._loaded.cache_clear()
    with pytest.raises(
        ValueError, match="CACO_INSTRUCTIONS=amx: the bank's kernel can use at most avx512 here.*AMX needs GCC 11"
    ):
        fused.library()


def test_with_torch_alone_a_training_sees_the_same_batches_without_a_compiled_part(monkeypatch, tmp_path):
    epoch, seen = BoundLoader.epoch, {}

    def run(level):
        seen[level] = []

        def recorded(self, *arguments):
            for batch in epoch(self, *arguments):
                seen[level].append([view.clone() for view in batch.views])
                yield batch

        monkeypatch.setattr(instructions, "LEVEL", level)
        monkeypatch.setattr(BoundLoader, "epoch", recorded)
        tiny.train(tmp_path / str(level), "max_steps=4", "eval=[]")
        assert (native.library() is None) == (fused.library() is None) == (level == "torch")
        record = read_json(tmp_path / str(level) / "environment.json")
        assert (record["instructions"], record["instructions_torch"]) == (
            level or "best",
            torch.backends.cpu.get_cpu_capability(),
        )
        rows, _ = read_rows(tmp_path / str(level) / "ledger.jsonl")
        return [row["loss"] for row in rows if "loss" in row]

    if native.library() is None and instructions.LEVEL is None:
        pytest.skip("nothing is compiled here")
    ours, theirs = run("torch"), run(None)
    # Only the first loss is compared: sums in another order differ by 1e-7 in float32, and each step of the bank
    # increases the difference.
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and len(ours) == len(theirs) >= 4
    assert len(seen["torch"]) == len(seen[None]) >= 4
    for ours, theirs in zip(seen["torch"], seen[None], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
