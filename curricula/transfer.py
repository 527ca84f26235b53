"""The transfer matrix as it is stored: raw rows only, checked at the border. Everything derived is derived elsewhere.

`effects` turns the probes into T[j -> i] with intervals, `forgetting` turns a run's stages into BWT and its kin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyphony.curricula.items import Half, on_half
from polyphony.curricula.records import Evaluation, Kind
from polyphony.curricula.transfer_format import check_matrix, read_document, read_row

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferMatrix:
    """What every domain's held-out set said before and after training on each domain.

    Example: `TransferMatrix.load("probe/transfer.json").on("steer").probes`
    """

    domains: tuple[str, ...]
    kinds: Mapping[str, Kind]
    rows: tuple[Evaluation, ...]
    """Baseline (`trained` empty), probes and joint arm (`probe`), and moments of a run, in the order of the file."""
    items: Mapping[str, tuple[str, ...]] | None = None
    """Ids of the held-out items in the scores' order; None where the file has none, then both halves are all items."""
    watch_only: tuple[str, ...] = ()
    """Domains that are measured and never trained: they need no probe and have no place in an order."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, hashes of base and data, settings of the probe: kept, never interpreted."""

    def __post_init__(self) -> None:
        check_matrix(self)

    @classmethod
    def load(cls, path: str | Path) -> TransferMatrix:
        """Read `transfer.json`. Raises ValueError that names the file, the row and the value where it is not valid."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TransferMatrix:
        """Build from the document that `transfer_format` describes."""
        document = read_document(document)
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']!r} of the transfer file is not supported, only {VERSION}")
        items = document.get("items")
        return cls(
            domains=tuple(document["domains"]),
            kinds=dict(document["kinds"]),
            rows=tuple(read_row(row, where=f"row {n}") for n, row in enumerate(document["rows"])),
            items=None if items is None else {name: tuple(map(str, ids)) for name, ids in items.items()},
            watch_only=tuple(document.get("watch_only", ())),
            provenance=dict(document.get("provenance", {})),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        document: dict[str, Any] = {
            "version": VERSION,
            "domains": list(self.domains),
            "kinds": dict(self.kinds),
            "rows": [row.as_row() for row in self.rows],
        }
        if self.items is not None:
            document["items"] = {name: list(ids) for name, ids in self.items.items()}
        if self.watch_only:
            document["watch_only"] = list(self.watch_only)
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        return document

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all: a killed process leaves the previous version in place."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(self.as_json(), allow_nan=False))
        scratch.replace(path)

    def on(self, which: Half) -> TransferMatrix:
        """Return the matrix over one half of the items, or itself where the file names no items."""
        if self.items is None:
            return self
        return replace(self, rows=tuple(on_half(row, self.items, which) for row in self.rows), items=None)

    def with_row(self, row: Evaluation) -> TransferMatrix:
        """Return the matrix with one more row, checked against the others."""
        return replace(self, rows=(*self.rows, row))

    @property
    def trainable(self) -> tuple[str, ...]:
        """The domains that an order is made of."""
        return tuple(name for name in self.domains if name not in self.watch_only)

    @property
    def probes(self) -> tuple[Evaluation, ...]:
        """Rows trained on one domain alone from the probe's start."""
        return tuple(row for row in self.rows if row.probe and len(row.trained) == 1)

    @property
    def joint_arm(self) -> tuple[Evaluation, ...]:
        """Rows trained on all domains at once, for the same total number of steps."""
        return tuple(row for row in self.rows if row.probe and len(row.trained) > 1)

    def baselines(self, *, probe: bool) -> tuple[Evaluation, ...]:
        """Return the baseline rows of the probes or of the run; all of them where the file makes no difference.

        They differ when probes start from a warmed policy and the run starts from the base.
        """
        rows = tuple(row for row in self.rows if not row.trained)
        return tuple(row for row in rows if row.probe == probe) or rows

    def runs(self) -> Iterator[tuple[Evaluation, ...]]:
        """Yield each seed's run: its baseline, then its rows in order of step. Nothing where the file has no run."""
        moments = [row for row in self.rows if row.trained and not row.probe]
        for seed in sorted({row.seed for row in moments}):
            baselines = self.baselines(probe=False)
            own = [row for row in baselines if row.seed == seed]
            yield (own or list(baselines))[0], *sorted((r for r in moments if r.seed == seed), key=lambda r: r.step)
