"""A run doesn't resume on other data than it began with, with the real program."""

import json

from conftest import Launch
from datafiles import make_imagefolder
from runs import the_run


def test_a_resume_on_other_data_is_refused_until_the_data_are_restored(tmp_path, launch: Launch):
    data = make_imagefolder(tmp_path / "images", size=12)
    command = (
        "dataset=imagefolder", f"dataset.root={data}", "dataset.image_size=12", "batch_size=6", "steps=4",
        "checkpoint.every_steps=2", "tracker=none",
    )  # fmt: skip
    assert launch(*command).returncode == 0
    run = the_run(tmp_path)
    status = json.loads((run / "status.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert status["data"] == summary["data"]

    (run / "checkpoints" / "step-00000004.pt").unlink()  # as if the run was killed after step 2
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    for part in ("train", "test"):
        (data / part / "cat").rename(data / part / "zebra")
    refused = launch(*command)
    assert refused.returncode == 2
    assert "the run began with another data set. Now: without class cat; with new class zebra. Fix: " in refused.stderr
    assert (run / "checkpoints" / "step-00000002.pt").exists()

    for part in ("train", "test"):
        (data / part / "zebra").rename(data / part / "cat")
    resumed = launch(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 2 of 4" in resumed.stdout
