"""Killed at any moment, cut off from the disk, handed damaged files: nothing is lost. A little of scripts.eval.soak,
and that the soak would notice if it were otherwise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib import image

from tests.soak import __main__ as soak
from tests.soak import faults
from tests.soak.processes import FilesUpTo, Kill
from tests.soak.state import difference, difference_of_runs, unsound
from tests.soak.workplace import AR, DIFFUSION, Outcome, Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One workplace for all tests of this file, with its undisturbed runs."""
    return Workplace(tmp_path_factory.mktemp("soak"), seed=0)


def assert_survived(*outcomes):
    for outcome in outcomes:
        assert outcome.survived == outcome.tries > 0 and not outcome.failures, outcome


def number_of(place, recipe, operation, which):
    """The number of an undisturbed run's `which`-th file operation that begins with these words."""
    return [n for n, line in enumerate(place.whole(recipe), start=1) if line.startswith(operation)][which]


def test_a_training_that_is_killed_again_and_again_ends_as_the_one_that_was_not(place):
    assert_survived(*faults.training(place, 2, (AR,)))


@pytest.mark.parametrize(
    "operation, which",
    [
        ("os.rename whole/diffusion.pt.tmp", 2),  # between a written checkpoint and its name
        # The last validation drops one of the best weights; killed before the next save, the run needs it once more.
        ("open whole/diffusion.pt.tmp", -1),
    ],
)
def test_a_kill_at_a_critical_moment(operation, which, place):
    folder, number = place.empty(), number_of(place, DIFFUSION, operation, which)
    assert place.start(DIFFUSION, "parts", number=number, action=Kill()).wait().killed
    assert unsound(folder, DIFFUSION.run) is None
    assert place.fault_at_end(DIFFUSION) is None


ROOM = {  # for how much of which file, from its second writing on
    "checkpoint": ("open whole/ar.pt.tmp", "ar.pt", 0.5),
    "log": ("open whole/ar_log.jsonl", "ar_log.jsonl", 0.3),
}


@pytest.mark.parametrize("what", ROOM)
def test_a_disk_that_fills_up(what, place):
    operation, name, share = ROOM[what]
    number, outcome = number_of(place, AR, operation, 1), Outcome("disk", what)
    limit = FilesUpTo(int(share * (place.folder / "whole" / name).stat().st_size))
    faults.cannot_write(place, AR, number, limit, outcome)
    assert_survived(outcome)
    assert "not reached" not in outcome.where


def test_a_cache_that_does_not_fit_and_folders_that_may_not_be_written(place):
    assert_survived(faults.no_cache(place, 1), *faults.read_only(place, 2))


def test_files_that_are_cut_off_or_changed_are_named(place):
    assert_survived(*faults.damaged_bytes(place, 40))


def test_a_process_whose_partner_is_killed_says_so_and_ends(place):
    assert_survived(*faults.distributed(place, 1))


# -- what the soak would notice ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(place):
    """A copy of the undisturbed run, to be spoilt."""
    place.whole(AR)
    return Path(shutil.copytree(place.folder / "whole", place.empty("copy")))


def test_one_bit_makes_two_states_different():
    one = {"weights": [torch.zeros(3), 1.0], "step": 2}
    other = {"weights": [torch.zeros(3), 1.0], "step": 2}
    assert difference(one, other) is None
    other["weights"][0].view(torch.int32)[1] = 1
    assert difference(one, other).startswith("/weights/0")
    assert "step" in difference(one, {"weights": one["weights"]})


def test_other_weights_or_a_missing_line_make_two_runs_different(place, copy):
    whole = place.folder / "whole"
    assert difference_of_runs(whole, copy, "ar") is None
    log = (copy / "ar_log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "ar_log.jsonl").write_text("".join(log[:-1]), encoding="utf-8")
    assert "log" in difference_of_runs(whole, copy, "ar")
    shutil.copy(copy / "ar.pt", copy / "ar_best.pt")
    assert difference_of_runs(whole, copy, "ar").startswith("_best.pt")
    (copy / "ar_best.pt").unlink()
    assert "_best.pt" in difference_of_runs(whole, copy, "ar")


@pytest.mark.parametrize("name", ["ar.pt", "ar_best.pt", "ar_log.jsonl", "ar_loss.png"])
def test_a_file_that_is_cut_off_is_unsound(name, copy):
    image.imsave(copy / "ar_loss.png", [[0.0, 1.0]])
    assert unsound(copy, "ar") is None
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    assert name in unsound(copy, "ar")


@pytest.mark.parametrize("failures", [[], ["ar.pt is damaged"]])
def test_the_command_fails_if_something_was_not_survived(failures, place, command, monkeypatch, tmp_path):
    outcome = Outcome("disk", "no room")
    outcome.add("at once", failures[0] if failures else None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(soak, "Workplace", lambda folder, seed: place)
    monkeypatch.setitem(soak.PARTS, "disk", lambda place, tries: [outcome])
    result = command(soak, ["--parts", "disk", "--kills", "1", "--json", tmp_path / "soak.json"])
    assert result.code == len(failures) and all(failure in result.out for failure in failures)
    assert len(list(tmp_path.glob("soak-*"))) == len(failures)  # a folder is kept if something failed
    written = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert written["outcomes"][0]["survived"] == 1 - len(failures) and written["settings"]["kills"] == 1


def test_wrong_flags_of_the_soak(refused):
    refused(soak, ["--parts", "kills"], "--parts", "kills", "training")
    refused(soak, ["--kills", "0"], "--kills")
    refused(soak, ["--parts", "bytes", "--kills", "5"], "--kills", "has no effect")
