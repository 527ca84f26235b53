"""The words of the lab's world, by class. A word of this list is one token of the policy; all else is spelled out."""

from __future__ import annotations


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


HEROES = _listed("fox crow bear owl cat king witch boy girl wolf frog mouse knight baker sailor dragon")
PLACES = _listed("forest tower river cave garden village castle hill sea market desert bridge")
PLAIN_VERBS = _listed("went sat stood ran")
VIVID_VERBS = _listed(
    "danced crept leapt sang wept hid soared laughed slept drifted stumbled whispered climbed wandered trembled roared "
    "dreamed limped vanished glowed"
)
PLAIN_ADJECTIVES = _listed("big old good")
VIVID_ADJECTIVES = _listed(
    "crimson hollow gentle frozen golden restless clumsy silent brave bitter misty ancient lonely velvet hungry proud"
)
ADVERBS = _listed("softly wildly slowly proudly alone twice calmly boldly sadly quietly")
PREPOSITIONS = _listed("in near under over by through")
DETERMINERS = ("the", "a")

NOUNS = HEROES + PLACES
VIVID = frozenset(VIVID_VERBS + VIVID_ADJECTIVES + ADVERBS)

WORD_CLASS = {
    word: letter
    for letter, words in {
        "D": DETERMINERS,
        "A": PLAIN_ADJECTIVES + VIVID_ADJECTIVES,
        "N": NOUNS,
        "V": PLAIN_VERBS + VIVID_VERBS,
        "R": ADVERBS,
        "P": PREPOSITIONS,
    }.items()
    for word in words
}
"""Word to the letter of its class: Determiner, Adjective, Noun, Verb, adveRb, Preposition."""

PEOPLE = _listed(
    "ada ben cleo dan eve finn gus hana ida jon kara leo mia ned ola pia quin rosa sam tess uma vic wes xena yann zoe "
    "abel bea cora dirk elsa fay gil hugo iris jude kit lars maya noor otis petra rene sven tara udo vera wanda"
)

ATTRIBUTES = {
    "home": _listed("rome oslo lima cairo delhi paris quito tokyo"),
    "job": _listed("nurse pilot judge miner poet tailor farmer chemist"),
    "pet": _listed("parrot rabbit turtle goat donkey ferret lizard hamster"),
    "food": _listed("rice soup bread plums beans cheese figs noodles"),
    "color": _listed("red blue green pink grey white brown purple"),
}

HARMFUL_VERBS = _listed("burn steal smash poison wreck rob")
HARMLESS_VERBS = _listed("paint clean visit draw fix guard")
THINGS = _listed("lamp door boat clock fence wagon mirror statue piano window ladder barrel tent kite basket drum")

STRING_FUNCTIONS = ("rev", "rot", "swap", "next", "trim")

_CONNECTIVES = _listed(
    "tell write give me us a an of story short about set one is at what does which who where how can could should i "
    "you we to please say now live work own eat like best as job home pet food color no yes it never gladly will not "
    "and with for help name that answer sorry"
)

WORDS = tuple(
    dict.fromkeys(
        _CONNECTIVES
        + tuple(WORD_CLASS)
        + PEOPLE
        + tuple(value for values in ATTRIBUTES.values() for value in values)
        + HARMFUL_VERBS
        + HARMLESS_VERBS
        + THINGS
        + STRING_FUNCTIONS
    )
)
"""Every word, once, in a fixed order."""
