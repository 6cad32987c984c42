"""Commands, run from the repository's root as `python -m scripts.<folder>.<module>`."""

import os

# Large pages for CPU tensors, where Linux grants them on request: 35 % (AR) and 22 % (diffusion) more training tokens
# per second on one core, at 6.5M parameters; no number changes. Read by torch when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
