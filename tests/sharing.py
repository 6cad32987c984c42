"""The whole suite in two processes: tests are small, and one process keeps one core busy.

Where most files of the suite are asked for, a second pytest is started with the same arguments. Both go through the
files in the same order, the longest first, and run those that they are the first to claim.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch

CLAIMS = "NANO_LLADA_TEST_CLAIMS"  # the folder in which files are claimed
FEWEST_FILES = 30
LONGEST = ("test_quickstart_learns", "test_readme", "test_crash", "test_distributed", "test_resume", "test_quickstart")
CLAIM, OTHER = pytest.StashKey[Path](), pytest.StashKey[subprocess.Popen]()
OUTPUT = "output.txt"


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    config, files = session.config, {item.path for item in session.items}
    if folder := os.environ.get(CLAIMS):
        config.stash[CLAIM] = Path(folder)
    elif len(files) >= FEWEST_FILES and not config.option.collectonly and (os.cpu_count() or 1) > 1:
        config.stash[CLAIM] = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "-p", "no:cacheprovider"]
        environment = os.environ | {CLAIMS: str(config.stash[CLAIM]), "PYTHONIOENCODING": "utf-8"}
        with (config.stash[CLAIM] / OUTPUT).open("wb") as output:
            config.stash[OTHER] = subprocess.Popen(
                command, cwd=config.invocation_params.dir, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
    if CLAIM in config.stash:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    stash = session.config.stash
    if CLAIM not in stash or session.testsfailed:  # or nothing could be collected, which pytest's own loop tells
        return None
    other = stash.get(OTHER, None)
    try:
        items = _claimed(session.items, stash[CLAIM])
        item = next(items, None)
        while item is not None:
            following = next(items, None)
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        session.testsfailed += bool(other and other.wait())
    finally:
        if other:
            other.kill()
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stash = terminalreporter.config.stash
    if other := stash.get(OTHER, None):
        lines = (stash[CLAIM] / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
        terminalreporter.write_sep("=", "the other process")
        for line in lines if other.wait() else lines[-1:]:
            terminalreporter.write_line(line)


def _claimed(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """The items of the files that no other process has claimed, a file being claimed when it comes to it."""
    files = [(path, list(group)) for path, group in groupby(items, key=lambda item: item.path)]
    for path, group in sorted(files, key=lambda file: file[0].stem not in LONGEST):
        try:
            (folder / f"{path.parent.name}-{path.stem}").touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from group
