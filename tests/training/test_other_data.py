"""A run doesn't resume on other data than it began with, with the real program."""

import json

from datafiles import make_imagefolder
from programs import Programs


def test_a_resume_on_other_data_is_refused_until_the_data_are_restored(tmp_path, process: Programs):
    data = make_imagefolder(tmp_path / "images", size=12)
    command = (
        "dataset=imagefolder", f"dataset.root={data}", "dataset.image_size=12", "batch_size=6", "steps=4",
        "checkpoint.every_steps=2", "tracker=none",
    )  # fmt: skip
    run = process.train(tmp_path, *command)
    status = json.loads((run / "status.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert status["data"] == summary["data"]

    (run / "checkpoints" / "step-00000004.pt").unlink()  # as if the run was killed after step 2
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    for part in ("train", "test"):
        (data / part / "cat").rename(data / part / "zebra")
    refused = process.call("launch", *command, cwd=tmp_path)
    assert refused.code == 2
    assert "the run began with another data set. Now: without class cat; with new class zebra. Fix: " in refused.output
    assert (run / "checkpoints" / "step-00000002.pt").exists()

    for part in ("train", "test"):
        (data / part / "zebra").rename(data / part / "cat")
    assert process.train(tmp_path, *command) == run
    assert "resumed after step 2 of 4" in (run / "log.txt").read_text()
