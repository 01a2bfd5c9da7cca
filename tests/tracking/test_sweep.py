"""A sweep in MLflow has one parent run and a child for each job, with the job's data set, published values, machine and
model.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caco.tracking.figures import add_figure
from caco.tracking.ledger import Ledger, LedgerTracker
from caco.tracking.mlflow import MLflowTracker
from caco.tracking.sync import last_status, main
from caco.tracking.system import Sampler

SWEEP = {"name": "pn=both,none preset=demo", "title": "preset=demo pn=both,none", "keys": ["pn"], "jobs": 2}
BEGIN = {
    "feed_seconds": 0.02,
    "finish_seconds": 240,
    "system_seconds": 0,
}  # long enough for a busy machine
TAGS = {"host": "h", "data": "digits/train", "data_digest": "abc123"}


def begin(look, run_dir, pn="both", state=None, sweep=SWEEP, **arguments):
    tracker = MLflowTracker(uri=look.uri, experiment=look.experiment, **BEGIN | arguments)
    tracker.start(
        run_dir, params={"pn": pn, "data.root": None}, tags=TAGS, run_name=f"pn={pn}", state=state, sweep=sweep
    )
    return tracker


def parent(look):
    (run,) = look.runs("tags.`caco.sweep` LIKE '%'")
    return run


def children(look):
    found = look.runs(f"tags.`mlflow.parentRunId` = '{parent(look).info.run_id}'")
    return {run.info.run_name: run for run in found}


def status(look):
    return parent(look).info.status


def test_a_sweep_is_a_parent_whose_state_is_that_of_its_jobs(look, tmp_path):
    one = begin(look, tmp_path / "a", "both")
    assert status(look) == "RUNNING" and parent(look).info.run_name == "pn=both,none"
    one.log(1, {"loss": 1.0})
    state = one.state_dict()
    one.finish("KILLED", {})  # it was preempted
    assert status(look) == "KILLED"
    one = begin(look, tmp_path / "a", "both", state)
    assert status(look) == "RUNNING"
    one.finish("FINISHED", {})
    assert status(look) == "SCHEDULED", "the sweep is scheduled while one of its two jobs has not begun"
    two = begin(look, tmp_path / "b", "none")
    two.finish("FAILED", {})
    assert status(look) == "FAILED" and parent(look).info.end_time is not None
    begin(look, tmp_path / "b", "none").finish("FINISHED", {})
    assert status(look) == "FINISHED"
    assert children(look).keys() == {"pn=both", "pn=none"}, "each job must be there once, whatever happened to it"
    colours = {run.data.tags["mlflow.runColor"] for run in children(look).values()}
    assert len(colours) == 2, "neighbouring runs must have different colours in a chart"


def test_jobs_of_another_sweep_and_lone_runs_are_not_its_children(look, tmp_path):
    begin(look, tmp_path / "a").finish("FINISHED", {})
    begin(look, tmp_path / "b", sweep=SWEEP | {"name": "it's another"}).finish("FINISHED", {})
    begin(look, tmp_path / "c", sweep=None).finish("FINISHED", {})
    begin(look, tmp_path / "d", sweep=SWEEP | {"name": "it's another"}).finish("FINISHED", {})
    parents = look.runs("tags.`caco.sweep` LIKE '%'")
    held = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in look.runs()}
    assert len(parents) == 2 and sorted(list(held.values()).count(run.info.run_id) for run in parents) == [1, 2]
    assert list(held.values()).count(None) == 3


def test_a_job_killed_with_its_machine_does_not_leave_the_sweep_running(look, tmp_path):
    begin(look, tmp_path / "a").finish("FINISHED", {})
    lost = begin(look, tmp_path / "b", "none")
    lost._feeder.attempt = lambda: None
    lost._feeder.stopping.set()
    lost._feeder.join()
    lost._feeder.feed.release()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    about = json.loads((tmp_path / "b" / "tracking.json").read_text())
    (tmp_path / "b" / "tracking.json").write_text(json.dumps(about | {"pid": gone.pid}))
    assert (status(look), children(look)["pn=none"].info.status) == ("RUNNING", "RUNNING")
    assert main([str(tmp_path)]) == 0
    assert (status(look), children(look)["pn=none"].info.status) == ("KILLED", "KILLED")


def test_the_data_set_and_the_papers_values_are_there_once(look, tmp_path):
    for _ in range(2):  # a resumed run sends them again
        begin(look, tmp_path, sweep=None, paper={"linear_top1": 71.3}).finish("FINISHED", {"linear_top1": 60.0})
    run = look.run()
    assert run.data.metrics == {"paper/linear_top1": 71.3, "final/linear_top1": 60.0}
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits/train", "abc123")
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    assert look.points("paper/linear_top1") == [(0, 71.3)]


def test_what_the_machine_does_is_sent_once_and_goes_on_after_a_resume(look, tmp_path, eventually):
    file = Ledger(tmp_path / "system.jsonl")
    tracker = begin(look, tmp_path, sweep=None, system_seconds=0.02)
    tracker.log(1, {"loss": 1.0})
    eventually(lambda: len(Ledger(file.path).rows()) >= 3)
    tracker.finish("KILLED", {})
    before = file.rows()
    # there is no checkpoint, so the ledger starts again
    tracker = begin(look, tmp_path, sweep=None, system_seconds=0.02)
    eventually(lambda: len(Ledger(file.path).rows()) > len(before))
    tracker.finish("FINISHED", {})
    rows = file.rows()
    assert rows[: len(before)] == before and [row["step"] for row in rows] == list(range(len(rows)))
    assert look.points("system/cpu_utilization_percentage") == [
        (r["step"], r["cpu_utilization_percentage"]) for r in rows
    ]
    assert look.points("train/loss") == [(1, 1.0)]
    count = len(rows)
    assert main([str(tmp_path)]) == 0
    assert len(look.points("system/cpu_utilization_percentage")) == count


def test_a_sample_agrees_with_the_kernel(tmp_path):
    def used():
        kilobytes = {
            line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
        }
        return 100 * (1 - kilobytes["MemAvailable"] / kilobytes["MemTotal"])

    sampler = Sampler(Ledger(tmp_path / "system.jsonl"), 10.0)
    for _ in range(100):
        before, values, after = used(), sampler.sample(), used()
        if abs(after - before) < 1:
            break  # otherwise another process has changed the memory meanwhile
    free = os.statvfs(tmp_path)
    assert values["system_memory_usage_percentage"] == pytest.approx((before + after) / 2, abs=2)
    assert values["disk_available_megabytes"] == pytest.approx(free.f_bavail * free.f_frsize / 1e6, rel=0.05)
    assert 0 <= values["cpu_utilization_percentage"] <= 100 and values["network_receive_megabytes"] >= 0


def test_without_a_place_to_write_the_sampler_ends_with_one_warning(tmp_path, caplog):
    sampler = Sampler(Ledger(tmp_path / "absent" / "system.jsonl"), 0.001)
    sampler.start()
    sampler.join(240)
    assert (
        not sampler.is_alive()
        and len(caplog.messages) == 1
        and "system metrics are no longer recorded" in caplog.messages[0]
    )


def test_the_final_backbone_comes_back_from_mlflow_and_is_sent_once(look, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from caco.nn.backbones import small_resnet

    backbone = small_resnet(width=8).eval()
    tracker = begin(look, tmp_path, sweep=None)
    tracker.log_model(lambda: backbone)
    tracker.finish("FINISHED", {"loss": 1.0})
    add_figure(tmp_path, "f.svg", b"<svg/>")  # gives the sync something to send
    assert caplog.messages == []
    import mlflow

    experiment = look.client.get_experiment_by_name(look.experiment).experiment_id
    (model,) = look.client.search_logged_models([experiment])
    assert (model.source_run_id, str(model.status)) == (look.run().info.run_id, "READY")
    mlflow.set_tracking_uri(look.uri)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for uri in (f"models:/{model.model_id}", f"runs:/{look.run().info.run_id}/backbone", str(tmp_path / "model")):
        again = mlflow.pytorch.load_model(uri)
        assert type(again).__module__ == "timm.models.resnet" and not again.training
        assert torch.equal(again(images), backbone(images))


def test_no_model_is_made_when_none_is_wanted(look, tmp_path):
    def never():
        raise AssertionError("the backbone was built")

    tracker = begin(look, tmp_path, sweep=None, model=False)
    tracker.log_model(never)
    tracker.finish("FINISHED", {})
    LedgerTracker().log_model(never)


def test_a_model_that_cannot_be_saved_costs_a_warning_and_not_the_run(look, tmp_path, caplog):
    tracker = begin(look, tmp_path, sweep=None)
    tracker.log_model(lambda: 1 / 0)
    tracker.finish("FINISHED", {})
    assert ["no model for MLflow: ZeroDivisionError" in message for message in caplog.messages] == [True]
    assert look.run().info.status == "FINISHED"


class Drawn:
    """Anything that has a savefig()."""

    def savefig(self, file, *, format, bbox_inches):
        file.write(f"{format}, drawn".encode())


def test_figures_are_artifacts_also_those_made_before_there_was_a_server(look, tmp_path):
    tracker = LedgerTracker(system_seconds=0)
    tracker.start(tmp_path, params={}, tags={}, run_name="n", state=None)
    tracker.finish("FINISHED", {})
    path = add_figure(tmp_path, "early.png", Drawn())
    assert path.read_bytes() == b"png, drawn"
    assert main([str(tmp_path), "--uri", look.uri, "--experiment", look.experiment]) == 0
    add_figure(tmp_path, "late.svg", b"<svg/>")
    add_figure(tmp_path, "early.png", b"drawn again")
    run_id = look.run().info.run_id
    assert sorted(file.path for file in look.client.list_artifacts(run_id, "figures")) == [
        "figures/early.png",
        "figures/late.svg",
    ]
    kept = look.client.download_artifacts(run_id, "figures/early.png", str(tmp_path))
    assert Path(kept).read_bytes() == b"drawn again"


@pytest.mark.parametrize("name", ["../x.png", "x.exe", "x"])
def test_what_is_no_figures_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected a run directory"):
        add_figure(tmp_path, name, b"")
    (tmp_path / "tracking.json").write_text("{}")
    with pytest.raises(ValueError, match=r"name: expected a file name ending in .png"):
        add_figure(tmp_path, name, b"")


def squeue(folder, script):
    folder.mkdir(exist_ok=True)
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)


def test_of_a_run_on_another_machine_slurm_knows_or_else_its_silence(tmp_path, monkeypatch):
    tracker = LedgerTracker(system_seconds=0)
    tracker.start(tmp_path, params={}, tags={"slurm_job_id": "70_3"}, run_name="n", state=None)
    about = json.loads((tmp_path / "tracking.json").read_text())
    (tmp_path / "tracking.json").write_text(json.dumps(about | {"host": "another", "pid": 1}))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def told(script):
        squeue(tmp_path / "bin", script)
        return last_status(tmp_path)[0]

    assert told("echo RUNNING") == "RUNNING"
    assert (
        told('[ "$2" = --jobs=70_3 ] && echo PENDING') == "KILLED"
    )  # the job was requeued, and will report RUNNING when it runs
    assert told("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1") == "KILLED"
    assert told("echo 'cannot contact the controller' >&2; exit 1") == "RUNNING"  # the state is unknown
    day = time.time() - 25 * 3600
    for name in ("ledger.jsonl", "tracking.json"):
        os.utime(tmp_path / name, (day, day))
    assert last_status(tmp_path)[0] == "KILLED"
    (tmp_path / "system.jsonl").touch()  # a sign of life
    assert last_status(tmp_path)[0] == "RUNNING"
