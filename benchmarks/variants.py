"""The forwards that `benchmarks.model_forward` compares: each is set up once per case and then timed in rounds.

Those that change the model they run on (compiled code, hooks that stay, a captured graph) run on a copy that shares
the weights, so that all of them exist side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import compiled, overhead
from benchmarks.overhead import BEST, FAST, OURS, PLAIN, USUAL, Case
from benchmarks.timing import Candidate, captured
from plop_ext.forwards.protocol import Forwards
from plop_ext.layers import discover

SAMPLED = f"{OURS}, token_step=8"
COMPILED = f"{PLAIN}, compiled"
BEST_COMPILED = f"{BEST}, compiled"
OURS_COMPILED = f"{OURS}, compiled"
COMPILED_WHOLE = f"{PLAIN}, compiled as a whole"
BEST_WHOLE = f"{BEST}, compiled as a whole"
PLAIN_GRAPH = f"{PLAIN}, CUDA graph"
FAST_GRAPH = f"{OURS} fast, CUDA graph"


@dataclass(frozen=True)
class Ready:
    """A forward that can be timed.

    Attributes:
        candidate: What is timed.
        note: What the table says beside it, asked after its last run.
    """

    candidate: Candidate
    note: Callable[[], str] = str


@dataclass(frozen=True)
class Variant:
    """A forward and what it takes to set it up.

    Attributes:
        name: Its name in the result.
        start: Sets it up; what it yields is ready for its first run.
        reads: The key of `roofline.scoring_bytes` it reads at least; None reads nothing.
        share: The part of those bytes that it reads.
        graph: Whether it keeps a CUDA graph's memory.
    """

    name: str
    start: Callable[[Case], AbstractContextManager[Ready]]
    reads: str | None = None
    share: float = 1.0
    graph: bool = False


def _plain(case: Case) -> AbstractContextManager[Ready]:
    return nullcontext(Ready(Candidate(PLAIN, lambda _: case.forward())))


@contextmanager
def _hooks(name: str, case: Case) -> Iterator[Ready]:
    """One of the candidates of the other benchmarks, with hooks that stay, as in a run over many batches."""
    found = {candidate.name: candidate for candidate in overhead.hook_candidates(_shared_copy(case))}
    with found[name].attach() as attached:
        yield Ready(Candidate(name, lambda _: found[name].run(attached)))


def _shared_copy(case: Case) -> Case:
    model = compiled.shared_copy(case.model)
    return replace(case, model=model, layers=discover(model).layers)


@contextmanager
def _compiled_plain(name: str, whole: bool, case: Case) -> Iterator[Ready]:
    yield _compiled(name, _shared_copy(case), whole, lambda: None)


@contextmanager
def _compiled_hooks(name: str, whole: bool, native: bool, case: Case) -> Iterator[Ready]:
    copied = _shared_copy(case)
    ids = case.input_ids
    hooks = compiled.StaticHooks(copied.hookable, copied.forward, ids.numel(), ids.device, native=native)
    yield _compiled(name, copied, whole, hooks.end)


def _compiled(name: str, copied: Case, whole: bool, end: Callable[[], None]) -> Ready:
    compiler = compiled.Compiler()
    (compiler.whole if whole else compiler.blocks)(copied.model)

    def run(_: object) -> None:
        with compiled.eager_masks() if whole else nullcontext():
            copied.forward()
        end()

    return Ready(Candidate(name, run), lambda: f"{compiler.graphs} graph{'s' * (compiler.graphs != 1)} compiled")


@contextmanager
def _fast(case: Case) -> Iterator[Ready]:
    copied = _shared_copy(case)
    with overhead.scoring(copied, fast=True) as (run, forwards):
        yield Ready(Candidate(FAST, lambda _: run()), lambda: _blocks(forwards, copied))


@contextmanager
def _fast_graph(case: Case) -> Iterator[Ready]:
    _require_cuda(case)
    copied = _shared_copy(case)
    with overhead.scoring(copied, fast=True, graph=True) as (run, forwards):
        for _ in range(3):  # the second batch of a kind is captured, unless the first filled a cache
            if not forwards.report()["graph"]["replayed"]:
                run()
        report = forwards.report()["graph"]
        if not report["replayed"]:
            raise RuntimeError(report["reason"])
        yield Ready(Candidate(FAST_GRAPH, lambda _: run()), lambda: _blocks(forwards, copied))


def _blocks(forwards: Forwards, copied: Case) -> str:
    report = forwards.report()["fast"]
    text = f"{report['blocks']} of {len(copied.model.layers)} blocks on the fast path"  # type: ignore[arg-type]
    return f"{text}: {report['reason']}" if report["reason"] else text


@contextmanager
def _plain_graph(case: Case) -> Iterator[Ready]:
    _require_cuda(case)
    ids = case.input_ids.clone()
    static = replace(case, input_ids=ids)
    with compiled.eager_masks():
        replay = captured(static.forward)

    def run(_: object) -> None:
        ids.copy_(case.input_ids)
        replay()

    yield Ready(Candidate(PLAIN_GRAPH, run))


def _require_cuda(case: Case) -> None:
    if case.input_ids.device.type != "cuda":
        raise RuntimeError("needs a CUDA device")


BASE = Variant(PLAIN, _plain)
VARIANTS = (
    BASE,
    Variant(COMPILED, partial(_compiled_plain, COMPILED, False)),
    Variant(USUAL, partial(_hooks, USUAL), "per_module"),
    Variant(BEST, partial(_hooks, BEST), "shared"),
    Variant(BEST_COMPILED, partial(_compiled_hooks, BEST_COMPILED, False, False), "fast"),
    Variant(OURS, partial(_hooks, OURS), "shared"),
    Variant(SAMPLED, partial(_hooks, SAMPLED), "shared", 1 / 8),
    Variant(OURS_COMPILED, partial(_compiled_hooks, OURS_COMPILED, False, True), "fast"),
    Variant(FAST, _fast, "fast"),
    Variant(PLAIN_GRAPH, _plain_graph, graph=True),
    Variant(FAST_GRAPH, _fast_graph, "fast", graph=True),
)
WHOLE = (
    Variant(COMPILED_WHOLE, partial(_compiled_plain, COMPILED_WHOLE, True)),
    Variant(BEST_WHOLE, partial(_compiled_hooks, BEST_WHOLE, True, False), "fast"),
)
