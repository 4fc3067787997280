"""`python -m tests.support.stacks.run STACK FILE ...`: what the stack makes of each file, as JSON, a line each."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import redirect_stdout

from tests.support.stacks import TRAINED


def main(stack: str, *paths: str) -> None:
    with redirect_stdout(sys.stderr):  # stacks print while they are imported
        module = importlib.import_module(f"tests.support.stacks.{stack.replace('-', '_')}_stack")
        lines = [json.dumps(module.adapted(path)) for path in paths]
        if stack in TRAINED:
            assert len(importlib.import_module("tests.support.stacks.by_peft").STEPS) == len(paths)
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
