"""The reference is what the declarations say, and says something of everything."""

from __future__ import annotations

from tests.reference import FILE, reference


def test_the_reference_is_what_make_reference_writes():
    assert FILE.read_text(encoding="utf-8") == reference(), "run `make reference`"


def test_every_key_in_the_reference_has_a_default_a_range_and_a_meaning():
    rows = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [row for row in rows if "|  |" in row] == []
