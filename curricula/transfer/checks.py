"""What a valid transfer file is: the shape of its document and rows, and what must hold between them.

Each check names the offender: no wrong file may become a plausible order.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from polyphony.curricula.records import Evaluation

ARMS = ("sequence", "groups", "merge", "distil")
"""What a row with `arm` may be."""
SHARED = ("core_overlap", "sign_conflicts", "cosine")
"""What `shared` says of two domains' changes of the weights."""


DOCUMENT = {
    "version": int,
    "domains": list,
    "kinds": dict,
    "rows": list,
    "items": dict,
    "watch_only": list,
    "provenance": dict,
    "shared": dict,
}
"""Keys of the file and what each holds; the first four are required."""


ROW = {"trained": list, "step": int, "seed": int, "scores": dict, "entropy": dict, "exposure": dict, "probe": bool,
       "placebo": bool, "rolled_back": bool, "recovery": bool, "arm": dict, "tokens": int, "entropy_items": dict,
       "kl_items": dict}  # fmt: skip
"""Keys of a row, likewise."""


class Matrix(Protocol):
    """What a `TransferMatrix` holds that is checked."""

    @property
    def domains(self) -> tuple[str, ...]: ...
    @property
    def kinds(self) -> Mapping[str, str]: ...
    @property
    def rows(self) -> tuple[Evaluation, ...]: ...
    @property
    def items(self) -> Mapping[str, tuple[str, ...]] | None: ...
    @property
    def watch_only(self) -> tuple[str, ...]: ...
    @property
    def shared(self) -> Mapping[str, Mapping[str, Mapping[str, float | None]]]: ...
    @property
    def trainable(self) -> tuple[str, ...]: ...
    @property
    def version(self) -> int: ...


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


def check_matrix(matrix: Matrix) -> None:
    """Raise ValueError at the first thing in the matrix that does not hold together."""
    _check_domains(matrix)
    if not any(not row.trained for row in matrix.rows):
        raise ValueError('no baseline: one row must have "trained": [] (scores before any training)')
    for n, row in enumerate(matrix.rows):
        check_row(row, matrix, where=f"row {n}")
    _check_items(matrix)
    check_duplicates(matrix.rows)
    _check_shared(matrix)


def check_version(matrix: Matrix, version: int) -> None:
    """See that a file has nothing that its version has not."""
    if version == 1:
        for n, row in enumerate(matrix.rows):
            if gaps := [(name, items.index(None)) for name, items in row.scores.items() if None in items]:
                (name, item), *_ = gaps
                raise ValueError(
                    f"row {n}, domain {name!r}, item {item}: version 1 of the file has a score for every item, got None"
                )
    if version < 3 and (placebo := [n for n, row in enumerate(matrix.rows) if row.placebo]):
        raise ValueError(f"row {placebo[0]}: a placebo is of version 3 of the file, got {version}")
    if version < matrix.version == 4:
        raise ValueError(f"rows with `arm` or `tokens`, and `shared`, are of version 4 of the file, got {version}")


def _check_shared(matrix: Matrix) -> None:
    for a, of in matrix.shared.items():
        if not isinstance(of, Mapping):
            raise ValueError(f"shared: of {a!r} an object by domain is told, got {_short(of)}")
        for b, told in of.items():
            _check_known((a, b), matrix.domains, where="shared")
            is_whole = isinstance(told, Mapping) and set(told) == set(SHARED)
            if not (is_whole and all(value is None or _is_number(value) for value in told.values())):
                raise ValueError(f"shared: of {a!r} and {b!r} {', '.join(SHARED)} are told, got {_short(told)}")


def _check_domains(matrix: Matrix) -> None:
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


def check_row(row: Evaluation, matrix: Matrix, *, where: str) -> None:
    """Raise ValueError at the first thing in a row that does not fit its matrix."""
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
    if row.arm and not (row.probe and set(row.trained) == set(matrix.trainable) and row.arm.get("kind") in ARMS):
        raise ValueError(
            f"{where}: an arm is a probe of all of {list(matrix.trainable)} whose kind is one of {', '.join(ARMS)}; "
            f"got probe {row.probe} of {list(row.trained)}, {_short(row.arm)}"
        )
    if row.tokens is not None and row.tokens < 0:
        raise ValueError(f"{where}: tokens must be an integer >= 0, got {row.tokens}")
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


def check_lengths(row: Evaluation, first: Evaluation, *, where: str) -> None:
    """Raise ValueError where a row has not as many items as the first one."""
    for name, items in row.scores.items():
        if len(items) != len(first.scores[name]):
            raise ValueError(
                f"{where}, domain {name!r}: {len(items)} items, but row 0 has {len(first.scores[name])}; "
                "scores are compared item by item"
            )


def _check_items(matrix: Matrix) -> None:
    first = matrix.rows[0]
    for n, row in enumerate(matrix.rows):
        check_lengths(row, first, where=f"row {n}")
    if matrix.items is None:
        return
    if set(matrix.items) != set(matrix.domains):
        raise ValueError(f"items must name each of {list(matrix.domains)} once, got {sorted(matrix.items)}")
    for name, ids in matrix.items.items():
        if len(ids) != len(first.scores[name]):
            raise ValueError(f"domain {name!r}: {len(ids)} item ids for {len(first.scores[name])} scores")
        if len(set(ids)) < 2:
            raise ValueError(f"domain {name!r}: items to be split in halves need at least 2 different ids, got {ids}")


def check_duplicates(rows: Sequence[Evaluation]) -> None:
    """Raise ValueError where two rows are the same measurement."""
    seen: dict[tuple, int] = {}
    for n, row in enumerate(rows):
        # a probe is one training run a seed: a second row of it would be counted as a second run
        moment = None if row.probe else row.step
        arm = json.dumps(row.arm, sort_keys=True) if row.arm else ""
        key = (frozenset(row.trained), row.seed, row.probe, row.placebo, arm, moment)
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
