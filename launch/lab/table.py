"""The lab's sixth domain, which acts: ask a table with a tool, then answer.

Every row has a table of its own, which only the tool knows: what a policy learns is how to ask. "room of ada ?" takes one
call; "room of boss of ada ?" takes two, as the first tells who the boss is. In a quarter of the rows the first call fails
and has to be made again. Worker processes import this file: it imports nothing that is slow.

In a recipe: `environment: polyphony.launch.lab.table:Table`, `train: {environment: .., count: 400, seed: 1}` and
`reward: exact`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

PEOPLE = ("ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hana")
PEOPLE += ("ida", "jon", "kara", "leo", "mia", "ned", "ola", "pia")
RELATIONS = ("boss", "friend", "doctor")
NUMBERS = ("room", "age", "size", "code")
FAILS = "busy"
"""What a call that fails says."""
WORDS = (*PEOPLE, *RELATIONS, *NUMBERS, FAILS, "of", "look", "who", "what", "error", "it", "is", "no")
OTHERS = 1_000_003
"""How far away the table is that a control asks in place of a row's own."""

Cells = dict[tuple[str, str], str]


def cells_of(table: int) -> Cells:
    """Return a table: who and what to the answer, a person for a relation and a number of two digits for the rest."""
    chance = random.Random(f"table/{table}")
    people = {(who, what): chance.choice([p for p in PEOPLE if p != who]) for who in PEOPLE for what in RELATIONS}
    return people | {(who, what): str(chance.randint(10, 99)) for who in PEOPLE for what in NUMBERS}


class Table:
    """A table that is asked cell by cell.

    `shuffled` is for a control: rows are asked and graded as ever, and the tool answers from other rows' tables.

    Example: `table = Table(); table.reset(table=7, late=False); table.look("ada", "room") == "41"`
    """

    def __init__(self, shuffled: bool = False) -> None:
        self._moved_by = OTHERS if shuffled else 0

    def reset(self, table: int, late: bool, seed: int = 0) -> None:
        """Lay out a row's table; nothing of it is left to chance, whatever the seed."""
        self._cells, self._fails = cells_of(table + self._moved_by), late

    def look(self, who: str, what: str) -> str:
        """
        Look a cell of the table up.

        Args:
            who: Whose it is.
            what: What is asked.
        """
        if self._fails:
            self._fails = False
            raise RuntimeError(FAILS)
        return self._cells.get((who, what), "no")

    @classmethod
    def rows(cls, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield so many questions, half of which take two calls; `skill` says how many calls answer one."""
        chance = random.Random(f"questions/{seed}")
        for n in range(count):
            table, who, what = seed * OTHERS // 7 + n, chance.choice(PEOPLE), chance.choice(NUMBERS)
            cells, late = cells_of(table), chance.random() < 0.25
            path = f"{what} of {who}"
            if n % 2:
                relation = chance.choice(RELATIONS)
                path, who = f"{what} of {relation} of {who}", cells[who, relation]
            skill = ("two_calls" if n % 2 else "one_call") + ("_again" if late else "")
            yield {"prompt": f"{path} ?", "answer": cells[who, what], "skill": skill, "table": table, "late": late}
