"""The faults that a training must survive: kills, a lost partner, a full disk, a closed folder, damaged files."""

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from model.checkpoint import load_checkpoint, read_archive
from tests.soak.processes import Command, Disturbance, Ended, FilesUpTo, Forbid, Kill, nothing, start_together
from tests.soak.state import difference_of_runs, temporaries, unsound
from tests.soak.workplace import AR, DIFFUSION, RECIPES, STEPS, Outcome, Recipe, Workplace

KILLS_PER_RUN = 12  # at most; then it may end
BOUND = 20  # seconds within which a process ends whose partner was killed while they trained
SURVIVOR = r"error: another process of this training has ended.*--resume auto"


# -- kills -------------------------------------------------------------------------------------------------------------


def training(place: Workplace, kills: int, recipes: tuple[Recipe, ...] = RECIPES) -> Iterator[Outcome]:
    """SIGKILL at random moments, `kills` times in all; the run goes on after each."""
    for number, recipe in enumerate(recipes, start=1):
        outcome = Outcome("training", f"SIGKILL, {recipe.module.rpartition('.')[2]}")
        share = kills * number // len(recipes) - kills * (number - 1) // len(recipes)
        while outcome.tries < share and not outcome.failures:
            _kill_one_run(place, recipe, min(share - outcome.tries, place.draw.randint(3, KILLS_PER_RUN)), outcome)
        yield outcome


def _kill_one_run(place: Workplace, recipe: Recipe, kills: int, outcome: Outcome) -> None:
    """One run from its start to its end, killed up to `kills` times on the way."""
    folder, hits, fault = place.empty(), [], None
    while len(hits) < kills and not fault:
        ended = _strike(place, recipe, folder)
        if ended.code == 0:
            break
        hits.append(_name_of(place.operations()[-1]))
        fault = unsound(folder, recipe.run) if ended.killed else f"not killed: {ended}"
    fault = fault or place.fault_at_end(recipe)
    for hit in hits:
        outcome.add(hit, fault)
    if fault:  # kept for whoever looks into it
        shutil.copytree(folder, folder.with_name(f"failed_{time.monotonic_ns()}"), dirs_exist_ok=True)


def _strike(place: Workplace, recipe: Recipe, folder: Path) -> Ended:
    """Start the run, or go on with it, and kill it near a random file operation."""
    operations, draw, state = place.whole(recipe), place.draw, folder / f"{recipe.run}.pt"
    left = 1 - (load_checkpoint(state)["step"] if state.exists() else 0) / STEPS
    # Right before the operation, while it writes, or in the computation after it.
    delay = draw.choice((0.0, draw.expovariate(300), draw.uniform(0, 0.2)))
    number = draw.randint(1, max(1, round(left * len(operations))))
    return place.start(recipe, "parts", number=number, action=Kill(delay)).wait()


def _name_of(operation: str) -> str:
    """An operation without the folder and the number of a temporary file."""
    event, _, path = operation.partition(" ")
    return f"{event.removeprefix('os.')} {re.sub(r'[.]tmp.*', '.tmp', Path(path).name)}"


# -- two processes -----------------------------------------------------------------------------------------------------


def distributed(place: Workplace, tries: int) -> Iterator[Outcome]:
    """SIGKILL to one of two processes (gloo); two go on with the run."""
    outcome, folder = Outcome("distributed", "SIGKILL of one of two processes"), place.empty()
    ended = [command.wait() for command in _start_pair(place)]
    if any(process.code for process in ended):
        raise ValueError(f"two processes failed undisturbed: {ended}")
    operations, whole = len(place.operations()), folder.rename(place.empty("whole_two"))
    for number in range(tries):
        place.empty()
        victim = number % 2
        commands = _start_pair(place, 0 if victim else place.draw.randint(3, operations))
        if victim:  # it writes no files; and before the first step the other one waits longer
            while commands[0].code is None and "\ndata " not in commands[0].outputs[0].read_text(encoding="utf-8"):
                time.sleep(0.002)
            time.sleep(place.draw.uniform(0, 0.5))
            commands[1].kill()
        ended = commands[victim].wait()
        if ended.code:
            outcome.add(f"rank {victim}", _fault_of_pair(place, commands, victim, whole))
    yield outcome


def _start_pair(place: Workplace, number: int = 0) -> list[Command]:
    """The first is killed before its `number`-th file operation."""
    kill = Disturbance(place.folder / "parts", place.record, number, Kill())
    return start_together(place.folder, AR.module, AR.argv("parts", "auto"), [kill, nothing])


def _fault_of_pair(place: Workplace, commands: list[Command], victim: int, whole: Path) -> str | None:
    """One of two processes was killed: the other ends in time with one sentence, and two of them end the run."""
    folder, killed, survivor = place.folder / "parts", commands[victim].wait(), commands[1 - victim].wait(BOUND)
    state = folder / f"{AR.run}.pt"
    finished = survivor.code == 0 and state.exists() and load_checkpoint(state)["step"] == STEPS
    if not killed.killed:
        return f"not killed: {killed}"
    if not finished and (survivor.code in (0, None) or not re.search(SURVIVOR, survivor.err)):
        return f"the other process did not end within {BOUND} s with its sentence: {survivor}"
    fault = survivor.err if "Traceback" in survivor.err else unsound(folder, AR.run)
    ended = [command.wait() for command in _start_pair(place)]
    if any(process.code for process in ended):
        return fault or f"could not be continued: {ended}"
    return fault or difference_of_runs(whole, folder, AR.run)


# -- files that cannot be written --------------------------------------------------------------------------------------


def disk(place: Workplace, tries: int) -> Iterator[Outcome]:
    """A disk that fills up in the middle of a training, and a cache that does not fit."""
    outcome = Outcome("disk", "no file may grow beyond a random size")
    for number in range(tries):
        recipe = RECIPES[number % len(RECIPES)]
        operations, whole = place.whole(recipe), place.folder / "whole"
        sizes = [(whole / f"{recipe.run}{end}").stat().st_size for end in (".pt", "_log.jsonl", "_loss.png")]
        size = place.draw.randrange(place.draw.choice(sizes))
        cannot_write(place, recipe, place.draw.randint(1, len(operations)), FilesUpTo(size), outcome)
    yield outcome
    yield no_cache(place, max(1, tries // 5))


def read_only(place: Workplace, tries: int) -> Iterator[Outcome]:
    """A folder that may not be written, from the beginning or from some moment on."""
    outcomes = Outcome("read-only", "from the beginning"), Outcome("read-only", "from a random moment on")
    for number in range(tries):
        recipe, later = RECIPES[number % len(RECIPES)], number % 2
        moment = place.draw.randint(2, len(place.whole(recipe))) if later else 1
        cannot_write(place, recipe, moment, Forbid(place.folder / "parts"), outcomes[later])
    yield from outcomes


def cannot_write(place: Workplace, recipe: Recipe, number: int, action: Callable[[], None], outcome: Outcome) -> None:
    """From its `number`-th file operation on, a training cannot write: it says so in one sentence, leaves everything
    whole, and once it can write again it goes on to the end of the undisturbed run."""
    folder = place.empty()
    ended = place.start(recipe, "parts", number=number, action=action).wait()
    if ended.code == 0:
        outcome.add("not reached", difference_of_runs(place.folder / "whole", folder, recipe.run))
        return
    fault = _fault_of_sentence(ended, folder.name)
    # Where nothing may be deleted, half-written files stay until the run goes on.
    left = [] if isinstance(action, Forbid) else temporaries(folder)
    fault = fault or (f"{left} is left" if left else None) or unsound(folder, recipe.run)
    named = re.search(r"\S*(\.pt|_log\.jsonl|_loss\.png|\.lock)\b", ended.err)
    outcome.add(named[1].lstrip("_.") if named else folder.name, fault or place.fault_at_end(recipe))


def no_cache(place: Workplace, tries: int) -> Outcome:
    """A cache of tokenised data for which there is no room."""
    outcome = Outcome("disk", "the cache does not fit")
    place.whole(AR)
    for _ in range(tries):
        folder, cache = place.empty(), place.empty("cache")
        limit = FilesUpTo(place.draw.randrange(2000))
        ended = place.start(AR, "parts", "--cache-dir", str(cache), number=1, action=limit).wait()
        fault = _fault_of_sentence(ended, cache.name, "--cache-dir")
        left = [path.name for path in cache.glob("*/")]
        fault = fault or (f"{left} is left in the cache" if left else None) or unsound(folder, AR.run)
        outcome.add("tokenising", fault or place.fault_at_end(AR))
    return outcome


def _fault_of_sentence(ended: Ended, *words: str) -> str | None:
    sentence = re.sub(r"^tokenised.*\n", "", ended.err, flags=re.MULTILINE).strip()
    is_one = ended.code == 2 and sentence.startswith("error: ") and "\n" not in sentence
    if is_one and all(word in sentence for word in words):
        return None
    return f"exit code {ended.code}, expected 2 and one sentence with {' and '.join(words)}: {ended.err.strip()[-500:]}"


# -- damaged files -----------------------------------------------------------------------------------------------------


def damaged_bytes(place: Workplace, changes: int) -> Iterator[Outcome]:
    """Checkpoints cut off at every 1 %, and with random bytes changed or blocks zeroed, `changes` in all."""
    place.whole(DIFFUSION)
    sources = [place.folder / "whole" / f"{DIFFUSION.run}{end}" for end in (".pt", "_best.pt", "_state_dict.pt")]
    faults = ("cut off at every 1 %", "a byte changed", "a block zeroed")
    cut, flipped, zeroed = (Outcome("bytes", fault) for fault in faults)
    path, whole = place.folder / "damaged.pt", [source.read_bytes() for source in sources]
    for source, data in zip(sources, whole, strict=True):
        for percent in range(100):
            cut.add(source.name, _fault_of_refusal(path, data[: len(data) * percent // 100]))
    for number in range(changes):
        chosen = place.draw.randrange(len(whole))
        outcome, change = (zeroed, _with_hole) if number % 4 == 0 else (flipped, _with_other_byte)
        outcome.add(sources[chosen].name, _fault_of_refusal(path, change(place.draw, whole[chosen])))
    yield from (cut, flipped, zeroed)


def _with_other_byte(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]


def _with_hole(draw: random.Random, data: bytes) -> bytes:
    changed = data
    while changed == data:  # it was zero there
        first, length = draw.randrange(len(data)), draw.choice((1, 16, 512, 4096))
        hole = bytes(min(length, len(data) - first))
        changed = data[:first] + hole + data[first + len(hole) :]
    return changed


def _fault_of_refusal(path: Path, data: bytes) -> str | None:
    """What is wrong with how the readers of checkpoints refuse a file of these bytes."""
    path.write_bytes(data)
    for load in (load_checkpoint, read_archive):
        try:
            load(path)
        except ValueError as error:
            if str(path) not in str(error):
                return f"{load.__name__}: {error} does not name the file"
        except Exception as error:  # any other would be a traceback
            return f"{load.__name__}: {error!r}"
        else:
            return f"{load.__name__} takes {len(data)} damaged bytes for a checkpoint"
    return None
