"""Two processes that train one model, of which one is killed: the other ends by itself, and the run goes on."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from model.checkpoint import load_checkpoint
from tests.soak.faults import AR, PRETRAINING, STEPS, Outcome, Recipe, Workplace
from tests.soak.processes import PATIENCE, Command, Disturbance, die, forks, nothing
from tests.soak.state import difference_of_runs, unsound

BOUND = 20  # seconds within which a process ends whose partner was killed while they trained
BOUND_OF_TORCHRUN = 60  # it gives those that it has told to stop 30 s
TOLERANCE = 1e-3  # of weights learnt by one process and by two, which add in another order
# Without dropout, which two processes draw otherwise than one, and without Muon's bfloat16, which magnifies rounding.
TWO = Recipe("ar", AR.module, f"{PRETRAINING} --ema-decay 0.9")
SURVIVOR = r"error: another process of this training has ended.*--resume auto"


def distributed(place: Workplace, tries: int) -> Iterator[Outcome]:
    """SIGKILL to one of two processes (gloo); then --resume, by two or by one."""
    yield pairs(place, tries)
    yield under_torchrun(place, max(1, tries // 10))


def pairs(place: Workplace, tries: int) -> Outcome:
    """Of two processes that nobody watches over, one is killed while they train."""
    outcome, whole = Outcome("distributed", "SIGKILL of one of two processes"), place.anew("whole_two")
    forks()  # whose start is no part of the time
    began = time.monotonic()
    ended = [command.wait() for command in start_pair(place, whole.name)]
    seconds = time.monotonic() - began
    if any(one.code for one in ended):
        raise ValueError(f"two processes failed undisturbed: {ended}")
    operations = len(place.record.read_text(encoding="utf-8").splitlines())
    for number in range(tries):
        folder, victim = place.anew(), number % 2
        commands = start_pair(place, "parts", place.draw.randint(3, operations) if victim == 0 else 0)
        if victim == 1:
            _kill_in_training(commands, place.draw.uniform(0, seconds / 2))
        ended = commands[victim].wait()
        if ended.code == -signal.SIGKILL:
            fault = _fault_of_survivor(commands[1 - victim], folder)
            fault = fault or unsound(folder, TWO.run) or _go_on(place, whole, folder, by_two=number % 4 < 2)
            outcome.add(f"rank {victim}", fault)
        elif ended.code:
            outcome.add(f"rank {victim}", f"exit code {ended.code} without a kill: {ended.err.strip()[-500:]}")
    return outcome


def start_pair(place: Workplace, save_dir: str, number: int = 0) -> list[Command]:
    """Two processes as torchrun starts them; the first is killed before its `number`-th file operation, if it has as
    many. As under torchrun, the store by which they find each other is in another process, this one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    argv = TWO.argv(save_dir, "--resume", "auto")
    first = Disturbance(nothing, place.folder / save_dir, place.record, number, die)
    return [
        Command(
            place.folder,
            TWO.module,
            argv,
            None if rank else first,
            name=f"rank{rank}",
            environment={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            keep=store,
        )
        for rank in range(2)
    ]


def _kill_in_training(commands: list[Command], seconds: float) -> None:
    """Kill the second process `seconds` after the first has said that the training begins."""
    out = commands[0].outputs[0]
    while commands[0].code is None and not re.search(r"^data .*", out.read_text(encoding="utf-8"), re.MULTILINE):
        time.sleep(0.002)
    commands[1].ends_within(seconds)
    commands[1].kill()


def _fault_of_survivor(survivor: Command, folder: Path) -> str | None:
    began, state = time.monotonic(), folder / f"{TWO.run}.pt"
    ended = survivor.wait(BOUND)
    if ended.code == 0 and state.exists() and load_checkpoint(state)["step"] == STEPS:
        return None  # nothing was left to do that takes both
    if ended.code is None:
        return f"the other process has not ended within {BOUND} s: {ended.err.strip()[-500:]}"
    if ended.code == 0 or "Traceback" in ended.err or not re.search(SURVIVOR, ended.err):
        waited = time.monotonic() - began
        return f"the other process: exit code {ended.code} after {waited:.1f} s: {ended.err.strip()[-800:]}"
    return None


def _go_on(place: Workplace, whole: Path, folder: Path, by_two: bool) -> str | None:
    """What is wrong at the end of the run, continued by two processes (equal to the last bit) or by one (nearly)."""
    if by_two:
        ended = [command.wait() for command in start_pair(place, folder.name)]
        failed = [one for one in ended if one.code]
        return str(failed) if failed else difference_of_runs(whole, folder, TWO.run)
    ended = place.start(TWO, folder.name).wait()
    if ended.code:
        return f"exit code {ended.code}: {ended.err.strip()[-500:]}"
    expected, found = (load_checkpoint(where / f"{TWO.run}.pt") for where in (whole, folder))
    far = max(float((found["weights"][name] - tensor).abs().max()) for name, tensor in expected["weights"].items())
    return None if far < TOLERANCE and found["step"] == STEPS else f"step {found['step']}, weights {far:.2g} away"


def under_torchrun(place: Workplace, tries: int) -> Outcome:
    """The same through torchrun, at any moment from its start; to be called after `pairs`."""
    outcome = Outcome("distributed", "SIGKILL of a process of torchrun")
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        outcome.note = "skipped: this system does not tell the children of a process"
        return outcome
    line = ["--nproc-per-node", "2", "-m", TWO.module]
    for number in range(tries):
        folder = place.anew()
        argv = [*line, *TWO.argv("parts", "--resume", "auto")]
        torchrun = Command(place.folder, "torch.distributed.run", argv, alone=True)
        workers: list[int] = []
        while torchrun.code is None and len(workers) < 2:
            workers = _children(torchrun.process.pid)
            time.sleep(0.01)
        torchrun.ends_within(place.draw.uniform(0, 2 * place.start_up()))
        alive = torchrun.code is None
        if alive:
            os.kill(workers[number % 2], signal.SIGKILL)
        ended = torchrun.wait(BOUND_OF_TORCHRUN if alive else PATIENCE)
        fault = None
        if alive and not ended.code:
            fault = f"torchrun ends with {ended.code} within {BOUND_OF_TORCHRUN} s of the kill"
        left = [pid for pid in workers if _is_alive(pid)]
        fault = fault or (f"processes {left} live on" if left else None) or unsound(folder, TWO.run)
        fault = fault or _go_on(place, place.folder / "whole_two", folder, by_two=True)
        outcome.add("in training" if re.search("^step ", ended.out, re.MULTILINE) else "starting", fault)
    return outcome


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
