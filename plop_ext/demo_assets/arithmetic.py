"""Worked arithmetic problems, generated from a seed: a finetuning task that no pretraining text contains."""

from __future__ import annotations

import random
from collections.abc import Callable

from plop_ext.errors import InputError

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
_ITEMS = ("apples", "books", "coins", "eggs", "nails", "pens", "seeds", "stamps")


def generate(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Generate `n` distinct arithmetic problems with their worked solutions.

    A row holds a `prompt`, such as `Q: 47 + 85 = ?`, and a `completion` that works digit by digit to the result,
    `7 + 5 = 12, write 2 carry 1; 4 + 8 + 1 = 13; answer 132`; both end with a newline and together take 40 to 140
    bytes of ASCII. Problems are additions and subtractions of two or three digits, products with one digit, and
    word problems of two steps, in equal shares.

    Args:
        n: Number of rows. There are millions of distinct problems.
        seed: Seed of the generator's own random state; the global one is neither read nor changed. A longer list
            starts with the rows of a shorter one. Different seeds may share a few problems.

    Returns:
        Rows with the keys `prompt` and `completion`.

    Raises:
        InputError: If `n` is negative.

    Example:
        >>> from plop_ext.demo_assets.arithmetic import generate
        >>> sorted(generate(1)[0])
        ['completion', 'prompt']
    """
    if n < 0:
        raise InputError(f"`n` must be at least 0, got {n}")
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_addition, _subtraction, _product, _story)
    rows: dict[str, str] = {}
    while len(rows) < n:
        prompt, completion = kinds[rng.randrange(len(kinds))](rng)
        rows.setdefault(prompt, completion)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def _number(rng: random.Random) -> int:
    """Draw a number of two or of three digits, equally often."""
    return rng.randrange(10, 100) if rng.randrange(2) else rng.randrange(100, 1000)


def _digits(number: int) -> list[int]:
    """Return the decimal digits, lowest first."""
    return [int(digit) for digit in reversed(str(number))]


def _addition(rng: random.Random) -> tuple[str, str]:
    """Add column by column."""
    a, b = _number(rng), _number(rng)
    columns_a, columns_b = _digits(a), _digits(b)
    width = max(len(columns_a), len(columns_b))
    steps, carry = [], 0
    for place in range(width):
        terms = [column[place] for column in (columns_a, columns_b) if place < len(column)] + [carry] * bool(carry)
        total = sum(terms)
        step = f"{' + '.join(map(str, terms))} = {total}" if len(terms) > 1 else f"bring down {total}"
        carry = total // 10 if place < width - 1 else 0
        steps.append(step + (f", write {total % 10} carry {carry}" if carry else ""))
    return f"Q: {a} + {b} = ?\n", _solution(steps, a + b)


def _subtraction(rng: random.Random) -> tuple[str, str]:
    """Subtract the smaller number from the larger, column by column."""
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    columns_a, columns_b = _digits(a), _digits(b)
    steps, borrow = [], 0
    for place, top in enumerate(columns_a):
        taken = [borrow] * bool(borrow) + columns_b[place : place + 1]
        borrow = int(top < sum(taken))
        top += 10 * borrow
        step = f"{top} - {' - '.join(map(str, taken))} = {top - sum(taken)}" if taken else f"bring down {top}"
        steps.append(step + (", borrow 1" if borrow else ""))
    return f"Q: {a} - {b} = ?\n", _solution(steps, a - b)


def _product(rng: random.Random) -> tuple[str, str]:
    """Multiply by one digit, column by column."""
    a, b = _number(rng), rng.randrange(2, 10)
    columns = _digits(a)
    steps, carry = [], 0
    for place, digit in enumerate(columns):
        total = digit * b + carry
        step = f"{digit} * {b}{f' + {carry}' if carry else ''} = {total}"
        carry = total // 10 if place < len(columns) - 1 else 0
        steps.append(step + (f", write {total % 10} carry {carry}" if carry else ""))
    return f"Q: {a} * {b} = ?\n", _solution(steps, a * b)


def _story(rng: random.Random) -> tuple[str, str]:
    """Tell a problem of two steps."""
    name, item = rng.choice(_NAMES), rng.choice(_ITEMS)
    kind = rng.randrange(4)
    if kind == 0:
        have, more = rng.randrange(10, 100), rng.randrange(2, 60)
        away = rng.randrange(1, have + more)
        text = f"{name} has {have} {item}, buys {more} and gives away {away}. How many are left?"
        first, result = have + more, have + more - away
        steps = [f"{have} + {more} = {first}", f"{first} - {away} = {result}"]
    elif kind == 1:
        boxes, each, extra = rng.randrange(2, 10), rng.randrange(3, 30), rng.randrange(2, 60)
        text = f"{name} fills {boxes} boxes with {each} {item} each and has {extra} over. How many in all?"
        first, result = boxes * each, boxes * each + extra
        steps = [f"{boxes} * {each} = {first}", f"{first} + {extra} = {result}"]
    elif kind == 2:
        rows, each = rng.randrange(2, 10), rng.randrange(3, 30)
        lost = rng.randrange(1, rows * each)
        text = f"{name} sets out {rows} rows of {each} {item} and sells {lost}. How many remain?"
        first, result = rows * each, rows * each - lost
        steps = [f"{rows} * {each} = {first}", f"{first} - {lost} = {result}"]
    else:
        friends, each, kept = rng.randrange(2, 10), rng.randrange(2, 20), rng.randrange(1, 30)
        have = friends * each + kept
        text = f"{name} has {have} {item}, keeps {kept} and splits the rest among {friends}. How many each?"
        steps = [f"{have} - {kept} = {have - kept}", f"{have - kept} / {friends} = {each}"]
        result = each
    return f"Q: {text}\n", _solution(steps, result)


def _solution(steps: list[str], result: int) -> str:
    """Join the steps and the result into a completion."""
    return f"{'; '.join(steps)}; answer {result}\n"
