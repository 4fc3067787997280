"""`plop score MODEL DATA`: measure NFN, print the table, write the scores."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import USUAL_LENGTH, check_whole
from plop_ext.cli import options, outputs, stream, summary
from plop_ext.cli.data_sets import each_data
from plop_ext.cli.inputs import InputsHash, check_same, say_finished
from plop_ext.cli.options import console
from plop_ext.cli.parallel import add_option as add_parallel
from plop_ext.cli.parallel import sizes
from plop_ext.cli.parsing import whole
from plop_ext.cli.result import Result
from plop_ext.errors import InputError
from plop_ext.files import save_or_rescue
from plop_ext.read_ahead import reading_ahead

if TYPE_CHECKING:
    from plop_ext.scores import Scores
    from plop_ext.statistics import StopRule

logger = logging.getLogger(__name__)

# Options for reading the data that the provenance records.
_DATA = ("columns", "split", "max_length", "batch_size", "pad_to_multiple_of")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="measure the NFN of every linear module on task data",
        examples=[
            "plop score plop-tiny arithmetic",
            "plop score MODEL data.jsonl -o scores.json --heatmap heatmap.png",
            "plop score MODEL data.jsonl -o scores.json --mask completion --samples 256",
            "plop score MODEL data.jsonl -o scores.json --stream --memory-budget 6GiB",
            "plop score MODEL code.jsonl maths.jsonl -o folder",
        ],
    )
    options.add_model(parser)
    options.add_data(parser, several=True)
    options.add_seed(parser)
    _add_outputs(parser)
    _add_extent(parser)
    _add_measurement(parser)
    _add_speed(parser)
    stream.add_options(parser)
    options.add_common(parser)
    parser.set_defaults(run=run, in_ranks=True, words={"types": "--settle-types", "modules": "--settle-modules"})


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("outputs")
    group.add_argument(
        "-o",
        "--output",
        default=None,
        metavar="FILE",
        help="write the scores as JSON; with several DATA, a folder for their files",
    )
    group.add_argument(
        "--heatmap", default=None, metavar="FILE", help="draw the NFN by layer and type (.png, .svg, .pdf)"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue a killed run with the same --output; a finished one is left"
    )
    options.add_force(group)


def _add_extent(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much data")
    group.add_argument(
        "--samples", type=whole, default=None, help="number of samples to score (default: the early stop decides)"
    )
    group.add_argument(
        "--stop",
        choices=("settled", "none"),
        default=None,
        help="settled (default without --samples): stop early, once the lowest types are stable under resampling; "
        "none: do not stop early",
    )
    group.add_argument(
        "--settle-types",
        type=whole,
        default=None,
        metavar="K",
        help="stop once the K lowest types are stable (default: 3)",
    )
    group.add_argument(
        "--settle-modules",
        type=whole,
        default=None,
        metavar="N",
        help="stop once the N lowest modules are stable instead",
    )
    group.add_argument("--token-step", type=whole, default=1, metavar="N", help="read every N-th token (default: 1)")


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--mask",
        choices=("attention", "completion"),
        default="attention",
        help="tokens that count: attention (default; all but padding) or completion (tokens with a label)",
    )
    group.add_argument(
        "--scope",
        choices=("language", "vision", "audio", "all"),
        default="language",
        help="part of a multimodal model: language (default), vision, audio or all",
    )
    group.add_argument(
        "--include",
        action="append",
        default=None,
        metavar="NAME",
        help="score only modules whose name ends with NAME, and let all of them compete for LoRA; repeatable",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="do not score modules whose name ends with NAME; repeatable",
    )
    group.add_argument(
        "--baseline",
        choices=("frobenius", "probe"),
        default="frobenius",
        help="gain on random inputs: frobenius (default; from the weight norm) or probe (sampled, as in the paper)",
    )
    group.add_argument(
        "--probes", type=whole, default=256, help="random inputs per module for --baseline probe (default: 256)"
    )
    group.add_argument(
        "--compat",
        choices=("paper-script",),
        default=None,
        help="paper-script: reproduce the numbers of the script published with the paper",
    )


def _add_speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument("--batch-size", type=whole, default=8, help="samples per forward (default: 8)")
    add_parallel(group)
    group.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run blocks of supported families on fused kernels (default: by model and device)",
    )
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay forwards as CUDA graphs (default: for short batches on a CUDA device)",
    )
    group.add_argument("--exact", action="store_true", help="give scores bitwise identical to those of eager hooks")
    group.add_argument(
        "--pad-to-multiple-of",
        type=whole,
        default=1,
        metavar="N",
        help="pad batches to a multiple of N tokens, because --graph needs batches of equal length (default: 1)",
    )


def run(args: argparse.Namespace) -> Result:
    stream.check(args)
    _check_numbers(args)
    _check_one_process(args)
    if args.resume and not args.output:
        raise InputError("`--resume` needs `--output`, the file of the run to continue")
    rule = _stop_rule(args)
    sizes(args.parallel, args.launch.size)
    jobs = each_data(args)
    load = cache(partial(options.load_model, jobs[0]))  # once for all DATA
    # A budget limits the RAM of the process, of which the buffers of these reads would be a part.
    with nullcontext() if args.memory_budget or args.dry_run else reading_ahead(args.model):
        if args.dry_run:
            return Result(stream.dry_run(jobs[0]))
        found = [_run(job, rule, load) for job in jobs]
    return found[0] if len(found) == 1 else Result({"scores": [result.content for result in found]})


def _run(args: argparse.Namespace, rule: StopRule | None, load: Callable[[], Any]) -> Result:
    """Score one data set, unless it was, with the model and tokenizer that `load` returns."""
    args.load = load
    inputs = InputsHash(args, "model", "data")
    before: list[Scores] = []

    def is_finished() -> bool:
        finished = _finished(args, inputs)
        _check_paths(args, finished is not None)
        before.extend([] if finished is None else [finished])
        return finished is not None

    if args.launch.on_first(is_finished):
        if not args.launch.first:
            return Result()
        say_finished(args.output)
        return _show(args, before[0])
    journal = outputs.beside(args.output, ".partial")
    scores = _scores(args, journal, rule, inputs.start if args.launch.first else lambda: None)
    if not args.launch.first:
        return Result()
    scores = replace(scores, provenance={**scores.provenance, "inputs": inputs.result()})
    if args.output:  # first, because later steps may fail and the scores are expensive
        save_or_rescue(partial(scores.save, overwrite=args.force), args.output)
        # A streamed run has its own state, and must not touch the journal of another run.
        if args.stream:
            stream.remove_state(args.output)
        elif journal is not None:
            journal.unlink(missing_ok=True)
    if args.stream:
        console.print(stream.peaks_line(scores.provenance["streaming"]), highlight=False)
    return _show(args, scores)


def _scores(
    args: argparse.Namespace, journal: Path | None, rule: StopRule | None, loaded: Callable[[], None]
) -> Scores:
    """Score in memory, or block by block: if `--stream` is given, or if the device is smaller than the model."""
    from plop_ext.models.sizes import DoesNotFit

    if not args.stream:
        try:
            return _score(args, journal, rule, loaded)
        except DoesNotFit as error:
            args.stream = True
            try:
                _check_one_process(args)
                stream.check(args)
                _stop_rule(args)
            except InputError:  # an option that needs the whole model
                raise error from None
            logger.warning("%s is larger than the memory of the device, and is scored block by block", args.model)
    return stream.score(args, loaded)


def _check_one_process(args: argparse.Namespace) -> None:
    """Refuse to stream in several processes."""
    if args.stream and args.launch.size > 1:
        raise InputError("`--stream` runs in one process; start plop without torchrun, or leave --stream out")


def _check_numbers(args: argparse.Namespace) -> None:
    """Check numbers and choices before the model is loaded."""
    from plop_ext.score_data.settings import NAMES, Settings

    check_whole(batch_size=args.batch_size, max_length=args.max_length)
    check_whole(most=max(USUAL_LENGTH, 2 * args.max_length), pad_to_multiple_of=args.pad_to_multiple_of)
    Settings(max_samples=args.samples, **{name: getattr(args, name) for name in NAMES if name != "max_samples"})


def _finished(args: argparse.Namespace, inputs: InputsHash) -> Scores | None:
    """Return the scores of an earlier, finished run with the same inputs that `--resume` asks for, or None."""
    from plop_ext.scores import Scores

    if not args.resume or args.force or not Path(args.output).is_file():
        return None
    scores = Scores.load(args.output)
    check_same(args.output, scores.provenance.get("inputs"), inputs.result())
    return scores


def _check_paths(args: argparse.Namespace, finished: bool) -> None:
    """Check the paths, of which a finished run leaves the scores as they are."""
    from plop_ext.report import plots

    written = {"--output": None if finished else args.output, "--heatmap": args.heatmap}
    traces: dict[str, Path | None] = {}
    if args.output is not None and not finished:
        traces["the journal of --output"] = outputs.beside(args.output, ".partial")
        traces["the state of --output"] = stream.state_folder(args.output)
    read = {"MODEL": args.model, "DATA": args.data, **({"--output": args.output} if finished else {})}
    outputs.check(read, written, traces=traces, force=args.force)
    if args.heatmap is not None:
        plots.picture_format(args.heatmap)


def _show(args: argparse.Namespace, scores: Scores) -> Result:
    """Print the scores, draw the heatmap if it is asked for, and return both for --json."""
    from plop_ext.report import plots, tables

    chosen = scores.types[: args.settle_types or 3] if scores.placeable else ()
    if options.shows_tables(args):
        console.print(tables.scores_table(scores, chosen=chosen))
        for line in tables.confidence_lines(scores):
            console.print(line, highlight=False)
    for line in tables.left_out_lines(scores):
        console.print(line, style="dim", highlight=False)
    if args.output:
        console.print(f"scores: {args.output}; next: plop place {args.output}", highlight=False)
    if args.heatmap:
        save_or_rescue(partial(plots.heatmap, scores, chosen=chosen), args.heatmap)
        console.print(f"heatmap: {args.heatmap}", highlight=False)
    return Result(summary.of_scores(scores, args.output) | {"heatmap": args.heatmap})


def _score(
    args: argparse.Namespace, journal: Path | None, rule: StopRule | None, loaded: Callable[[], None]
) -> Scores:
    """Load the model, call `loaded`, and score it."""
    from plop_ext.data import batches
    from plop_ext.scoring.extent import DEFAULT_SAMPLES
    from plop_ext.scoring.score import score

    model, tokenizer = args.load()
    loaded()
    encoded = options.load_data(args, tokenizer, args.samples or DEFAULT_SAMPLES, mask=args.mask)
    args.launch.wait()  # the processes load at unlike speeds
    return score(
        model,
        batches(
            encoded,
            batch_size=args.batch_size,
            pad_token_id=tokenizer.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
        ),
        max_samples=None,
        stop=rule,
        compat=args.compat,
        fast="auto" if args.fast is None else args.fast,
        graph="auto" if args.graph is None else args.graph,
        exact=args.exact,
        data_info={name: getattr(args, name) for name in _DATA},
        journal=journal,
        **options.scoring(args),
    )


def _stop_rule(args: argparse.Namespace) -> StopRule | None:
    """Return the stop rule of `--stop` and `--samples`, or None."""
    from plop_ext.statistics import StopRule

    watched = [name for name in ("settle_types", "settle_modules") if getattr(args, name) is not None]
    if len(watched) > 1:
        raise InputError("`--settle-types` and `--settle-modules` exclude each other; give one")
    by_default = args.stop is None and args.samples is None and args.compat is None
    if not args.stream and (args.stop == "settled" or by_default):
        return StopRule(types=args.settle_types, modules=args.settle_modules)
    if watched:
        option = f"--{watched[0].replace('_', '-')}"
        fix = f"leave {option} out" if args.stream or args.compat else f"add --stop settled, or leave {option} out"
        raise InputError(f"`{option}` configures the early stop, and this run has none; {fix}")
    return None
