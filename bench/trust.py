"""python -m bench trust: what it costs per forward to see that nothing was replaced of what fused forwards bypass.

Exit status 1 where the token costs more than 3 µs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from fastlora.modules import trust

LIMIT = 3.0


def microseconds(function: Callable[[], object], rounds: int = 200, calls: int = 500) -> list[float]:
    """The time of one call, per round."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return times


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench trust", description=__doc__).parse_args(argv)
    times = microseconds(trust.token)
    low, *_, high = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    size = len(trust.BYPASSED)
    print(f"token of {size} functions, once per forward: {median:.2f} µs (p20 {low:.2f}, p80 {high:.2f})")
    if median > LIMIT:
        print(f"RED   more than {LIMIT} µs")
    return int(median > LIMIT)
