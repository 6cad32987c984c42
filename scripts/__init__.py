"""Commands, run from the repository's root as `python -m scripts.<folder>.<module>`."""
