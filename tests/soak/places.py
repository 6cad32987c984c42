"""Disks that fill up, folders that nobody may write, files that are cut off or changed."""

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint import load_checkpoint, read_archive
from tests.soak.faults import AR, DIFFUSION, RECIPES, Outcome, Recipe, Workplace
from tests.soak.processes import Ended, FilesUpTo, Locked, obey_permissions, temporaries
from tests.soak.state import difference_of_runs, unsound


def disk(place: Workplace, tries: int) -> Iterator[Outcome]:
    """A disk that fills up in the middle of a training, and a cache that does not fit."""
    yield _limited(place, tries)
    yield _small_disk(place, max(1, tries // 5))
    yield no_cache(place, max(1, tries // 5))


def _limited(place: Workplace, tries: int) -> Outcome:
    outcome = Outcome("disk", "no file may grow beyond a random size")
    for number in range(tries):
        recipe = RECIPES[number % len(RECIPES)]
        known, whole = place.whole(recipe), place.folder / "whole"
        sizes = [(whole / f"{recipe.run}{end}").stat().st_size for end in (".pt", "_log.jsonl", "_loss.png")]
        size = place.draw.randrange(place.draw.choice(sizes))
        no_room(place, recipe, size, place.draw.randint(1, len(known.operations)), outcome)
    return outcome


def no_room(place: Workplace, recipe: Recipe, size: int, number: int, outcome: Outcome) -> None:
    """From the `number`-th file operation of a run on, no file may grow beyond `size` bytes."""
    folder = place.anew()
    ended = place.start(recipe, "parts", action=FilesUpTo(size), number=number).wait()
    _judge(outcome, place, recipe, ended, folder)


def _small_disk(place: Workplace, tries: int) -> Outcome:
    """A file system of its own, too small for the run, which then grows."""
    outcome, folder = Outcome("disk", "small file system (tmpfs)"), place.anew("small")
    for number in range(tries):
        recipe = RECIPES[number % len(RECIPES)]
        place.whole(recipe)
        needed = sum(path.stat().st_size for path in (place.folder / "whole").glob(f"{recipe.run}[._]*"))
        with _mounted(folder, place.draw.randrange(4096, needed)) as grow:
            if grow is None:
                outcome.note = "skipped: this user may not mount a file system"
                return outcome
            ended = place.start(recipe, "small").wait()
            _judge(outcome, place, recipe, ended, folder, grow)
    return outcome


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[Callable[[], None] | None]:
    """A tmpfs of `size` bytes at `folder`; what makes it large enough, or None where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "soak", str(folder)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1G", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def no_cache(place: Workplace, tries: int) -> Outcome:
    """A cache of tokenised data for which there is no room."""
    outcome = Outcome("disk", "the cache does not fit")
    for _ in range(tries):
        folder, cache = place.anew(), place.anew("cache")
        limit = FilesUpTo(place.draw.randrange(2000))
        ended = place.start(AR, "parts", "--cache-dir", str(cache), action=limit, number=1).wait()
        fault = _fault_of_sentence(ended, cache.name, "--cache-dir")
        left = [path.name for path in cache.iterdir()] if cache.is_dir() else []
        fault = fault or (f"{left} is left in the cache" if left else None) or unsound(folder, AR.run)
        outcome.add("tokenising", fault or place.finish(AR))
    return outcome


def read_only(place: Workplace, tries: int) -> Iterator[Outcome]:
    """A folder that may not be written, from the beginning or from some moment on."""
    outcomes = Outcome("read-only", "from the beginning"), Outcome("read-only", "from a random moment on")
    for number in range(tries):
        recipe, outcome = RECIPES[number % len(RECIPES)], outcomes[number % 2]
        known, folder = place.whole(recipe), place.anew()
        folder.mkdir()
        lock = Locked(folder)
        try:
            ended = place.start(recipe, "parts", before=lock) if number % 2 == 0 else None
            moment = place.draw.randint(2, len(known.operations))
            ended = ended or place.start(recipe, "parts", before=obey_permissions, action=lock, number=moment)
            ended = ended.wait()
        finally:
            folder.chmod(0o700)
        if "start this as another user" in ended.err:
            outcome.note = "skipped: " + ended.err.strip().removeprefix("error: ")
            break
        if ended.code == 0:  # its last file was written before
            outcome.add("nothing left to write", difference_of_runs(place.folder / "whole", folder, recipe.run))
        else:
            _judge(outcome, place, recipe, ended, folder, tidy=False)
    yield from outcomes


def damaged_bytes(place: Workplace, changes: int) -> Iterator[Outcome]:
    """Checkpoints cut off at every 1 %, and with random bytes changed or blocks zeroed, `changes` in all."""
    place.whole(DIFFUSION)
    sources = [place.folder / "whole" / f"{DIFFUSION.run}{end}" for end in (".pt", "_best.pt", "_state_dict.pt")]
    cut, flipped, zeroed = (
        Outcome("bytes", fault) for fault in ("cut off at every 1 %", "a byte changed", "a block zeroed")
    )
    path, whole = place.folder / "damaged.pt", [source.read_bytes() for source in sources]
    for source, data in zip(sources, whole, strict=True):
        for percent in range(100):
            cut.add(source.name, _undetected(path, data[: len(data) * percent // 100]))
    for number in range(changes):
        chosen = place.draw.randrange(len(whole))
        outcome, change = (zeroed, _zero) if number % 4 == 0 else (flipped, _flip)
        outcome.add(sources[chosen].name, _undetected(path, change(place.draw, whole[chosen])))
    yield from (cut, flipped, zeroed)


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed, at = bytearray(data), draw.randrange(len(data))
    changed[at] ^= draw.randrange(1, 256)
    return bytes(changed)


def _zero(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    while changed == data:
        first, length = draw.randrange(len(data)), draw.choice((1, 16, 512, 4096))
        length = min(length, len(data) - first)
        changed[first : first + length] = bytes(length)
    return bytes(changed)


def _undetected(path: Path, data: bytes) -> str | None:
    """What is wrong with how the file of these bytes is refused."""
    path.write_bytes(data)
    for load in (load_checkpoint, read_archive):
        try:
            load(path)
        except ValueError as error:
            if str(path) not in str(error):
                return f"{load.__name__}: {error} does not name the file"
        except Exception as error:  # whatever else would be a traceback
            return f"{load.__name__}: {error!r}"
        else:
            return f"{load.__name__} takes {len(data)} damaged bytes for a checkpoint"
    return None


def _judge(
    outcome: Outcome,
    place: Workplace,
    recipe: Recipe,
    ended: Ended,
    folder: Path,
    repair: Callable[[], object] = lambda: None,
    tidy: bool = True,
) -> None:
    """Note whether a training that could not write said so in one sentence, left everything whole and, once it can
    write again, goes on to the end of the undisturbed run. tidy: half-written files could be removed."""
    if ended.code == 0:
        outcome.add("not reached", difference_of_runs(place.folder / "whole", folder, recipe.run))
        return
    fault = _fault_of_sentence(ended, folder.name)
    left = temporaries(folder) if tidy else None
    fault = fault or (f"{sorted(left)} is left" if left else None) or unsound(folder, recipe.run)
    repair()
    named = re.search(r"\S*(\.pt|_log\.jsonl|_loss\.png|\.lock)\b", ended.err)
    outcome.add(named[1].lstrip("_.") if named else folder.name, fault or place.finish(recipe, folder.name))


def _fault_of_sentence(ended: Ended, *words: str) -> str | None:
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("tokenised")]
    right = ended.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    if right and all(word in lines[0] for word in words):
        return None
    return f"exit code {ended.code}, expected 2 and one sentence with {' and '.join(words)}: {ended.err.strip()[-500:]}"
