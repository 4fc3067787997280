"""Check the words of code and pages: established nouns instead of private idioms, and lines that fit a screen.

    python scripts/check_words.py                # every tracked file
    python scripts/check_words.py README.md ...  # some files

Words are looked for in pages, and in the comments, strings and names of tests of the sources. Generated tables, code
in pages and the prose corpus are left alone. `words: ignore` at the end of a line exempts the line.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
PAGES = (".md", ".j2")
SOURCES = (".cpp", ".h", ".cu", ".cuh")
IGNORE = "words: ignore"
# This file and its test quote the words; the corpus is by others.
EXEMPT = ("scripts/check_words.py", "tests/build/test_words.py", "plop_ext/demo_assets/prose.txt", "LICENSE")

_STEMS = "synchron|normal|initial|recogn|vector|optim|general|quant|token|summar|serial|stabil|local"
# What to avoid, and what to write.
WORDS = {
    r"draws? of (?:the )?(?:samples?|layers?|blocks?)": "bootstrap resample",
    r"host waits?|waits? of the host|makes? the host wait": "synchronization, synchronize",
    r"same bits|the bits of|bits (?:are|as) (?:equal|those)": "bitwise identical",
    r"(?:stays?|left|runs?|ran|leaves?) as (?:it|they) (?:is|was|are|were)": "unchanged, without the kernels, ...",
    r"of the user's|of the users'": "user-defined",
    r"and (?:said|says so|say so)|, and said": "and reported, and recorded in ...",
    r"nobody": "the actor: no caller, no module, ...",
    r"likewise": "also, in the same way, or repeat the noun",
    r"so many|so often|so much": "the number, or up to this many",
    r"in vain": "the effect that is missing",
    r"whatever (?:else|the|is|it)": "any other, regardless of",
    r"(?:is|are) told apart|(?:is|are) told by": "distinguished, identified by",
    r"who (?:asks|names|wants|knows|gives)": "if you ...",
    r"(?:to|must|may|not) settle": "flush, converge, stabilize",
    r"twins?": "reference implementation, counterpart, copy",
    r"whole or not at all": "atomically",
    r"(?:scored|placed|runs?|read) all the same": "anyway, too",
    r"on offer": "available",
    r"riddles?": "the problem",
    r"in the way": "the obstacle",
    r"sees? to (?:it|that)": "ensures",
    r"(?:ought|are held) to": "should, is compared with",
    r"gives? (?:\w+ ){0,4}back\b": "restore, release",
    r"(?:lets?|letting) go of": "release",
    r"rides? on": "the pass it is part of",
    r"on (?:its|their|the) way\b": "while ..., as part of ...",
    r"the user's mistake|a user's mistake": "invalid input",
    # One spelling: British, with -ize as in the names of torch.
    rf"\w*(?:{_STEMS})is(?:e[ds]?|ing|ation)": "-ize: synchronize, normalize, recognize, ...",
    r"neighbors?|favors?|behaviors?|centered": "neighbour, favour, behaviour, centred",
}
_PATTERNS = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): remedy for pattern, remedy in WORDS.items()}
# A docstring of a function opens with an imperative verb; ruff's D401 knows verbs only.
_OPENINGS = re.compile(
    r"(?:The|An?|Whether|What|Which|How|Why|Where|When|Within|Who|All|Every|Each|One|Two|No|Nothing|Everything)\b|\[|`|\("
)
_FSTRING = re.compile(r"[rR]?[fF][rR]?[\"']")
Finding = tuple[int, str]


def tracked() -> list[Path]:
    """Return the tracked files that hold words."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    kinds = {".py", ".sh", *PAGES, *SOURCES}
    return [ROOT / name for name in names if Path(name).suffix in kinds or name == "Makefile"]


def prose_of_page(text: str) -> Iterator[Finding]:
    """Yield the lines of a page outside of code and generated tables."""
    code = generated = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            code = not code
        elif line.startswith("<!-- benchmark:"):
            generated = True
        elif line.startswith("<!-- /benchmark:"):
            generated = False
        elif not code and not generated and not line.startswith("    "):
            yield number, line


def prose_of_python(text: str) -> Iterator[Finding]:
    """Yield the lines of comments and strings, and the names of tests as words."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
            # Before Python 3.12 an f-string is one token, with its expressions.
            text_only = re.sub(r"\{[^{}\n]*\}", "{}", token.string) if _FSTRING.match(token.string) else token.string
            for offset, line in enumerate(text_only.splitlines()):
                yield token.start[0] + offset, line
        elif token.type == tokenize.NAME and token.string.startswith("test_"):
            yield token.start[0], token.string.replace("_", " ")


def prose_of_cpp(text: str) -> Iterator[Finding]:
    """Yield comments and strings, line by line."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in re.findall(r'//.*|"(?:[^"\\]|\\.)*"', line):
            yield number, found


def wrong_words(lines: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the words that have a replacement, also across a line break."""
    before = ""
    last = 0
    for number, line in lines:
        bare = line.strip().strip("#/* ").strip()
        joined = f"{before} {bare}" if number == last + 1 else bare
        start = len(joined) - len(bare)
        if IGNORE not in line:
            for pattern, remedy in _PATTERNS.items():
                for match in pattern.finditer(joined):
                    if match.end() > start:
                        yield number, f"`{match.group()}`: write {remedy}"
        before, last = " ".join(bare.split()[-4:]), number


def long_lines(lines: Iterator[Finding]) -> Iterator[Finding]:
    """Yield lines of prose over the width; a row of a table and a lone link cannot be broken."""
    for number, line in lines:
        if len(line) > WIDTH and not line.startswith("|") and " " in line.strip():
            yield number, f"{len(line)} columns, at most {WIDTH}"


def openings(text: str) -> Iterator[Finding]:
    """Yield docstrings of functions that do not open with a verb."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
            docstring = ast.get_docstring(node)
            if docstring and not names & {"property", "cached_property", "fixture"} and _OPENINGS.match(docstring):
                yield node.lineno, f"docstring opens with `{docstring.split()[0]}`: open with an imperative verb"


def check(path: Path, name: str) -> list[Finding]:
    """Return the findings of a file, whose `name` is relative to the repository."""
    text = path.read_text(encoding="utf-8")
    found: list[Finding] = []
    if path.suffix in PAGES:
        found += wrong_words(prose_of_page(text))
        if path.suffix == ".md":
            found += long_lines(prose_of_page(text))
    elif path.suffix == ".py":
        found += wrong_words(prose_of_python(text))
        if name.startswith(("plop_ext/", "scripts/")):
            found += openings(text)
    elif path.suffix in SOURCES:
        found += wrong_words(prose_of_cpp(text))
    else:
        found += wrong_words(iter(enumerate(text.splitlines(), 1)))
    return sorted(found)


def main(arguments: list[str]) -> int:
    """Print the findings of the named files, or of all, and return 1 if there are any."""
    count = 0
    for path in [Path(argument).resolve() for argument in arguments] or tracked():
        name = str(path.relative_to(ROOT))
        if name not in EXEMPT:
            for line, text in check(path, name):
                print(f"{name}:{line}: {text}")
                count += 1
    if count:
        print(f"{count} findings", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
