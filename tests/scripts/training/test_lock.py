"""One process at a time writes a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts import quickstart
from scripts.engine.files import locked
from scripts.train import diffusion, train_pretrain

HOLD = """
import sys, time
from pathlib import Path
from scripts.engine.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(workspace):
    """Another process that holds weights/ar.lock."""
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, "weights/ar.lock"], env={**os.environ, "PYTHONPATH": str(root)}, stdout=-1
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_in_training_is_refused_to_others_until_its_process_ends_however_it_does(
    holder, pretrain_argv, diffusion_argv, refused, command
):
    told = refused(train_pretrain, pretrain_argv, "weights/ar.lock", f"process {holder.pid} on", "--run-name")
    assert told.count("\n") == 0
    refused(train_pretrain, [*pretrain_argv, "--overwrite"], "weights/ar.lock")
    assert command(train_pretrain, [*pretrain_argv, "--dry-run"]).code == 0
    assert command(diffusion, [*diffusion_argv, "--max-iters", "1"]).code == 0  # another run
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path("weights/ar.lock").exists()
    assert command(train_pretrain, pretrain_argv).code == 0
    assert not Path("weights/ar.lock").exists()


def test_of_many_that_want_it_one_has_it_at_a_time(tmp_path):
    """Although its file is deleted whenever it is given back, and made anew."""
    path, inside, most, held = tmp_path / "run.lock", [], [], []

    def contend():
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            try:
                with locked(path):
                    inside.append(1)
                    most.append(len(inside))
                    held.append(path.read_text().startswith(f"process {os.getpid()} on "))
                    inside.pop()
            except ValueError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and all(held) and len(most) > 50 and not path.exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_in_which_a_quickstart_runs_is_refused_to_another(flags, workspace, refused, monkeypatch):
    monkeypatch.setattr(quickstart, "perform", lambda *a: pytest.fail("began"))
    with locked(Path("qs/quickstart.lock")):
        told = refused(quickstart, ["--out", "qs", *flags], "quickstart.lock", f"process {os.getpid()} on", "--out")
    assert "--run-name" not in told


def test_nothing_is_left_of_it(tmp_path):
    with locked(tmp_path / "a" / "b" / "run.lock"):
        (tmp_path / "a" / "kept").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "kept"]
