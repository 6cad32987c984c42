"""--topk-merge: which checkpoints are kept, and what their average is."""

import random
from pathlib import Path

import torch

from model.checkpoint import average_weights, load_checkpoint, load_model
from scripts.engine.files import read_log
from scripts.engine.training.run import RunConfig
from scripts.engine.training.run_files import TopK
from scripts.train import diffusion


def test_the_best_are_kept_in_files_and_the_others_deleted(tmp_path):
    run, random_losses = RunConfig(run_name="r", save_dir=tmp_path, topk_merge=3), random.Random(0)
    top, seen = TopK(run, []), []
    for step in range(1, 30):
        loss = random_losses.choice([1.0, 2.0, 3.0, 4.0, random_losses.random()])
        seen.append((loss, step))
        needed = {top.path(step).name for _, step in top.best}
        top.offer(loss, step, lambda path: path.write_text("weights"))
        assert needed <= {p.name for p in tmp_path.iterdir()}, "the last checkpoint needs them until there is another"
        top.prune()
        assert top.best == sorted(seen)[:3]
        assert {p.name for p in tmp_path.iterdir()} == {f"r_top_{step}.pt" for _, step in top.best}


def test_a_new_run_deletes_its_own_files_only(tmp_path):
    names = ["a_top_3.pt", "a_topk_merged.pt", "a_top_x.pt", "a_top_3.pt.bak", "b_top_3.pt", "a[b]_top_1.pt"]
    for name in names:
        (tmp_path / name).write_text("x")
    TopK(RunConfig(run_name="a", save_dir=tmp_path), []).clear()
    assert {p.name for p in tmp_path.iterdir()} == set(names[2:])
    TopK(RunConfig(run_name="a[b]", save_dir=tmp_path), []).clear()
    assert not (tmp_path / "a[b]_top_1.pt").exists()


def test_the_merged_file_is_the_mean_of_the_best_validated_weights(diffusion_argv, command, refused):
    """As the log tells which they are; its validation loss is in the log, too, and the run's own weights stay."""
    argv = [*diffusion_argv, "--run-name", "r", "--topk-merge", "2", "--eval-interval", "2", "--max-iters", "10"]
    argv = [*argv, "--save-dir", "w", "--block-size", "4"]
    assert command(diffusion, argv).code == 0
    log = read_log(Path("w/r_log.jsonl"))
    losses = {row["step"]: row["loss"] for row in log if row["event"] == "eval"}
    best = sorted(losses, key=losses.get)[:2]
    (merge,) = [row for row in log if row["event"] == "merge"]
    assert merge["steps"] == sorted(best) and {p.name for p in Path("w").glob("r_top_*")} == {
        f"r_top_{step}.pt" for step in best
    }
    merged = load_checkpoint(Path("w/r_topk_merged.pt"))
    expected = average_weights([load_checkpoint(Path(f"w/r_top_{step}.pt"))["weights"] for step in best])
    assert all(torch.equal(merged["weights"][name], expected[name]) for name in expected)
    model = load_model(Path("w/r_topk_merged.pt"))
    assert (model.config.attention, model.config.block_size) == ("block", 4)
    own = load_checkpoint(Path("w/r_state_dict.pt"))["weights"]
    assert not torch.equal(own["norm.weight"], expected["norm.weight"])
    # It is weights of the run like the others: not overwritten by what reads it, nor by another's start.
    again = ["--topk-merge", "0", "--max-iters", "2", "--load-from", "w/r_topk_merged.pt"]
    refused(diffusion, [*argv, *again, "--overwrite"], "--overwrite would delete w/r_topk_merged.pt")
    refused(diffusion, [*argv, "--run-name", "s", "--weights-path", "w/s_topk_merged.pt"], "the run writes for itself")
    Path(f"w/r_top_{best[0]}.pt").rename("w/away")
    refused(diffusion, [*argv, "--resume", "must"], f"w/r_top_{best[0]}.pt", "is gone")
    Path("w/away").rename(f"w/r_top_{best[0]}.pt")
    # A run of this name that starts anew leaves none of them behind.
    assert command(diffusion, [*argv, "--topk-merge", "0", "--max-iters", "2", "--overwrite"]).code == 0
    assert not list(Path("w").glob("r_top*"))
