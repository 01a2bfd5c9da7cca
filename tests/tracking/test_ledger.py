"""The ledger is the record of a run: every row that was acknowledged is in it, bit for bit, whatever happens later."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from caco.tracking.ledger import Ledger, LedgerTracker, read_rows


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def values_of(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("kind", "step", "time")}


def started(run_dir: Path, state: dict | None = None) -> LedgerTracker:
    tracker = LedgerTracker()
    tracker.start(run_dir, params={"bank.size": 8192}, tags={"host": "here"}, run_name="name", state=state)
    return tracker


def test_floats_come_back_bit_for_bit(tmp_path):
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, 2.0**53 + 2, 1e22]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step, value in enumerate(floats):
        ledger.append("train", step, {"loss": value})
    rows = ledger.rows()
    assert [bits(row["loss"]) for row in rows] == [bits(value) for value in floats]
    assert [row["step"] for row in rows] == list(range(len(floats)))
    assert {row["kind"] for row in rows} == {"train"}


def test_nan_int_and_text_come_back_as_what_they_were(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("eval", 7, {"nan": math.nan, "count": 12345678901234567890, "note": 'a "b"\n\u2028é'})
    (values,) = map(values_of, ledger.rows())
    assert math.isnan(values.pop("nan"))
    assert values == {"count": 12345678901234567890, "note": 'a "b"\n\u2028é'}
    assert type(values["count"]) is int


def test_every_line_is_strict_json(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("train", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(ledger.path.read_text(), parse_constant=refuse)


def test_numpy_and_torch_scalars_are_rows_too(tmp_path):
    numpy = pytest.importorskip("numpy")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("train", numpy.int64(3), {"a": numpy.float32(0.1), "b": numpy.int32(4), "c": numpy.float64(0.1)})
    assert values_of(ledger.rows()[0]) == {"a": float(numpy.float32(0.1)), "b": 4, "c": 0.1}


@pytest.mark.parametrize("values", [{"time": 1.0}, {"a": [1]}, {"a": None}, {"a": "NaN"}])
def test_what_cannot_come_back_is_refused_with_its_name(tmp_path, values):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError, match=f"{next(iter(values))}.*got|expected .*got '{next(iter(values))}'"):
        ledger.append("train", 1, values)
    assert len(ledger) == 0


def test_a_torn_last_line_costs_no_other_row_and_is_gone_after_the_next_append(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append("train", 1, {"loss": 1.0})
    ledger.append("train", 2, {"loss": 2.0})
    with open(path, "ab") as file:
        file.write(b'{"kind": "train", "ste')
    again = Ledger(path)
    assert len(again) == 2
    assert [row["step"] for row in again.rows()] == [1, 2]
    again.append("train", 3, {"loss": 3.0})
    assert [row["step"] for row in again.rows()] == [1, 2, 3]
    assert b"ste{" not in path.read_bytes()


def test_reading_changes_nothing_so_that_one_may_read_beside_a_writer(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "time": 0}\n{"kind"')
    before = path.read_bytes()
    assert len(Ledger(path)) == len(Ledger(path).rows()) == 1
    assert path.read_bytes() == before


def test_rows_can_be_read_on_from_where_one_stopped(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert read_rows(ledger.path) == ([], 0)
    ledger.append("train", 1, {})
    rows, offset = read_rows(ledger.path)
    assert [row["step"] for row in rows] == [1]
    ledger.append("train", 2, {})
    rows, offset = read_rows(ledger.path, offset)
    assert [row["step"] for row in rows] == [2]
    assert read_rows(ledger.path, offset) == ([], offset)


def test_a_damaged_line_in_the_middle_is_reported_with_the_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\0\0\0\n{}\n")
    with pytest.raises(ValueError, match="ledger.jsonl: expected one JSON object a line"):
        Ledger(path).rows()


def test_truncate_keeps_the_first_rows_bytes_and_later_rows_follow_them(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(5):
        ledger.append("train", step, {"loss": step / 7})
    first = b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:2])
    ledger.truncate(2)
    assert ledger.path.read_bytes() == first
    assert len(ledger) == 2
    ledger.append("train", 9, {})
    assert [row["step"] for row in ledger.rows()] == [0, 1, 9]
    with pytest.raises(ValueError, match="expected at least 4 rows, got 3"):
        ledger.truncate(4)


WRITER = """
import sys
from caco.tracking.ledger import Ledger
ledger = Ledger(sys.argv[1])
step = len(ledger)
while True:
    ledger.append("train", step, {"loss": 1 / (step + 1), "pad": "x" * (step % 977)})
    print(step, flush=True)
    step += 1
"""


def test_a_process_killed_while_writing_loses_no_acknowledged_row(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(200):
            acknowledged = int(process.stdout.readline())
        process.kill()
        rest = process.communicate()[0].splitlines()
        acknowledged = int(rest[-1]) if rest else acknowledged
        rows = Ledger(path).rows()
        assert len(rows) >= acknowledged + 1
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert all(row["loss"] == 1 / (row["step"] + 1) for row in rows)


FULL = """
import resource, sys
from caco.tracking.ledger import Ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
ledger = Ledger(sys.argv[1])
try:
    for step in range(1000):
        ledger.append("train", step, {"loss": 1.0})
except OSError as error:
    assert error.filename == sys.argv[1], error.filename
    assert len(ledger) == step == len(ledger.rows())
    print(step)
"""


def test_a_disk_without_space_raises_with_the_path_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "ledger.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    rows = int(done.stdout)
    assert rows > 5
    assert path.read_bytes().endswith(b"}\n")
    assert path.read_bytes().count(b"\n") == rows


def test_a_run_restarted_from_a_checkpoint_rolls_back_the_rows_after_it(tmp_path):
    tracker = started(tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.log(1, {"knn20_top1": 90.0}, kind="eval")
    state = tracker.state_dict()
    assert state == {"rows": 2}
    tracker.log(2, {"loss": 0.25})
    tracker = started(tmp_path, state)
    rows = Ledger(tmp_path / "ledger.jsonl").rows()
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("eval", 1)]
    tracker.log(2, {"loss": 0.125})
    assert [row.get("loss") for row in Ledger(tmp_path / "ledger.jsonl").rows()] == [0.5, None, 0.125]
    started(tmp_path, None)
    assert len(Ledger(tmp_path / "ledger.jsonl")) == 0


def test_a_checkpoint_that_counts_more_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least 3 rows, got 0"):
        started(tmp_path, {"rows": 3})


def test_the_directory_says_how_the_run_ended_and_what_it_was(tmp_path):
    tracker = started(tmp_path)
    about = json.loads((tmp_path / "tracking.json").read_text())
    assert (about["status"], about["pid"], about["params"]) == ("RUNNING", os.getpid(), {"bank.size": "8192"})
    tracker.finish("FAILED", {})
    tracker.finish("FINISHED", {})  # a second call, as from a `finally`, changes nothing
    assert json.loads((tmp_path / "tracking.json").read_text())["status"] == "FAILED"


def test_importing_the_ledger_imports_neither_torch_nor_mlflow():
    code = "import sys, caco.tracking.ledger; sys.exit(bool({'torch', 'mlflow', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_of_a_sweep_that_goes_on_alone_stays_one(tmp_path):
    def start(name, sweep):
        tracker = LedgerTracker()
        tracker.start(tmp_path, params={}, tags={}, run_name=name, state=None, sweep=sweep)
        tracker.finish("KILLED", {})
        about = json.loads((tmp_path / "tracking.json").read_text())
        return about["run_name"], about["sweep"]

    sweep = {"name": "bank=1M,2M", "title": "bank=1M,2M", "jobs": 2}
    assert start("bank=1M", sweep) == ("bank=1M", sweep)
    assert start("bank=1M seed=1 epochs=3", None) == ("bank=1M", sweep)
    assert start("bank=1M", sweep | {"jobs": 1}) == ("bank=1M", sweep | {"jobs": 1})
