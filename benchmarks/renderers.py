"""The table of each result file."""

from __future__ import annotations

import math
from typing import Any

from benchmarks import renderers_fast, renderers_files, renderers_first
from benchmarks.markdown import Result, spread, table


def kernel_bandwidth(result: Result) -> str:
    """Tabulate one row per dtype, input and way of launching; GB/s of each candidate and its share of the copy."""
    names = list(dict.fromkeys(row["candidate"] for row in result["rows"]))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in result["rows"]:
        key = (row["dtype"], f"[{row['rows']}, {row['features']}]", f"{row['mib']:g}", row["launch"])
        text = f"{row['gb_per_s']:.0f}"
        cells.setdefault(key, {})[row["candidate"]] = (
            text if row["candidate"] == "copy" else f"{text} ({row['of_copy']:.2f})"
        )
    header = ["dtype", "input", "MiB", "launch", *(f"{name}, GB/s" if name == "copy" else name for name in names)]
    return table(header, [[*key, *(values[name] for name in names)] for key, values in cells.items()])


def overhead(result: Result) -> str:
    """Tabulate one row per candidate."""
    settings = result["settings"]
    rows = []
    for row in result["rows"]:
        memory = row["extra_peak_mib"]
        rows.append(
            [
                row["candidate"],
                f"{row['ms']:.1f}",
                spread(row, "ratio"),
                "" if memory is None else f"{memory:+.1f}",
                str(row["rounds"]),
            ]
        )
    header = ["candidate", "ms", "x plain forward, median (p20-p80)", "extra peak memory, MiB", "rounds"]
    if all(row["extra_peak_mib"] is None for row in result["rows"]):
        header.pop(3)
        for line in rows:
            line.pop(3)
    depth = f", {settings['layers']} layers" if "layers" in settings else ""
    facts = [f"{settings['shape']}{depth}, {settings['batch']} x {settings['tokens']} tokens, {settings['dtype']}"]
    if "ratio_by_bytes" in settings:
        facts.append(
            f"reading the activations once more at the speed of a copy ({settings['copy_gb_per_s']:.0f} GB/s) would "
            f"be x {settings['ratio_by_bytes']:.3f}"
        )
    facts.append(f"the weight norms take {settings['weight_norms_ms']:.1f} ms once per run")
    if settings.get("synchronizations"):
        waits = [f"{name} {count}" for name, count in settings["synchronizations"].items()]
        facts.append(f"synchronizations in one forward: {', '.join(waits)}")
    if settings.get("fast_reason"):
        facts.append(f"fast path: {settings['fast_reason']}")
    published = [row["times_plop_ext"] for row in result["rows"] if "times_plop_ext" in row]
    if published:
        facts.append(f"the published script takes {published[0]:.1f} times as long as plop_ext")
    return "; ".join(facts) + ".\n\n" + table(header, rows)


def accuracy(result: Result) -> str:
    """Models, then biases."""
    models, biases = [], []
    for row in result["rows"]:
        if "max_relative_error" in row:
            case = row["case"] + (f" x {row['bias_ratio']}" if "bias_ratio" in row else "")
            predicted = f"{row['predicted']:.1e}" if "predicted" in row else ""
            models.append(
                [
                    case,
                    row["dtype"],
                    str(row["modules"]),
                    f"{row['max_relative_error']:.1e}",
                    f"{row['mean_relative_error']:+.1e}",
                    predicted,
                ]
            )
        else:
            biases.append(
                [
                    f"{row['bias_ratio']}",
                    row["dtype"],
                    f"{row['relative_error']:+.1e}",
                    f"{row['predicted']:.1e}",
                    f"{row['predicted_from_spacing']:.1e}",
                ]
            )
    header = ["model", "dtype", "modules", "largest relative error", "mean relative error", "predicted mean"]
    bias_header = ["bias norm / feature norm", "dtype", "relative error of the gain", "predicted", "from the grid"]
    return table(header, models) + "\n\n" + table(bias_header, biases)


def early_stop(result: Result) -> str:
    """Tabulate one row per watched set and batch size."""
    settings = result["settings"]
    rows = [
        [
            row["watched"],
            str(row["batch"]),
            f"{row['same']} of {row['seeds']}",
            f"{row['settled']} of {row['seeds']}",
            f"{row['samples_median']:g}",
            f"{row['samples_max']} ({row['share_max']:.1%})",
        ]
        for row in result["rows"]
    ]
    header = ["lowest", "batch", f"same as all {settings['samples']} samples", "settled", "samples, median", "most"]
    where = f"{settings['model']} on {settings['data']}, one random order of the data per seed."
    return f"{where}\n\n{table(header, rows)}"


def time_to_placement(result: Result) -> str:
    """Tabulate one row per candidate and batch size."""
    settings = result["settings"]
    rows = []
    for row in result["rows"]:
        spread = f" ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})" if "ms_p20" in row else ""
        name = row["candidate"]
        if row.get("extrapolated"):
            name += f", extrapolated from {row['measured_samples']} samples"
        rows.append(
            [
                name,
                str(row["batch"]),
                f"{row['samples']} x {settings['tokens']}",
                f"{row['ms']:.1f}{spread}",
                f"{row['first_run_ms']:.1f}" if "first_run_ms" in row else "",
                f"{row['times_faster']:.0f} x" if "times_faster" in row else "1 x",
            ]
        )
    header = ["candidate", "batch", "samples x tokens read", "ms, median (p20-p80)", "first run, ms", "faster"]
    facts = (
        f"{settings['shape']}, {settings['dtype']}, {settings['modules']} modules, {settings['samples']} samples of "
        f"{settings['tokens']} tokens available; of plop_ext's time, {settings['weight_norms_ms']:.1f} ms are the "
        "weight norms.\n\n"
    )
    return facts + table(header, rows)


def streaming(result: Result) -> str:
    """Tabulate one row per case: limits of a streamed run, the run, its rivals; or runs under a memory limit."""
    settings, rows = result["settings"], []
    facts = [
        f"{settings['shape']}, {settings['checkpoint_bytes'] / 1e9:.1f} GB of weights",
        f"{settings['samples']} x {settings['tokens']} tokens in batches of {settings['batch']}",
    ]
    if "limit" in settings:
        facts.append(f"limit {settings['limit'] / 2**30:.2f} GiB ({settings['enforced_by']})")
        facts.append(f"streamed with a memory budget of {settings['memory_budget'] / 2**30:.2f} GiB")
        same = "scores bitwise identical to those in memory"
        facts.append(same if settings["bitwise_identical"] else "**the scores differ**")
        facts.append("in memory the weights are a map of the files, of which the kernel drops and reads pages again")
        for row in result["rows"]:
            peak = f"{row['peak_rss'] / 2**30:.2f}" if "peak_rss" in row else ""
            ended = {0: "completed", -9: "killed by the kernel"}.get(row["exit_status"], f"exit {row['exit_status']}")
            rows.append([row["case"], ended, f"{row['seconds']:.1f}", peak])
        return "; ".join(facts) + ".\n\n" + table(["case", "ended", "s, with start-up", "peak RAM, GiB"], rows)
    facts.append(f"largest block {settings['block_bytes'] / 2**30:.2f} GiB")
    facts.append(
        f"{settings['bytes_read'] / 1e9:.1f} GB read, the page cache of the files dropped before the disk's floor and "
        "before the streamed run"
    )
    if settings["peak_device"] is not None:
        over = settings["peak_over_two_blocks"] / 2**30
        facts.append(f"peak GPU memory {settings['peak_device'] / 2**30:.2f} GiB, two blocks and {over:.2f} GiB")
    facts.append(f"peak RAM {settings['peak_rss'] / 2**30:.2f} GiB")
    for row in result["rows"]:
        note = ""
        if "batches_run" in row:
            ran = f"{row['batches_run']} run, {row['batch_seconds']:.2f} s each"
            if row["batches_run"] < row.get("batches", math.inf):
                ran += ", the rest worked out from them"
            peak = f" with {row['peak_device'] / 2**30:.1f} GiB of GPU memory" if row.get("peak_device") else ""
            parts = [
                f"batches of {row.get('batch', settings['batch'])}{peak}",
                ran,
                f"loading {row['load_seconds']:.1f} s, weight norms {row['norms_seconds']:.1f} s",
                f"scores differ by {row['difference']:.1e} at most",
            ]
            note = "; ".join(parts)
        rows.append(
            [row["case"], f"{row['seconds']:.1f}", f"{row['of_floor']:.2f}", f"{row['times_streamed']:.1f}", note]
        )
    header = ["case", "s", "x the slowest alone", "x streamed", "note"]
    plans = [
        [
            plan["shape"],
            f"{plan['blocks']}",
            f"{plan['block'] / 2**30:.2f}",
            f"{plan['device_least'] / 2**30:.1f}",
            f"{plan['read'] / 1e9:.0f}",
            *(f"{plan['seconds'].get(part, 0):.0f}" for part in ("disk", "copy to device", "compute")),
        ]
        for plan in settings["plans"]
    ]
    plan_header = ["plan", "blocks", "block, GiB", "least device memory, GiB", "GB read"]
    plan_header += ["disk alone, s", "copy alone, s", "compute alone, s"]
    text = "; ".join(facts) + ".\n\n" + table(header, rows)
    return text + "\n\nPlans by the rates of this machine, for the same batches:\n\n" + table(plan_header, plans)


def host_cost(result: Result) -> str:
    """Return the table of the host's time per module, one column per part of a run."""
    rows = result["rows"]
    names = [name for name in rows[0] if name not in ("kind", "modules")]
    lines = [[row["kind"], f"{row['modules']:,}", *(f"{row[name]:.1f}" for name in names)] for row in rows]
    text = f"CPU time in microseconds per matrix, with {result['settings']['samples']} samples."
    return text + "\n\n" + table(["model of", "matrices", *names], lines)


def training_overhead(result: Result) -> str:
    """Return the table of steps of a training, one row per candidate."""
    settings = result["settings"]
    rows = [
        [row["candidate"], f"{row['ms']:.1f}", spread(row, "ratio"), f"{row['extra_peak_mib']:+.1f}"]
        if row["extra_peak_mib"] is not None
        else [row["candidate"], f"{row['ms']:.1f}", spread(row, "ratio"), ""]
        for row in result["rows"]
    ]
    header = ["step", "ms", "x plain step, median (p20-p80)", "extra peak memory, MiB"]
    text = (
        f"{settings['shape']}, {settings['batch']} x {settings['tokens']} tokens, {settings['dtype']}, LoRA of rank "
        f"16 on {', '.join(settings['types'])}, gradient checkpointing; losses equal bit by bit."
    )
    return text + "\n\n" + table(header, rows)


def adapter_cost(result: Result) -> str:
    """Return the table of adapters, one row per placement and rank."""
    settings = result["settings"]
    rows = [
        [
            row["placement"],
            str(row["rank"]),
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['ms']:.1f}",
            spread(row, "ratio"),
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["placement", "rank", "parameters, M", "step, ms", "x all-linear, median (p20-p80)", "peak memory, GiB"]
    text = (
        f"{settings['shape']}, {settings['batch']} x {settings['tokens']} tokens, {settings['dtype']}, AdamW, "
        f"{'with' if settings['checkpointing'] else 'without'} gradient checkpointing. The peak memory does not count "
        "the weights of the base model."
    )
    return text + "\n\n" + table(header, rows)


def scaling(result: Result) -> str:
    """Return the table of several GPUs, one row per way and number of ranks."""
    settings = result["settings"]
    one = {row["way"]: row["samples_per_s"] for row in result["rows"] if row["ranks"] == 1}
    rows = []
    for row in result["rows"]:
        if row["refused"] is not None:
            rows.append([row["way"], str(row["ranks"]), "refused", "", ""])
            continue
        alone = one.get(row["way"])
        rows.append(
            [
                row["way"],
                str(row["ranks"]),
                f"{row['samples_per_s']:.1f}",
                "" if alone is None else f"{row['samples_per_s'] / alone:.2f}",
                "" if row["overhead"] is None else f"{row['overhead']:.3f}",
            ]
        )
    text = (
        f"{settings['shape']}, {settings['batches']} batches of {settings['batch']} x {settings['tokens']} tokens, "
        f"{settings['dtype']}, median of {settings['rounds']} runs of `score` on a loaded model."
    )
    header = ["way", "GPUs", "samples/s", "x one GPU", "x the plain forwards of the same model"]
    return text + "\n\n" + table(header, rows)


RENDERERS = {
    "adapter_cost": adapter_cost,
    "early_stop": early_stop,
    "time_to_placement": time_to_placement,
    "kernel_bandwidth": kernel_bandwidth,
    "scaling": scaling,
    "scoring_overhead": overhead,
    "cpu_overhead": overhead,
    "moe_overhead": overhead,
    "host_cost": host_cost,
    "accuracy": accuracy,
    "streaming": streaming,
    "training_overhead": training_overhead,
    **renderers_fast.RENDERERS,
    **renderers_files.RENDERERS,
    **renderers_first.RENDERERS,
}
