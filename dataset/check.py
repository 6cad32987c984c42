"""The command of the data doctor, `uv run python -m dataset.check FILE`. The doctor is scripts/check_data.py: it needs
the command line, which dataset/ does not know."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.check_data", run_name="__main__", alter_sys=True)
