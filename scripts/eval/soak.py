"""The command of the long crash test, `uv run python -m scripts.eval.soak`. The harness is tests/soak, where its other
users are."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tests.soak", run_name="__main__", alter_sys=True)
