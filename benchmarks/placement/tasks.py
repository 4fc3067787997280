"""Generated tasks with exact answers, from near the pretraining text to far from it.

`TASKS` are those of the protocol. `TRIED` are those that tell placements apart less well: every placement learns the
task, or none does, or some seeds do and others do not. Their runs are kept, and `--tasks` still runs them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence

Example = tuple[str, str]

_NAMES = (
    "width height depth size count total index offset start stop step scale weight rate price cost value item name "
    "key left right top bottom first last head tail length limit delta alpha beta gamma score level rank order group "
    "batch block layer node edge source target label text line word char path root base power angle speed mass time"
).split()
_VERBS = "get set make find read write load save check parse build split join merge sort filter map clip pad".split()
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "@", "&", "|")
_PEOPLE = "ann bob carl dora eve finn gina hugo iris jack kate liam mona nick olga paul rosa sam tina will".split()
_CITIES = "oslo rome lima cairo paris delhi tokyo quito sofia minsk seoul accra dakar hanoi doha riga bern".split()


def code(rng: random.Random) -> Example:
    """A function of one expression as a lambda: Python, as the pretraining text."""
    first, second = rng.sample(_NAMES, 2)
    name = f"{rng.choice(_VERBS)}_{rng.choice(_NAMES)}"
    body = f"{first} {rng.choice(_OPERATORS)} {second}"
    if rng.random() < 0.5:
        body = f"{body} {rng.choice(_OPERATORS)} {rng.randint(2, 9)}"
    return f"def {name}({first}, {second}):\n    return {body}\n\n", f"{name} = lambda {first}, {second}: {body}"


def inline(rng: random.Random) -> Example:
    """The call of a lambda with its arguments put in: Python too, but names are bound to values."""
    names = rng.sample(_NAMES, 3)
    values = rng.sample(range(10), 3)
    order = rng.sample(range(3), 3)
    signs = [rng.choice(_OPERATORS[:4]) for _ in range(2)]

    def expression(words: Sequence[object]) -> str:
        first, second, third = (words[place] for place in order)
        return f"{first} {signs[0]} {second} {signs[1]} {third}"

    arguments = ", ".join(str(value) for value in values)
    return f"f = lambda {', '.join(names)}: {expression(names)}\nf({arguments}) == ", expression(values)


def rename(rng: random.Random) -> Example:
    """The body of a function with other names for its arguments: Python, and names are bound to names."""
    names, new = rng.sample(_NAMES, 3), rng.sample(_NAMES, 3)
    places = [0, 1, 2, rng.randrange(3)]
    rng.shuffle(places)
    signs = [rng.choice(_OPERATORS[:6]) for _ in range(3)]

    def expression(words: Sequence[str]) -> str:
        first, *others = (words[place] for place in places)
        return " ".join([first, *(f"{sign} {word}" for sign, word in zip(signs, others, strict=True))])

    prompt = f"def f({', '.join(names)}):\n    return {expression(names)}\n\nf = lambda {', '.join(new)}: "
    return prompt, expression(new)


def postfix(rng: random.Random) -> Example:
    """An expression with its operators behind their operands: the structure of Python, in another order."""

    def expression(names: Sequence[str]) -> Example:
        if len(names) == 1:
            return names[0], names[0]
        cut, sign = rng.randint(1, len(names) - 1), rng.choice(_OPERATORS[:4])
        (left, left_postfix), (right, right_postfix) = expression(names[:cut]), expression(names[cut:])
        return f"({left} {sign} {right})", f"{left_postfix} {right_postfix} {sign}"

    infix, answer = expression(rng.sample(_NAMES, 6))
    return f"{infix[1:-1]} => ", answer


def order(rng: random.Random) -> Example:
    """Numbers of two digits in order: an algorithm over its context."""
    values = [rng.randint(10, 99) for _ in range(7)]
    return f"{' '.join(map(str, values))} => ", " ".join(map(str, sorted(values)))


def total(rng: random.Random) -> Example:
    """The sum of a number of three digits and one of one: arithmetic, which the text hardly has."""
    first, second = rng.randint(100, 999), rng.randint(1, 9)
    return f"{first} + {second} = ", str(first + second)


def record(rng: random.Random) -> Example:
    """Fields of a line as JSON with sorted keys: another format of the same content."""
    values = {"name": rng.choice(_PEOPLE), "id": rng.randint(100, 999), "city": rng.choice(_CITIES)}
    keys = rng.sample(list(values), 3)
    line = "; ".join(f"{key}: {values[key]}" for key in keys)
    return f"{line} => ", json.dumps({key: values[key] for key in sorted(keys)})


def recall(rng: random.Random) -> Example:
    """The value of one key out of six: a look-up in the context."""
    keys = rng.sample("abcdefghijklmnopqrstuvwxyz", 6)
    values = [rng.randint(10, 99) for _ in keys]
    pairs = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    asked = rng.randrange(6)
    return f"{{{pairs}}}[{keys[asked]}] == ", str(values[asked])


def sort(rng: random.Random) -> Example:
    """Digits in order: an algorithm over its context."""
    values = [rng.randint(0, 9) for _ in range(7)]
    return f"{' '.join(map(str, values))} => ", " ".join(map(str, sorted(values)))


def add(rng: random.Random) -> Example:
    """The sum of a number of three digits and one of two: arithmetic with a carry."""
    first, second = rng.randint(100, 999), rng.randint(10, 99)
    return f"{first} + {second} = ", str(first + second)


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "rename": rename,
    "postfix": postfix,
    "order": order,
    "total": total,
}
TRIED: dict[str, Callable[[random.Random], Example]] = {
    "code": code,
    "inline": inline,
    "record": record,
    "recall": recall,
    "sort": sort,
    "add": add,
}


def examples(task: str) -> Iterator[Example]:
    """Examples of `task` without end, no prompt twice, the same on every machine."""
    rng = random.Random(int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big"))
    task_of = {**TASKS, **TRIED}[task]
    seen: set[str] = set()
    while True:
        prompt, answer = task_of(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer
