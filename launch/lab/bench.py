"""`python -m polyphony.launch.lab.bench [name ...]`: what the house costs, each figure beside its baseline.

A benchmark is a function without arguments that returns Results, listed by name in the dict `BENCHMARKS` of a module
`launch/lab/bench_<noun>.py`. A missed target is a finding, not a failure: the exit code stays 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence

from polyphony.launch import lab
from polyphony.launch.cli import set_environment
from polyphony.launch.lab.bench_result import Result, table

Benchmark = Callable[[], Sequence[Result]]

ON_REQUEST = ("demo", "worth", "gpu")
"""Minutes long: measured only when named or asked for by their own option."""
RECORD = "bench_result"
"""What benchmarks return; measures nothing itself."""


def find_benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark of the modules beside this one. Raises ValueError for a module that lists none."""
    names = [m.name for m in pkgutil.iter_modules(lab.__path__) if m.name.startswith("bench_")]
    found: dict[str, Benchmark] = {}
    for name in sorted(set(names) - {RECORD}):
        module = importlib.import_module(f"polyphony.launch.lab.{name}")
        if not hasattr(module, "BENCHMARKS"):
            raise ValueError(f"launch/lab/{name}.py lists no BENCHMARKS, a dict of name to function")
        found |= module.BENCHMARKS
    return found


def choose(benchmarks: Mapping[str, Benchmark], names: Sequence[str], *, demo: bool) -> list[str]:
    """Return the names to run, in order. Raises ValueError for an unknown one."""
    if unknown := [name for name in names if name not in benchmarks]:
        raise ValueError(f"benchmark {unknown[0]!r} does not exist; known: {', '.join(benchmarks)}")
    chosen = list(names) or [name for name in benchmarks if name not in ON_REQUEST]
    return [*chosen, "demo"] if demo and "demo" not in chosen else chosen


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
    results: list[Result] = []
    for name in chosen:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        results += benchmarks[name]()
    print(json.dumps({"results": [r.as_dict() for r in results]}) if arguments.json else table(results))
    if not arguments.names and (left := [name for name in ON_REQUEST if name in benchmarks and name not in chosen]):
        print(f"left out, name them to measure them too: {', '.join(left)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
