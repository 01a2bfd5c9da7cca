"""The dense evaluations by their commands: results are added to the run with their names and their departures from the
published protocol, and nothing is computed twice.
"""

import sys

import pytest
from omegaconf import OmegaConf
from tiny import compose, train

from caco import evaluate
from caco.runs.files import read_json
from experiments.toy_sets import segmentation as toy_voc

TRAINING = ["max_steps=3", "epochs=1", "eval=[]", "bank.size=64", "backbone.width=16"]
SEGMENT = ["train=train", "images=4", "steps=1", "rate=0.1", "crop=65", "channels=16"]
PROTOCOLS = {
    "segment": "segment_fcn16_train-train_images-4_steps-1_rate-0.1_crop-65_channels-16",
    "dense_linear": "dense_linear_train-train_size-64",
}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "tiny"
    train(folder, *TRAINING)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(compose(*TRAINING), resolve=True))
    return folder


def test_results_stand_in_the_run_with_what_departs_and_the_same_command_makes_nothing_twice(
    run_dir, tmp_path, monkeypatch, capsys
):
    toy_voc.write_voc(tmp_path / "voc")
    monkeypatch.setattr("caco.runs.directory._locks", {})
    settings = [f"eval.segment.{setting}" for setting in SEGMENT]
    settings += ["eval.dense_linear.train=train", "eval.dense_linear.size=64", "overlap=allow", "baselines=true"]
    roots = [f"eval.{name}.root={tmp_path / 'voc'}" for name in PROTOCOLS]

    def main(*more):
        monkeypatch.setattr(
            sys, "argv", ["caco-evaluate", f"run={run_dir}", "eval=[segment,dense_linear]", *settings, *roots, *more]
        )
        evaluate.main()
        return capsys.readouterr()

    said = main()
    names = {f"{prefix}{protocol}/voc2012_{measure}" for prefix in ("", "untrained/") for protocol in PROTOCOLS.values()
             for measure in ("miou", "mean_accuracy", "pixel_accuracy")}  # fmt: skip
    summary = read_json(run_dir / "summary.json")
    assert names <= summary.keys() and not any(name.startswith("pixels/") for name in summary)
    for departure in (
        "caco: segment_fcn16: MoCo's code for it was not published.",
        "caco: dense_linear: a protocol of caco's own",
    ):
        assert departure in said.out
    assert "training on 6 images, 4 steps of 4 images, rate 0.025" in said.err
    kept = {path: path.read_bytes() for path in (run_dir / "evaluations").glob("*.json")}
    (one,) = (
        read_json(path) for path in kept if path.name.startswith("segment-") and read_json(path)["baseline"] is None
    )
    assert {key: one["made_from"]["evaluator"][key] for key in ("images", "steps", "rate", "precision")} == {
        "images": 4, "steps": 1, "rate": 0.1, "precision": "fp32",
    }  # fmt: skip
    again = main("eval.segment.save_every_steps=3")
    assert "training on" not in again.err and again.out == said.out
    assert {path: path.read_bytes() for path in (run_dir / "evaluations").glob("*.json")} == kept
