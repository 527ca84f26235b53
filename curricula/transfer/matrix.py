"""The transfer matrix as it is stored: raw rows only, checked at the border. Everything derived is derived elsewhere.

`effects` turns the probes into T[j -> i] with intervals, `forgetting` turns a run's stages into BWT and its kin.

What makes a matrix valid is in `checks`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BeforeValidator

from polyphony.curricula.files import replace_file, seal_of, sealed, unsealed
from polyphony.curricula.records import Evaluation, Kind
from polyphony.curricula.transfer.checks import (
    check_duplicates,
    check_lengths,
    check_matrix,
    check_row,
    check_version,
    read_document,
    read_row,
)
from polyphony.curricula.transfer.halves import Half, on_half

VERSIONS = (1, 2, 3, 4)
"""Those that are read: 4 tells tokens of rows, other ways to train all domains (`arm`) or what domains share; 3 has a
placebo's rows, 2 has none and an item that could not be graded, which is null in all three; all others are of version 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferMatrix:
    """What every domain's held-out set said before and after training on each domain.

    Example: `TransferMatrix.load("probe/transfer.json").on("steer").probes`
    """

    domains: tuple[str, ...]
    kinds: Mapping[str, Kind]
    rows: tuple[Evaluation, ...]
    """Baseline (`trained` empty), probes and joint run (`probe`), and moments of a run, in the order of the file."""
    items: Mapping[str, tuple[str, ...]] | None = None
    """Ids of the held-out items in the scores' order; None where the file has none, then both halves are all items."""
    watch_only: tuple[str, ...] = ()
    """Domains that are measured and never trained: they need no probe and have no place in an order."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, hashes of base and data, settings of the probe, what spoke against its learning rate: kept, and told."""
    shared: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """shared[a][b], a before b in `domains`: of the changes that training on either alone made to the weights, the
    `core_overlap` of those that changed most (Jaccard), the share of `sign_conflicts` in it, and their `cosine`; None where
    it is undefined. Empty where the probe kept no weights."""

    def __post_init__(self) -> None:
        check_matrix(self)

    @classmethod
    def load(cls, path: str | Path) -> TransferMatrix:
        """Read `transfer.json`. Raises ValueError that names the file, the row and the value where it is not valid."""
        try:
            return cls.from_json(json.loads(unsealed(Path(path).read_bytes())))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TransferMatrix:
        """Build from the document whose keys `DOCUMENT` and `ROW` list."""
        document = read_document(document)
        if document["version"] not in VERSIONS:
            raise ValueError(f"version {document['version']!r} of the transfer file is not supported, only 1 to 4")
        items = document.get("items")
        matrix = cls(
            domains=tuple(document["domains"]),
            kinds=dict(document["kinds"]),
            rows=tuple(read_row(row, where=f"row {n}") for n, row in enumerate(document["rows"])),
            items=None if items is None else {name: tuple(map(str, ids)) for name, ids in items.items()},
            watch_only=tuple(document.get("watch_only", ())),
            provenance=dict(document.get("provenance", {})),
            shared=dict(document.get("shared", {})),
        )
        check_version(matrix, document["version"])
        return matrix

    @classmethod
    def from_lines(cls, lines: Sequence[Mapping[str, Any]], *, until: float = math.inf) -> TransferMatrix:
        """Build from the lines of a run's ledger, up to a step; see `head_line`. Raises ValueError for a wrong one."""
        if not lines or "domains" not in lines[0]:
            raise ValueError("its first line is no head: an object with domains, kinds and rows")
        head = {key: value for key, value in lines[0].items() if key != "step"}
        if head.get("version") == 1:
            head["version"] = 2  # it was written before the rows were
        return cls.from_json(head | {"rows": [*head["rows"], *(line for line in lines[1:] if line["step"] <= until)]})

    def head_line(self) -> dict[str, Any]:
        """Return the first line of a run's ledger: the document with a probe's rows; the run's own follow, a line each."""
        head = replace(self, rows=self.rows[:1]).as_json() | {"rows": [r.as_row() for r in self.rows if r.probe]}
        return {"step": 0, **head} | ({"version": self.version} if self.version > 2 else {})

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        document: dict[str, Any] = {
            "version": self.version,
            "domains": list(self.domains),
            "kinds": dict(self.kinds),
        }
        if self.items is not None:
            document["items"] = {name: list(ids) for name, ids in self.items.items()}
        if self.watch_only:
            document["watch_only"] = list(self.watch_only)
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        if self.shared:
            document["shared"] = {a: {b: dict(told) for b, told in of.items()} for a, of in self.shared.items()}
        return document | {"rows": [row.as_row() for row in self.rows]}

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all: a killed process leaves the previous version in place."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, sealed(json.dumps(self.as_json(), allow_nan=False)))

    def on(self, which: Half) -> TransferMatrix:
        """Return the matrix over one half of the items, or itself where the file names no items."""
        if self.items is None:
            return self
        return replace(self, rows=tuple(on_half(row, self.items, which) for row in self.rows), items=None)

    def with_row(self, row: Evaluation) -> TransferMatrix:
        """Return the matrix with one more row, checked against the others, which are not checked again."""
        n = len(self.rows)
        check_row(row, self, where=f"row {n}")
        check_lengths(row, self.rows[0], where=f"row {n}")
        grown = copy.copy(self)
        object.__setattr__(grown, "rows", (*self.rows, row))
        check_duplicates(grown.rows)
        return grown

    @property
    def version(self) -> int:
        """The lowest version of the file that can tell it."""
        if self.shared or any(row.arm or row.tokens is not None for row in self.rows):
            return 4
        return 3 if any(row.placebo for row in self.rows) else 2 if self.has_gaps else 1

    @property
    def has_gaps(self) -> bool:
        """Whether an item in some row could not be graded."""
        return any(row.has_gaps for row in self.rows)

    @property
    def unsplit(self) -> str:
        """What both halves have in common, because the file does not tell it item by item; empty where that is nothing."""
        if self.items is None:
            return "names no items: both halves are all items"
        if any(set(row.entropy) - set(row.entropy_items) for row in self.rows):
            return "has no entropy_items in some rows: their entropy is of all items in both halves"
        return ""

    @property
    def trainable(self) -> tuple[str, ...]:
        """The domains that an order is made of."""
        return tuple(name for name in self.domains if name not in self.watch_only)

    @property
    def probes(self) -> tuple[Evaluation, ...]:
        """Rows trained on one domain alone from the probe's start."""
        alone = (row for row in self.rows if row.probe and len(row.trained) == 1)
        return tuple(row for row in alone if not row.placebo and not row.arm)

    @property
    def placebo(self) -> tuple[Evaluation, ...]:
        """Rows trained likewise, with shuffled rewards; empty while a domain that was probed has none."""
        rows = tuple(row for row in self.rows if row.placebo)
        return rows if {row.trained for row in self.probes} <= {row.trained for row in rows} else ()

    def of_placebo(self) -> TransferMatrix:
        """Return the matrix with the placebo's rows for its probes, and nothing else: what noise by itself did."""
        rows = tuple(replace(row, placebo=False) for row in self.placebo)
        return replace(self, rows=(*self.baselines(probe=True), *rows))

    @property
    def joint_arm(self) -> tuple[Evaluation, ...]:
        """Rows trained on all domains at once, for the same total number of steps."""
        return tuple(row for row in self.rows if row.probe and len(row.trained) > 1 and not row.arm)

    @property
    def arms(self) -> tuple[Evaluation, ...]:
        """Rows of other ways to train all domains."""
        return tuple(row for row in self.rows if row.arm)

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


_ROW, _BY_ITEM = b'{"trained":', b',"entropy_items":'


def without_items(line: bytes) -> bytes:
    """Return a row's line without its seal, and without what it says item by item beside the scores, which stands last and
    is most of it. Raises ValueError where the seal is broken."""
    line = unsealed(line)
    head, is_there, _ = line.partition(_BY_ITEM)
    return head + _BY_ITEM + b"{}}" if is_there and line.startswith(_ROW) else line


def copy_document(ledger: IO[bytes], out: IO[bytes]) -> None:
    """Write the document, as `as_json` has it, of a run's ledger: its lines as they are, none of them parsed.

    Raises ValueError where the seal of a line is broken: the document's own would hide it.
    """
    digest = hashlib.sha256()

    def write(part: bytes) -> None:
        digest.update(part)
        out.write(part)

    scores = (without_items(line).partition(b'"scores":')[2] for line in ledger)
    has_gaps = any(b"null" in text for text in scores)
    ledger.seek(0)
    head = unsealed(ledger.readline()).replace(b'"step":0,', b"", 1).rstrip(b"\n").removesuffix(b"]}")
    write(head.replace(b'"version":1,', b'"version":2,', 1) if has_gaps else head)
    between = b"" if head.endswith(b"[") else b",\n"
    for line in ledger:
        write(between + unsealed(line).rstrip(b"\n"))
        between = b",\n"
    write(b"]")
    digest.update(b"}")
    out.write(seal_of(digest))


def read_probes(given: Any) -> TransferMatrix:
    """Return what settings of a scheduler name: a matrix, or the path of one. Raises ValueError for anything else."""
    if isinstance(given, str | Path):
        if not Path(given).is_file():
            raise ValueError("the file does not exist; `polyphony probe` writes it")
        return TransferMatrix.load(given)
    if not isinstance(given, TransferMatrix):
        raise ValueError("expected a TransferMatrix or the path of a transfer.json, which `polyphony probe` writes")
    return given


NeededProbes = Annotated[Any, BeforeValidator(read_probes)]
Probes = Annotated[Any, BeforeValidator(lambda given: None if given is None else read_probes(given))]
