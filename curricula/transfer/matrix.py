"""The transfer matrix as it is stored: raw rows only, checked at the border. Everything derived is derived elsewhere.

`effects` turns the probes into T[j -> i] with intervals, `forgetting` turns a run's stages into BWT and its kin.

Each check of what makes a matrix valid names the offender: no wrong file may become a plausible order.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BeforeValidator

from polyphony.curricula.files import replace_file, seal_of, sealed, unsealed
from polyphony.curricula.records import Evaluation, Kind
from polyphony.curricula.transfer.halves import Half, on_half

VERSIONS = (1, 2, 3)
"""Those that are read: 3 has a placebo's rows, 2 has none and an item that could not be graded, which is null in both; all
others are of version 1."""


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
            raise ValueError(f"version {document['version']!r} of the transfer file is not supported, only 1, 2 and 3")
        items = document.get("items")
        matrix = cls(
            domains=tuple(document["domains"]),
            kinds=dict(document["kinds"]),
            rows=tuple(read_row(row, where=f"row {n}") for n, row in enumerate(document["rows"])),
            items=None if items is None else {name: tuple(map(str, ids)) for name, ids in items.items()},
            watch_only=tuple(document.get("watch_only", ())),
            provenance=dict(document.get("provenance", {})),
        )
        if document["version"] == 1:
            for n, row in enumerate(matrix.rows):
                if gaps := [(name, items.index(None)) for name, items in row.scores.items() if None in items]:
                    (name, item), *_ = gaps
                    raise ValueError(
                        f"row {n}, domain {name!r}, item {item}: version 1 of the file has a score for every item, got None"
                    )
        if document["version"] < 3 and (placebo := [n for n, row in enumerate(matrix.rows) if row.placebo]):
            raise ValueError(f"row {placebo[0]}: a placebo is of version 3 of the file, got {document['version']}")
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
        return {"step": 0, **head, **({"version": 3} if self._has_placebo else {})}

    def as_json(self) -> dict[str, Any]:
        """Return the document that `from_json` reads."""
        document: dict[str, Any] = {
            "version": 3 if self._has_placebo else 2 if self.has_gaps else 1,
            "domains": list(self.domains),
            "kinds": dict(self.kinds),
        }
        if self.items is not None:
            document["items"] = {name: list(ids) for name, ids in self.items.items()}
        if self.watch_only:
            document["watch_only"] = list(self.watch_only)
        if self.provenance:
            document["provenance"] = dict(self.provenance)
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
        _check_row(row, self, where=f"row {n}")
        _check_lengths(row, self.rows[0], where=f"row {n}")
        grown = copy.copy(self)
        object.__setattr__(grown, "rows", (*self.rows, row))
        _check_duplicates(grown.rows)
        return grown

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
        return tuple(row for row in self.rows if row.probe and len(row.trained) == 1 and not row.placebo)

    @property
    def _has_placebo(self) -> bool:
        return any(row.placebo for row in self.rows)

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


DOCUMENT = {
    "version": int,
    "domains": list,
    "kinds": dict,
    "rows": list,
    "items": dict,
    "watch_only": list,
    "provenance": dict,
}
"""Keys of the file and what each holds; the first four are required."""


ROW = {"trained": list, "step": int, "seed": int, "scores": dict, "entropy": dict, "exposure": dict, "probe": bool,
       "placebo": bool, "rolled_back": bool, "recovery": bool, "entropy_items": dict, "kl_items": dict}  # fmt: skip
"""Keys of a row, likewise."""


WORDS = {int: "an integer", bool: "true or false", list: "a list", dict: "an object"}


def read_document(document: Any) -> dict[str, Any]:
    """Return the file's object; an optional key that is null counts as absent. Raises ValueError for a wrong shape."""
    found = _read_object(document, DOCUMENT, what="a transfer file", where="")
    for name, ids in found.get("items", {}).items():
        if not isinstance(ids, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"items of {name!r} must be a list of ids, text or integers, got {_short(ids)}")
    return found


def read_row(row: Any, *, where: str) -> Evaluation:
    """Return one row of the file as an Evaluation. Raises ValueError that names the row for a wrong shape."""
    found = _read_object(row, ROW, what="a row", where=f"{where}: ")
    for name, items in found["scores"].items():
        if not isinstance(items, list):
            raise ValueError(f"{where}: scores of {name!r} must be a list, one score an item, got {_short(items)}")
    for key in ("entropy_items", "kl_items"):
        for name, pairs in found.get(key, {}).items():
            if not isinstance(pairs, list) or not all(pair is None or isinstance(pair, list) for pair in pairs):
                raise ValueError(f"{where}: {key} of {name!r} must be a list of [nats, tokens], got {_short(pairs)}")
    return Evaluation.from_row(found)


def _read_object(value: Any, shape: Mapping[str, type], *, what: str, where: str) -> dict[str, Any]:
    """Return the keys that hold something. Raises ValueError unless the first four are there and all are of `shape`."""
    required = list(shape)[:4]
    found = {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else {}
    if not set(required) <= set(found):
        raise ValueError(f"{where}{what} is an object with {', '.join(required)}, got {_short(value)}")
    if unknown := set(found) - set(shape):
        raise ValueError(f"{where}unknown keys {sorted(unknown)}; allowed: {sorted(shape)}")
    for key, kind in shape.items():
        # true is an integer to Python, not to a reader of the file
        if key in found and (not isinstance(found[key], kind) or (kind is int and isinstance(found[key], bool))):
            raise ValueError(f"{where}{key} must be {WORDS[kind]}, got {_short(found[key])}")
    return found


def check_matrix(matrix: TransferMatrix) -> None:
    """Raise ValueError at the first thing in the matrix that does not hold together."""
    _check_domains(matrix)
    if not any(not row.trained for row in matrix.rows):
        raise ValueError('no baseline: one row must have "trained": [] (scores before any training)')
    for n, row in enumerate(matrix.rows):
        _check_row(row, matrix, where=f"row {n}")
    _check_items(matrix)
    _check_duplicates(matrix.rows)


def _check_domains(matrix: TransferMatrix) -> None:
    names = matrix.domains
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise ValueError(f"domains must be different, non-empty names, at least one, got {list(names)}")
    if set(matrix.kinds) != set(names):
        raise ValueError(f"kinds must name each domain once: domains {list(names)}, kinds {sorted(matrix.kinds)}")
    for name, kind in matrix.kinds.items():
        if kind not in ("structured", "open_ended"):
            raise ValueError(f"domain {name!r}: kind is structured or open_ended, got {kind!r}")
    _check_known(matrix.watch_only, names, where="watch_only")
    if set(matrix.watch_only) == set(names):
        raise ValueError("every domain is watch-only: at least one must be trainable")


def _check_row(row: Evaluation, matrix: TransferMatrix, *, where: str) -> None:
    _check_known(row.trained, matrix.domains, where=f"{where}: trained")
    if (watched := set(row.trained) & set(matrix.watch_only)) and not row.recovery:
        raise ValueError(f"{where}: trained on watch-only domains {sorted(watched)}")
    if row.probe and len(row.trained) > 1 and set(row.trained) != set(matrix.trainable):
        raise ValueError(
            f"{where}: a probe trains one domain, or all {list(matrix.trainable)} as the joint run; "
            f"got {list(row.trained)}"
        )
    if row.placebo and not (row.probe and len(row.trained) == 1):
        raise ValueError(f"{where}: a placebo is a probe of one domain, got probe {row.probe} of {list(row.trained)}")
    for key in ("step", "seed"):
        value = getattr(row, key)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{where}: {key} must be an integer >= 0, got {value!r}")
    if set(row.scores) != set(matrix.domains):
        raise ValueError(f"{where}: scores must name each of {list(matrix.domains)} once, got {sorted(row.scores)}")
    for name, items in row.scores.items():
        _check_scores(items, where=f"{where}, domain {name!r}")
    _check_pairs(row, where=where)
    _check_known(row.entropy, matrix.domains, where=f"{where}: entropy")
    for name, nats in row.entropy.items():
        if not (_is_number(nats) and nats >= 0):
            raise ValueError(f"{where}, domain {name!r}: entropy must be finite and >= 0 nats, got {nats!r}")
    _check_known(row.exposure, matrix.domains, where=f"{where}: exposure")
    for name, drawn in row.exposure.items():
        if not isinstance(drawn, int) or drawn < 0:
            raise ValueError(f"{where}, domain {name!r}: exposure counts prompts, an integer >= 0, got {drawn!r}")


def _check_scores(items: Sequence[Any], *, where: str) -> None:
    if not items:
        raise ValueError(f"{where}: no scores; a held-out set needs at least one item")
    if set(map(type, items)) == {float} and not math.isnan(sum(items)) and min(items) >= 0 and max(items) <= 1:
        return  # the usual case, fast
    for n, value in enumerate(items):
        if value is not None and not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{where}, item {n}: a score must be a number in [0, 1], or null, got {value!r}")


def _check_pairs(row: Evaluation, *, where: str) -> None:
    """See that what is told item by item beside the scores is (nats, tokens), an entry a score."""
    for key, of in (("entropy_items", row.entropy_items), ("kl_items", row.kl_items)):
        _check_known(of, tuple(row.scores), where=f"{where}: {key}")
        for name, pairs in of.items():
            if len(pairs) != len(row.scores[name]):
                raise ValueError(f"{where}, domain {name!r}: {len(pairs)} {key} for {len(row.scores[name])} scores")
            for n, pair in enumerate(pairs):
                if not (_is_pair(pair) if key == "kl_items" else pair is not None and _is_pair(pair) and pair[0] >= 0):
                    raise ValueError(f"{where}, domain {name!r}, item {n}: {key} holds [nats, tokens], got {pair!r}")


def _is_pair(pair: Any) -> bool:
    """Whether it is (nats, tokens), or None for an item that was not measured."""
    if pair is None:
        return True
    return len(pair) == 2 and _is_number(pair[0]) and type(pair[1]) is int and pair[1] >= 0


def _check_lengths(row: Evaluation, first: Evaluation, *, where: str) -> None:
    for name, items in row.scores.items():
        if len(items) != len(first.scores[name]):
            raise ValueError(
                f"{where}, domain {name!r}: {len(items)} items, but row 0 has {len(first.scores[name])}; "
                "scores are compared item by item"
            )


def _check_items(matrix: TransferMatrix) -> None:
    first = matrix.rows[0]
    for n, row in enumerate(matrix.rows):
        _check_lengths(row, first, where=f"row {n}")
    if matrix.items is None:
        return
    if set(matrix.items) != set(matrix.domains):
        raise ValueError(f"items must name each of {list(matrix.domains)} once, got {sorted(matrix.items)}")
    for name, ids in matrix.items.items():
        if len(ids) != len(first.scores[name]):
            raise ValueError(f"domain {name!r}: {len(ids)} item ids for {len(first.scores[name])} scores")
        if len(set(ids)) < 2:
            raise ValueError(f"domain {name!r}: items to be split in halves need at least 2 different ids, got {ids}")


def _check_duplicates(rows: Sequence[Evaluation]) -> None:
    seen: dict[tuple, int] = {}
    for n, row in enumerate(rows):
        # a probe is one training run a seed: a second row of it would be counted as a second run
        moment = None if row.probe else row.step
        key = (frozenset(row.trained), row.seed, row.probe, row.placebo, moment)
        if key in seen:
            what = f"trained {list(row.trained)}, seed {row.seed}" + ("" if row.probe else f", step {row.step}")
            raise ValueError(f"rows {seen[key]} and {n} are the same measurement ({what}): keep one")
        seen[key] = n


def _check_known(names: Any, known: Sequence[str], *, where: str) -> None:
    listed = list(names)
    if unknown := [name for name in listed if name not in known]:
        raise ValueError(f"{where}: unknown domains {unknown}; known: {list(known)}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"{where}: {listed} names a domain twice")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # isfinite overflows on a long integer


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
