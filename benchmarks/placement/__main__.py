"""The experiment, stage by stage: python -m benchmarks.placement STAGE --work FOLDER

    corpus    read Python sources and documentation of this machine, train the tokenizer
    pretrain  train the decoders
    score     take every candidate score, and ask PEFT's selectors
    grid      finetune every placement at its own learning rate
    full      finetune all parameters
    stability score under other samples, lengths, forms and after finetuning
    publish   write what the journal holds to result files
    analyse   what predicts the order, from the result files alone
    report    tables of the page and the plot, from the analysis

A stage that was stopped, by `--budget-seconds` or otherwise, goes on where it was. It ends with status 3 if it ran out
of time, so that a shell script can go on calling it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.placement import analyse, publish, report, stages
from benchmarks.placement.journal import Deadline, Journal
from benchmarks.placement.placements import PROTOCOLS
from benchmarks.placement.settings import SMOKE, Settings
from benchmarks.placement.tasks import TASKS, TRIED

OUT_OF_TIME = 3
RESULTS = Path(__file__).parent / "results"
STAGES = ("corpus", "pretrain", "score", "grid", "full", "stability", "publish", "analyse", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("placement-work"), help="folder of corpus, weights, journal")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=report.PAGE, help="the page that `report` brings up to date")
    parser.add_argument("--models", type=_words, help="names, separated by commas; default: all")
    parser.add_argument("--tasks", type=_words, default=list(TASKS), help="names; default: the protocol's")
    parser.add_argument("--protocols", type=_words, default=list(PROTOCOLS), help="one-rank, matched; default: both")
    parser.add_argument("--only", type=_words, default=[], help="keys of placements, or triples; default: all")
    parser.add_argument("--search-seeds", type=int, help="seeds that choose the learning rates; default: all")
    parser.add_argument("--budget-seconds", type=float, help="start nothing that would end later than this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run? Figures mean nothing")
    parser.add_argument("--no-compile", action="store_true", help="run the blocks as they are")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    settings = SMOKE if args.smoke else Settings(compile=not args.no_compile)
    if args.search_seeds is not None:
        settings = dataclasses.replace(settings, search_seeds=args.search_seeds)
    models = args.models or list(settings.models)
    for name, given, known in (
        ("models", models, settings.models),
        ("tasks", args.tasks, {**TASKS, **TRIED}),
        ("protocols", args.protocols, PROTOCOLS),
    ):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"--{name}: {', '.join(unknown)} is not one of {', '.join(known)}")
    if args.stage == "analyse":
        analyse.main(args.results)
        return 0
    if args.stage == "report":
        report.main(args.results, args.page)
        return 0
    if args.stage == "publish":
        publish.main(args.work, args.results, settings, models, args.smoke)
        return 0
    device = torch.device(args.device)
    work = stages.Workspace(args.work, settings, device, Deadline(args.budget_seconds), _environment(args, argv))
    torch.set_float32_matmul_precision("high")
    if settings.compile:
        torch._dynamo.config.recompile_limit = 64  # a program for each width of ranks
    finished = {
        "corpus": lambda: stages.make_corpus(work),
        "pretrain": lambda: stages.make_models(work, models),
        "score": lambda: stages.make_scores(work, models, args.tasks),
        "grid": lambda: stages.make_grid(work, models, args.tasks, args.protocols, args.only),
        "full": lambda: stages.make_full(work, models, args.tasks),
        "stability": lambda: stages.make_stability(work, models, args.tasks),
    }[args.stage]()
    print(f"{args.stage}: {'complete' if finished else 'out of time'}")
    return 0 if finished else OUT_OF_TIME


def _environment(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Record hardware, versions and command; the number of the record."""
    journal = Journal(args.work / "journal.jsonl")
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "benchmarks.placement", *words]).replace(str(args.work), args.work.name)
    number = len(journal.read("environment"))
    described = environment.describe(torch.device(args.device), command)
    journal.append([{"kind": "environment", "number": number, **described}])
    return number


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    sys.exit(main())
