"""The exit codes of the `plop` command, the same for every subcommand."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command ended with.

    Attributes:
        DONE: Everything was done.
        DEFECT: A defect of the package, whose traceback is in the file that the message names; or `plop doctor` found
            a problem.
        INVALID: An option, an input, an output or the environment has to be changed; one line says which and how.
        DIVERGED: A training run diverged: its loss is not finite, or ended above its start. No adapter was written.
        INTERRUPTED: Ctrl-C.
    """

    DONE = 0
    DEFECT = 1
    INVALID = 2
    DIVERGED = 3
    INTERRUPTED = 130
