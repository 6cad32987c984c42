"""Killed at any moment, cut off from the disk, handed damaged files: nothing is lost. A little of scripts.eval.soak,
and that the soak would notice if it were otherwise."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib import image

from scripts.engine.training import trainer
from tests.soak import __main__ as soak
from tests.soak import distributed as soak_distributed
from tests.soak import faults as soak_training
from tests.soak import places as soak_places
from tests.soak.faults import AR, DIFFUSION, Outcome, Workplace, phase
from tests.soak.processes import Ended, die, nothing
from tests.soak.state import difference, difference_of_runs, unsound


def draw_nothing(before):
    trainer.plot_losses = lambda log, image: None
    before()


class Undrawn(Workplace):
    """Loss curves take longer than the runs that they are drawn for."""

    def start(self, *arguments, before=nothing, **more):
        return super().start(*arguments, before=partial(draw_nothing, before), **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One workplace for all tests of this file, with its undisturbed runs."""
    return Undrawn(tmp_path_factory.mktemp("soak"), seed=0)


def assert_survived(*outcomes):
    for outcome in outcomes:
        assert (outcome.survived == outcome.tries > 0) or outcome.note, outcome


def number_of(place, recipe, operation, which):
    """The number of an undisturbed run's `which`-th file operation that begins with these words."""
    found = [n for n, line in enumerate(place.whole(recipe).operations, start=1) if line.startswith(operation)]
    return found[which]


def test_a_training_that_is_killed_again_and_again_ends_as_the_one_that_was_not(place):
    assert_survived(*soak_training.training(place, 4, (AR,)))


def test_a_kill_between_a_written_checkpoint_and_its_name(place):
    folder, number = place.anew(), number_of(place, DIFFUSION, "os.rename whole/diffusion.pt.tmp", 2)
    assert place.start(DIFFUSION, "parts", action=die, number=number).wait().killed
    assert unsound(folder, DIFFUSION.run) is None
    assert place.finish(DIFFUSION) is None


def test_the_best_weights_that_a_checkpoint_counts_on_outlive_it(place):
    """The last validation drops one of the best weights; killed before the next save, the run needs it once more."""
    number = number_of(place, DIFFUSION, "open whole/diffusion.pt.tmp", -1)
    place.anew()
    assert place.start(DIFFUSION, "parts", action=die, number=number).wait().killed
    assert place.finish(DIFFUSION) is None


ROOM = {  # for how much of which file, from its second writing on
    "checkpoint": ("open whole/ar.pt.tmp", "ar.pt", 0.5),
    "log": ("open whole/ar_log.jsonl", "ar_log.jsonl", 0.3),
}


@pytest.mark.parametrize("what", ROOM)
def test_a_disk_that_fills_up(what, place):
    operation, name, share = ROOM[what]
    number, outcome = number_of(place, AR, operation, 1), Outcome("disk", what)
    size = (place.folder / "whole" / name).stat().st_size
    soak_places.no_room(place, AR, int(share * size), number, outcome)
    assert_survived(outcome)
    assert "not reached" not in outcome.where


def test_a_cache_that_does_not_fit_and_folders_that_may_not_be_written(place):
    assert_survived(soak_places.no_cache(place, 1), *soak_places.read_only(place, 2))


def test_a_clock_that_falls(place):
    assert_survived(*soak_training.clock(place, 1))


def test_files_that_are_cut_off_or_changed_are_named(place):
    assert_survived(*soak_places.damaged_bytes(place, 40))


def test_a_process_whose_partner_is_killed_says_so_and_ends(place):
    assert_survived(soak_distributed.pairs(place, 1))


# -- what the soak would notice ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(place):
    """A copy of the undisturbed run, to be spoilt."""
    place.whole(AR)
    return Path(shutil.copytree(place.folder / "whole", place.anew("copy")))


def test_one_bit_makes_two_states_different():
    one = {"weights": [torch.zeros(3), 1.0], "step": 2}
    other = {"weights": [torch.zeros(3), 1.0], "step": 2}
    assert difference(one, other) is None
    other["weights"][0].view(torch.int32)[1] = 1
    assert difference(one, other) == "/weights/0 differs"
    assert "step" in difference(one, {"weights": one["weights"]})


def test_other_weights_or_a_missing_line_make_two_runs_different(place, copy):
    whole = place.folder / "whole"
    assert difference_of_runs(whole, copy, "ar") is None
    log = (copy / "ar_log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "ar_log.jsonl").write_text("".join(log[:-1]), encoding="utf-8")
    assert difference_of_runs(whole, copy, "ar").startswith("the log: ")
    shutil.copy(copy / "ar.pt", copy / "ar_best.pt")
    assert difference_of_runs(whole, copy, "ar").startswith("_best.pt")
    (copy / "ar_best.pt").unlink()
    assert "_best.pt" in difference_of_runs(whole, copy, "ar")


@pytest.mark.parametrize("name", ["ar.pt", "ar_best.pt", "ar_log.jsonl"])
def test_a_file_that_is_cut_off_is_unsound(name, copy):
    assert unsound(copy, "ar") is None
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    assert name in unsound(copy, "ar")


def test_a_picture_that_is_cut_off_is_unsound(tmp_path):
    image.imsave(tmp_path / "ar_loss.png", [[0.0, 1.0]])
    assert unsound(tmp_path, "ar") is None
    (tmp_path / "ar_loss.png").write_bytes((tmp_path / "ar_loss.png").read_bytes()[:-1])
    assert "ar_loss.png" in unsound(tmp_path, "ar")


def test_the_phase_of_a_kill_is_told_by_what_was_said_and_left(tmp_path):
    said = [
        ("starting", "scripts.train.train_pretrain: run ar\n"),
        ("training", "step 3: train loss 5.1, lr 1e-3\nsaved parts/ar.pt (step 3)\n"),
        ("evaluating", "step 4: train loss 5.1, lr 1e-3\nsaved parts/ar.pt (step 4)\n"),
        ("training", "saved parts/ar.pt (step 4)\nstep 4: val loss 5.0\n"),
        ("finishing", "saved parts/ar.pt (step 12)\nsaved parts/ar_state_dict.pt\n"),
    ]
    assert [phase(Ended(-9, text, ""), tmp_path, set()) for _, text in said] == [name for name, _ in said]
    (tmp_path / "ar.pt.tmp").touch()
    assert phase(Ended(-9, "", ""), tmp_path, set()) == "saving"


@pytest.mark.parametrize("failures", [[], ["ar.pt is damaged"]])
def test_the_command_fails_where_something_was_not_survived(failures, place, command, monkeypatch, tmp_path):
    outcome = Outcome("clock", "time goes backwards")
    outcome.add("at once", failures[0] if failures else None)
    monkeypatch.setattr(soak, "Workplace", lambda folder, seed: place)
    monkeypatch.setitem(soak.PARTS, "clock", lambda place, tries: [outcome])
    result = command(soak, ["--parts", "clock", "--kills", "1", "--json", tmp_path / "soak.json"])
    assert result.code == len(failures) and all(failure in result.out for failure in failures)
    written = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert written["outcomes"][0]["survived"] == 1 - len(failures) and written["settings"]["kills"] == 1


def test_wrong_flags_of_the_soak(refused):
    refused(soak, ["--parts", "kills"], "--parts", "kills", "training")
    refused(soak, ["--kills", "0"], "--kills")
    refused(soak, ["--parts", "bytes", "--kills", "5"], "--kills", "has no effect")
    refused(soak, ["--work-dir", "."], "--work-dir", "not empty")
