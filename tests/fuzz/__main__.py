"""`python -m tests.fuzz`: fresh seeds, one seed again, or the corpus. See `tests.fuzz`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers of the tests

from .campaign import WORKERS, campaign, campaign_in_parts
from .corpus import keep, read_corpus
from .subjects import subjects


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="the first seed (default: a fresh one, which is printed)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="cases, one a seed (default: 1)")
    parser.add_argument("--only", action="append", default=[], choices=sorted(subjects()), help="a subject")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="end after so long")
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="long runs: counts by block; the same call goes on from it",
    )
    parser.add_argument("--corpus", action="store_true", help="the past findings too")
    parser.add_argument("--keep", metavar="NAME", help="add the case of --seed to the corpus under this name")
    args = parser.parse_args()
    if args.ledger and (args.seed is None or args.only):
        parser.error("--ledger needs --seed, and takes every subject")
    seed = int.from_bytes(os.urandom(5)) if args.seed is None else args.seed
    if args.keep:
        print(keep(seed, args.only, args.keep))
        return 0
    print(f"seeds from {seed}: python -m tests.fuzz --seed {seed} --count {args.count}", flush=True)
    bad = 0
    if args.corpus:
        began = time.monotonic()
        entries, findings = read_corpus()
        for finding in findings:
            print(f"corpus: {finding.detail}")
        print(
            f"{entries} past findings in {time.monotonic() - began:.0f} s: {len(findings)} are back",
            flush=True,
        )
        bad += len(findings)
    seeds = range(seed, seed + args.count)
    if args.ledger:
        outcome = campaign_in_parts(seeds, args.ledger, workers=args.workers)
    else:
        outcome = campaign(seeds, only=args.only, workers=args.workers, minutes=args.minutes)
    print(outcome.summary())
    return 1 if outcome.findings or bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
