"""The commands by name, for tests that hold for several of them."""

from scripts.eval import eval_diffusion, eval_minimind, likelihood
from scripts.train import diffusion, train_pretrain

EVALS = {"eval_minimind": eval_minimind, "eval_diffusion": eval_diffusion, "likelihood": likelihood}
TRAINS = {"train_pretrain": train_pretrain, "diffusion": diffusion}
