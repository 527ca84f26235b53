"""`polyphony report`: the HTML of one or more runs, or their summary numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def report(runs: Sequence[Path], *, out: Path | None, as_json: bool) -> None:
    """Write the report and print where it lies, or print the summary of each run as JSON."""
    from polyphony.trainer.report import summarise, write_report

    if as_json:
        summaries = {run.name: summarise(run) for run in runs}
        print(json.dumps(summaries[runs[0].name] if len(runs) == 1 else summaries))
        return
    path = out or runs[0] / "report.html"
    try:
        print(write_report(runs, path))
    except OSError as error:
        raise ValueError(f"report {path} cannot be written: {error.strerror}") from error
