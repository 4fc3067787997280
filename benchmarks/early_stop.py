"""Does the early stop choose what all the data would? The embedded model on its task, many random orders of the data.

python -m benchmarks.early_stop --output benchmarks/results/early_stop.json

For each seed, 512 samples are drawn from the task and scored in full. Then `plop_ext.score(..., stop="settled")` runs
on the same 512, in the order of that seed, and ends when it wants to. The full runs share their forwards: a sample's
totals do not depend on what else is scored, so each of the samples of the task is scored once.

Types are watched at every k, not only at the default 3: the cut after 4 runs through two types 1.6 % apart, which is
as close as the rule will meet.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

import plop_ext
from benchmarks import results
from plop_ext.data import Encoded, batches, encode, load_rows
from plop_ext.models import load_model
from plop_ext.scores import Scores
from plop_ext.statistics import GainTable, StopRule


def drawn(pool: Scores, chosen: Sequence[int]) -> GainTable:
    """Return the table of a full run over some samples of the pool."""
    place = {sample: position for position, sample in enumerate(pool.sample_ids.tolist())}
    columns = [place[sample] for sample in chosen]
    table = pool.table
    return GainTable.make(
        table.sum_gain[:, columns],
        table.tokens[:, columns],
        table.baseline,
        table.out_features,
        [module.type for module in pool.modules],
        [module.layer for module in pool.modules],
    )


def chosen_set(table: GainTable, rule: StopRule) -> set[Any]:
    """Return the types, or the modules, that would get LoRA."""
    if rule.modules is None:
        return set(table.types[: rule.types])
    nfn = table.module_nfn(np.ones((1, table.samples)))[0]
    return set(nfn.argsort(kind="stable")[: int(rule.modules)].tolist())


def trial(model: Any, encoded: Sequence[Encoded], pad: int, rule: StopRule, batch: int, seed: int) -> Scores:
    """Return one early-stopped run over `encoded`."""
    data = batches(encoded, batch_size=batch, pad_token_id=pad)
    return plop_ext.score(model, data, max_samples=None, stop=rule, seed=seed, progress=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__, device="cpu")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512, help="of a full run")
    parser.add_argument("--pool", type=int, default=4096, help="samples of the task that the full runs are drawn from")
    args = results.parse(parser, argv)
    if args.quick:
        args.seeds, args.samples, args.pool = 1, 24, 32
    model, tokenizer = load_model("plop-tiny", device=args.device)
    pad = tokenizer.pad_token_id
    encoded = encode(load_rows("arithmetic", max_samples=args.pool), tokenizer)
    pool = plop_ext.score(model, batches(encoded, batch_size=64, pad_token_id=pad), max_samples=None)
    cases = [(StopRule(types=k), 8) for k in range(1, len(pool.types))]
    cases += [(StopRule(), 1), (StopRule(), 4), (StopRule(modules=14), 8)]
    if args.quick:
        cases = [(StopRule(), 8), (StopRule(modules=14), 8)]
    rows = []
    for rule, batch in cases:
        same, used, settled = 0, [], 0
        for seed in range(args.seeds):
            chosen = random.Random(seed).sample(range(len(encoded)), args.samples)
            full = chosen_set(drawn(pool, [encoded[i]["row"] for i in chosen]), rule)
            early = trial(model, [encoded[i] for i in chosen], pad, rule, batch, seed)
            same += chosen_set(early.table, rule) == full
            settled += early.provenance["stop"]["settled"]
            used.append(len(early.sample_ids))
        rows.append(
            {
                "watched": f"{rule.types} types" if rule.modules is None else f"{rule.modules} modules",
                "batch": batch,
                "seeds": args.seeds,
                "same": same,
                "settled": settled,
                "samples_median": float(np.median(used)),
                "samples_max": max(used),
                "share_max": round(max(used) / args.samples, 4),
            }
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    settings = {"model": "plop-tiny", "data": "arithmetic", "samples": args.samples, "pool": len(encoded)}
    results.save(args, "early_stop", rows, **settings)


if __name__ == "__main__":
    main()
