"""The commands by name, for tests that hold for several of them."""

import importlib
import pkgutil
from types import ModuleType

import scripts.eval
import scripts.train
from scripts.eval import eval_diffusion, eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain

EVALS = {"eval_minimind": eval_minimind, "eval_diffusion": eval_diffusion, "likelihood": likelihood}
TRAINS = {"train_pretrain": train_pretrain, "diffusion": diffusion}
COMMANDS = sorted(
    f"{package.__name__}.{module.name}"
    for package in (scripts.train, scripts.eval)
    for module in pkgutil.iter_modules(package.__path__)
)
COMMANDS += ["dataset.check", "scripts.chat", "scripts.quickstart"]
ELSEWHERE = {"dataset.check": "scripts.check_data", "scripts.eval.soak": "tests.soak.__main__"}


def module_of(command: str) -> ModuleType:
    """The module whose `main` is run by `python -m command`."""
    return importlib.import_module(ELSEWHERE.get(command, command))
