"""Worlds of stated difficulty, made of the lab's domains: what is asked for, and in which form, decides how hard it is.

A domain here is a part of one of the lab's (`skill`), asked in its own words. Four things make it hard: few training
prompts (`size`), references that nobody can reach (`impossible`, of training rows only), an answer that the policy does
not know (`facts`), and a form of answering that it must find first (`dotted`: `12 .` where the policy says `12`; it does so
of itself in one answer in thirty). A dotted domain beside a plain one of the same kind is a conflict: what is learned on
one is wrong on the other.

As a recipe has it: `train: {generator: "tests.experiments.fast.worlds:rows", world: uneven, domain: minus, split: train}`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from polyphony.curricula.records import Domain
from polyphony.launch.lab import world as lab
from polyphony.launch.lab.rewards import StoryRubric

Split = Literal["train", "heldout"]

DOT = " ."
NOBODY_SAYS = "sorry no answer"
HELDOUT = 1200
"""Most held-out rows of a domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One domain of a world.

    Example: `Subject(name="minus", of="arithmetic", skill=("minus",), dotted=True, size=1500)`
    """

    name: str
    of: str
    """A domain of `polyphony.launch.lab.world`."""
    skill: tuple[str, ...] = ()
    """Only rows of these sub-skills; empty: all."""
    size: int | None = None
    """Training rows; None: all there are, 0: only watched."""
    dotted: bool = False
    """The answer must end with a dot of its own."""
    impossible: float = 0.0
    """Share of the training rows whose reference nobody can reach; held-out rows stay as they are."""

    @property
    def is_open_ended(self) -> bool:
        return self.of == "stories"

    def rows(self, split: Split) -> list[dict[str, Any]]:
        """Return the subject's rows of a split; the same at every call."""
        found = [row for row in lab.rows(domain=self.of, split=split) if not self.skill or row["skill"] in self.skill]
        most = HELDOUT if split == "heldout" else self.size
        if split == "train" and (most or 0) > len(found):
            raise ValueError(f"subject {self.name!r}: {len(found)} training rows, size must be 0 to that, got {most}")
        found = found[:most]  # the lab's order is drawn by its own seed
        if self.dotted:
            found = [{**row, "answer": row["answer"] + DOT} for row in found]
        if split == "train" and self.impossible:
            chance = random.Random(f"impossible/{self.name}").random
            found = [{**row, "answer": NOBODY_SAYS} if chance() < self.impossible else row for row in found]
        return found

    def domain(self) -> Domain:
        """Return it as the product has it."""
        return Domain(
            name=self.name,
            kind="open_ended" if self.is_open_ended else "structured",
            train=None if self.size == 0 else self.rows("train"),
            heldout=self.rows("heldout"),
            reward=StoryRubric() if self.is_open_ended else "exact",
        )


World = tuple[Subject, ...]


def even() -> World:
    """The lab's own domains: four that are trained, of like difficulty, and one that is watched."""
    four = tuple(Subject(name=name, of=name, size=1500) for name in ("arithmetic", "strings", "facts", "stories"))
    return (*four, Subject(name="safety", of="safety", size=0))


def uneven(
    *,
    facts: int = 60,
    impossible: float = 0.9,
    conflict: bool = True,
    watched: bool = True,
) -> World:
    """One domain solved already (refuse), one whose form must be found (minus), one mostly impossible, one open-ended.

    `facts`: its training prompts. `impossible`: share of such references in strings. `conflict`: minus
    has to be answered with a dot, beside plus that must not be. `watched`: granting is measured and never trained.
    """
    world = (
        Subject(name="plus", of="arithmetic", skill=("plus",), size=1500),
        Subject(name="minus", of="arithmetic", skill=("minus",), size=1500, dotted=conflict),
        Subject(name="strings", of="strings", size=1500, impossible=impossible),
        Subject(name="facts", of="facts", size=facts),
        Subject(name="refuse", of="safety", skill=("refuse",)),
        Subject(name="stories", of="stories", size=1500),
    )
    return (*world, Subject(name="grant", of="safety", skill=("grant",), size=0)) if watched else world


MANY_DOTTED = ("minus", "depth2", "food")


def many() -> World:
    """Twelve domains that are trained, three of which (`MANY_DOTTED`) conflict with others of their kind; one is watched."""
    parts = [("arithmetic", name) for name in ("plus", "minus")]
    parts += [("strings", f"depth{n}") for n in (1, 2, 3)]
    parts += [("facts", name) for name in ("home", "job", "pet", "food", "color")]
    parts += [("safety", "refuse")]
    found = [
        Subject(name=name, of=of, skill=(name,), size=250 if of == "safety" else 500, dotted=name in MANY_DOTTED)
        for of, name in parts
    ]
    return (
        *found,
        Subject(name="stories", of="stories", size=500),
        Subject(name="grant", of="safety", skill=("grant",), size=0),
    )


PARTS = {
    "arithmetic": ("plus", "minus"),
    "strings": ("depth1", "depth2", "depth3"),
    "facts": ("home", "job", "pet", "food", "color"),
}


def drawn(*, key: str) -> World:
    """Return a world that `key` decides, within limits that were stated before there was a key.

    Always: stories; one of refusing and granting, which are solved from the start, trained and the other one watched. Four
    or five further parts of arithmetic, strings and facts, of which at least one is arithmetic or strings of depth 1 or 2
    and dotted (its form must be found), and one other has .7 to .95 of its references out of reach. Every further part is
    dotted with chance 1/5. Sizes are drawn evenly on a logarithmic scale from 60 to 1,500 prompts, or to as many as there
    are. Names stand in the order in which they were drawn.
    """
    chance = random.Random(f"drawn/{key}")
    hidden = chance.choice(["plus", "minus", "depth1", "depth2"])
    others = [name for names in PARTS.values() for name in names if name != hidden]
    rest = chance.sample(others, chance.choice([3, 4]))
    out_of_reach = chance.choice([name for name in rest if name != "depth3"])
    trained, watched = chance.sample(["refuse", "grant"], 2)
    of = {name: domain for domain, names in PARTS.items() for name in names}
    subjects = [
        Subject(
            name=name,
            of=of[name],
            skill=(name,),
            size=_size(chance, of[name], name),
            dotted=name == hidden or (name != out_of_reach and chance.random() < 0.2),
            impossible=round(chance.uniform(0.7, 0.95), 2) if name == out_of_reach else 0.0,
        )
        for name in chance.sample([hidden, *rest], len(rest) + 1)
    ]
    solved = Subject(name=trained, of="safety", skill=(trained,), size=_size(chance, "safety", trained))
    stories = Subject(name="stories", of="stories", size=_size(chance, "stories", "story"))
    return (*subjects, solved, stories, Subject(name=watched, of="safety", skill=(watched,), size=0))


def _size(chance: random.Random, domain: str, skill: str) -> int:
    return min(_there_are(domain, skill), round(60 * 25 ** chance.random()))


@lru_cache(maxsize=32)
def _there_are(domain: str, skill: str) -> int:
    return sum(row["skill"] == skill for row in lab.rows(domain=domain, split="train"))


WORLDS = {"even": even, "uneven": uneven, "many": many, "drawn": drawn}


@lru_cache(maxsize=8)
def _made(name: str, settings: tuple[tuple[str, Any], ...]) -> World:
    return WORLDS[name](**dict(settings))


def make_world(name: str, settings: Mapping[str, Any] | None = None) -> World:
    """Return the world of a name with its settings. Raises ValueError that lists the known names."""
    if name not in WORLDS:
        raise ValueError(f"world {name!r} does not exist; known: {', '.join(WORLDS)}")
    return _made(name, tuple(sorted((settings or {}).items())))


def rows(*, world: str, domain: str, split: Split, most: int | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Return the rows of one domain of a world, at most so many, for a recipe's `generator`.

    Raises ValueError for a domain that there is not.
    """
    subjects = {subject.name: subject for subject in make_world(world, settings)}
    if domain not in subjects:
        raise ValueError(f"world {world!r} has no domain {domain!r}; known: {', '.join(subjects)}")
    return subjects[domain].rows(split)[:most]


def as_recipe(name: str, settings: Mapping[str, Any] | None = None, *, heldout: int = HELDOUT) -> dict[str, Any]:
    """Return the `domains` of a recipe for the real trainer, with at most so many held-out rows each."""
    found: dict[str, Any] = {}
    for subject in make_world(name, settings):
        asked = {"generator": f"{__name__}:rows", "world": name, "domain": subject.name, **(settings or {})}
        rubric = "polyphony.launch.lab.rewards:StoryRubric"
        section: dict[str, Any] = {
            "kind": subject.domain().kind,
            "reward": rubric if subject.is_open_ended else "exact",
        }
        section["heldout"] = {**asked, "split": "heldout", "most": heldout}
        found[subject.name] = section | ({} if subject.size == 0 else {"train": {**asked, "split": "train"}})
    return found
