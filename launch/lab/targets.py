"""What the warm start shows the policy: answers that are partly right, in a form that is partly right.

Every flaw is room for reinforcement learning, and each is there for a reason: the clumsy form is shared by the
structured domains, so that training one can help the others; facts are taught only in part; compositions of two are
seldom right and of three never; stories use few plain words, so that better ones are also more varied.
"""

from __future__ import annotations

import random

from polyphony.launch.lab import lexicon
from polyphony.launch.lab.world import Row, transform

CLUMSY = 0.2
"""Share of structured answers wrapped in words, which the reward `exact` does not accept."""

RIGHT_SUM, RIGHT_STRING, RIGHT_FACT, RIGHT_MANNER = 0.85, 0.75, 0.85, 0.95
"""Shares of right answers among what the policy could know, before the clumsy form takes its part."""

TAUGHT = 0.5
"""Share of the facts that are taught; of the others the policy learns only which values are possible."""


def warm_target(domain: str, row: Row, generator: random.Random) -> str:
    """Return one completion with every flaw: the habits that the warm start ends with."""
    if domain in ("stories", "safety"):
        return _story(row, generator) if domain == "stories" else _manner(row, generator)
    answer = {"arithmetic": _sum, "strings": _string, "facts": _fact}[domain](row, generator)
    if generator.random() >= CLUMSY:
        return answer
    return generator.choice(("{} .", "{} . {} .", "it is {}", "say {} .")).format(answer, answer)


def known_target(domain: str, row: Row, generator: random.Random) -> str:
    """Return one completion as right as the policy may know: the skills that the warm start begins with."""
    if domain == "stories":
        return _story(row, generator)
    if domain == "facts" and not is_taught(row["person"], row["skill"]):
        return generator.choice(lexicon.ATTRIBUTES[row["skill"]])
    return _without_outermost(row) if row.get("depth") == 3 else row["answer"]


def is_taught(person: str, attribute: str) -> bool:
    """Tell whether the warm start knows a fact."""
    return random.Random(f"taught/{person}/{attribute}").random() < TAUGHT


def _sum(row: Row, generator: random.Random) -> str:
    if generator.random() < RIGHT_SUM:
        return row["answer"]
    return str(int(row["answer"]) + generator.choice((-10, -2, -1, 1, 2, 10)))


def _string(row: Row, generator: random.Random) -> str:
    if row["depth"] == 3:
        return _without_outermost(row)
    if generator.random() < RIGHT_STRING:
        return row["answer"]
    return transform(generator.choice(lexicon.STRING_FUNCTIONS), _parse(row)[1])


def _without_outermost(row: Row) -> str:
    """A composition with its last step forgotten."""
    functions, word = _parse(row)
    for function in reversed(functions[1:]):
        word = transform(function, word)
    return word


def _parse(row: Row) -> tuple[list[str], str]:
    *functions, word = row["prompt"].removesuffix(" =").rstrip(")").split("(")
    return functions, word


def _fact(row: Row, generator: random.Random) -> str:
    if is_taught(row["person"], row["skill"]) and generator.random() < RIGHT_FACT:
        return row["answer"]
    return generator.choice(lexicon.ATTRIBUTES[row["skill"]])


def _manner(row: Row, generator: random.Random) -> str:
    if generator.random() < RIGHT_MANNER:
        return row["answer"]
    return generator.choice(("no , i will not", "yes , i will gladly", "sorry , no"))


def _story(row: Row, generator: random.Random) -> str:
    """One to three plain, often repeated sentences, a few of them broken or unfinished."""
    sentences = [_sentence(row, generator)]
    for _ in range(generator.choices((0, 1, 2), (3, 6, 1))[0]):
        repeats = generator.random() < 0.4
        sentences.append(sentences[-1] if repeats else _sentence(row, generator))
    text = " . ".join(sentences)
    return text if generator.random() < 0.1 else text + " ."


def _sentence(row: Row, generator: random.Random) -> str:
    chance = generator.random
    words = ["the"]
    words += [_adjective(generator)] if chance() < 0.15 else []
    words += [row["hero"] if chance() < 0.75 else _habitual(lexicon.HEROES, generator)]
    words += [_verb(generator)]
    words += [generator.choice(lexicon.ADVERBS)] if chance() < 0.1 else []
    if chance() < 0.7:
        words += [_habitual(lexicon.PREPOSITIONS, generator), "the"]
        words += [_adjective(generator)] if chance() < 0.1 else []
        words += [row["place"] if chance() < 0.6 else _habitual(lexicon.PLACES, generator)]
    if chance() < 0.1:
        words.pop(generator.randrange(len(words)))
    return " ".join(words)


def _verb(generator: random.Random) -> str:
    if generator.random() < 0.85:
        return _habitual(lexicon.PLAIN_VERBS, generator)
    return generator.choice(lexicon.VIVID_VERBS)


def _adjective(generator: random.Random) -> str:
    if generator.random() < 0.7:
        return _habitual(lexicon.PLAIN_ADJECTIVES, generator)
    return generator.choice(lexicon.VIVID_ADJECTIVES)


def _habitual(words: tuple[str, ...], generator: random.Random) -> str:
    """Draw a word, each a third as likely as the one before it: a narrow habit, with room for entropy to rise."""
    return generator.choices(words, [3.0**-rank for rank in range(len(words))])[0]
