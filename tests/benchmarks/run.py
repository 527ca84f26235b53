"""`python -m tests.benchmarks.run [name ...]`: what the house costs, each figure beside its baseline.

A benchmark is a function that returns Results, listed by name in the dict `BENCHMARKS` of a module in this folder. With
`short=True` it does as little as shows that it runs; the tests run it so. The table always comes: a benchmark that fails is
a line in it, its traceback is on standard error, and the exit code is 1. A missed target is a finding and leaves it at 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from polyphony.launch.cli import set_environment
from polyphony.launch.measures.result import Result, failed, table

Benchmark = Callable[..., Sequence[Result]]

MODULES = ("adapters", "books", "commands", "curricula", "distil", "episodes", "gpu", "merge", "monitor", "plan", "pool",
           "rewards", "rollouts", "training", "update", "workers")  # fmt: skip
"""Those that list benchmarks."""
ON_REQUEST = ("books", "demo", "episodes", "gpu", "merge")
"""Minutes long, or gigabytes: measured only when named or asked for by their own option."""


def find_benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark by name."""
    modules = [importlib.import_module(f"tests.benchmarks.{name}") for name in MODULES]
    return {name: benchmark for module in modules for name, benchmark in module.BENCHMARKS.items()}


def choose(benchmarks: Mapping[str, Benchmark], names: Sequence[str], *, demo: bool) -> list[str]:
    """Return the names to run, in order. Raises ValueError for an unknown one."""
    if unknown := [name for name in names if name not in benchmarks]:
        raise ValueError(f"benchmark {unknown[0]!r} does not exist; known: {', '.join(benchmarks)}")
    chosen = list(names) or [name for name in benchmarks if name not in ON_REQUEST]
    return [*chosen, "demo"] if demo and "demo" not in chosen else chosen


def measure(benchmarks: Mapping[str, Benchmark], names: Sequence[str]) -> list[Result]:
    """Return what these benchmarks gave; one that fails gives a line that says so, an interrupt ends with one."""
    results: list[Result] = []
    for name in names:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            results += benchmarks[name]()
        except KeyboardInterrupt as error:
            return [*results, failed(name, error)]
        except (Exception, SystemExit) as error:  # whatever it is, the others are measured all the same
            traceback.print_exc()
            results.append(failed(name, error))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks one after the other and print their table; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure what the house costs.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run (default: all but {', '.join(ON_REQUEST)})"
    )
    parser.add_argument("--demo", action="store_true", help="also time `polyphony demo`, which takes minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    set_environment()
    benchmarks = find_benchmarks()
    try:
        chosen = choose(benchmarks, arguments.names, demo=arguments.demo)
    except ValueError as error:
        parser.error(str(error))
    results = measure(benchmarks, chosen)
    print(json.dumps({"results": [r.as_dict() for r in results]}) if arguments.json else table(results))
    if not arguments.names and (left := [name for name in ON_REQUEST if name not in chosen]):
        print(f"left out, name them to measure them too: {', '.join(left)}", file=sys.stderr)
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
