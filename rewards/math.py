"""`math`: the final answer equals the reference, symbolically (math-verify), within a limit that really ends.

Before that answers are brought into the one spelling that math-verify reads, units are taken off, numbers read at sight.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from polyphony.rewards.answers import Source, accepted_answers, bare, final_answer
from polyphony.rewards.registry import tell
from polyphony.rewards.short_answer import normalise
from polyphony.rewards.workers import JobError, KilledError, shared_workers

logger = logging.getLogger(__name__)


_NUMBER = re.compile(
    r"([-+]?)(?:((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/(\d+))?|\\[dt]?frac\{(\d+)\}\{(\d+)\})"
)


_TEXT = r"\\(?:text(?:rm|normal)?|mathrm|mbox)"


_SAYS_MORE = r"[^{}]*\b(?:or|and|but|not|is|are|more|less|than|maybe)\b"


_SHORT_UNITS = r"[ckm]m|[km]g|m[Ll]|in|ft|lb|hr|[ap]\.?m\.?"


_AFTER_A_NUMBER = r"(?:(?<=[\d)}\]])|(?<=\\pi))"


_UNIT = re.compile(  # a letter on its own is a variable unless it is set as text
    rf"(?<=[\w)}}\]])\s*{_TEXT}\{{\s*(?!{_SAYS_MORE})([^{{}}\d]*?)\s*\}}(?:\^\{{?([23])\}}?)?$"
    rf"|{_AFTER_A_NUMBER}\s*(?:\^\{{?\\circ\}}?|\u00b0)\s*(?:{_TEXT}\{{)?\s*([CF]?)\s*\}}?$"
    rf"|{_AFTER_A_NUMBER}\s+(?!{_SAYS_MORE})({_SHORT_UNITS}|[A-Za-z]{{3,}}(?:\s+[A-Za-z]{{3,}})*)(?:\^\{{?([23])\}}?)?$"
)


_CHOICE = (
    r"^(?:\\(?:text|math)(?:bf|rm)?\{ ?\(([A-E])\):? ?\}|\(([A-E])\)(?=[ \\]|$))(?:\\[ ,;]|\\q?quad|[ :~])*"
    r"(?=$|\\?\$|-?\d|-?\\(?:[dt]?frac|sqrt|pi|left)(?![a-z]))"
)
"""The letter of a choice, before its value or instead of one."""


_POWERS = {"sq": "2", "square": "2", "squared": "2", "cubic": "3", "cubed": "3"}


_UNICODE = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u00b2": "^2", "\u00b3": "^3", "\u221e": r"\infty ", "\u00d7": r"\times "}
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)


def _repeating(whole: str, once: str, again: str) -> str:
    """Return the fraction that a decimal without end is."""
    below = 10 ** len(once) * (10 ** len(again) - 1)
    above = int(whole + once + again) - int(whole + once or 0)
    return rf"\frac{{{above}}}{{{below}}}"


_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_CHOICE + r"(?!$)", ""),
        # what only sets it, but for the `\\` that ends a row
        (r"(?<!\\)\\(?:[bB]igg?[lrm]?|left|right|displaystyle|q?quad)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
        # digits in groups
        (r"(?<=\d)(?:,\\!|\{,\}) ?(?=\d{3}(?!\d))", ""),
        (
            r"(?<![\w.,/^])(\d{1,3}(?:(?: |~|\\[,;: ])\d{3})+)(?! ?[\d/]| \\[dt]?frac)",
            lambda found: re.sub(r"\D", "", found[1]),
        ),
        (r"(?<!\\)\\[!,;: ]|~", ""),
        (
            r"(?<![\d.])(\d*)\.(\d{0,9})\\overline\{(\d{1,9})\}",
            lambda found: _repeating(found[1], found[2], found[3]),
        ),
        (r"(?<=\d)\.(?!\d)", ""),  # the point of a number or a sentence
        (r"\\(?:math|text)rm\{ ?([eid]) ?\}", r"\1"),
        (r"_\{ ?\\(max|min) ?\}", r"_{\1}"),
        (r"^\\(?:approx|simeq)(?![A-Za-z])\s*", ""),
        (r"^\\langle(?![A-Za-z])(.*)\\rangle$", r"(\1)"),
        (r"^<([^<>]*,[^<>]*)>$", r"(\1)"),
        # a set of all that fulfil a condition
        (
            r"^\\\{ ?([a-z]) ?(?:\\in ?\\mathbb\{R\} ?)?(?:\\mid|\\colon|[|:]) ?([^{}]*(?:[<>]|\\[lg]eq?)[^{}]*)\\\}$",
            r"\2",
        ),
        (r"(?<![A-Za-z\\])([A-Za-z])('+)(?![A-Za-z'])", lambda found: f"{found[1]}_{{{'prime' * len(found[2])}}}"),
        (r"\u221a ?(\w+|\([^()]*\))", r"\\sqrt{\1}"),
        (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
        (r"(?<=\d)[eE]\+?(-?\d+)\b", r" \\times 10^{\1}"),
        (r"(?<=\d) (\d+)/(\d+)", r"\\frac{\1}{\2}"),  # a mixed number
        (r" ?(?:\\text\{ ?percent\}|\bpercent\b)", r"\\%"),
        (r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", ", "),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"(?<=[\d)}\]])[\s.\\]+$", ""),
    )
]


def undressed(text: str) -> str:
    """Return the expression in the one spelling that math-verify reads, without spacing commands, `$` and `\\left`."""
    text = text.translate(_UNICODE).strip()
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.strip()


def choice(text: str) -> str | None:
    """Return the letter of the choice that an answer names before its value or instead of one; None without a letter."""
    found = re.match(_CHOICE, text)
    return (found[1] or found[2]) if found else None


def without_unit(text: str) -> tuple[str, str]:
    """Return an undressed expression without its unit, and the unit in small letters; "" where it has none.

    Example: `without_unit(r"12 \\text{ square Meters}") -> ("12", "meters^2")`
    """
    found = _UNIT.search(text)
    if not found:
        return text, ""
    words, power, degrees, bare_words, bare_power = found.groups()
    name = f"\u00b0{degrees.lower()}" if degrees is not None else (words or bare_words or "").lower().replace(".", "")
    parts = name.split()
    powers = [_POWERS[part] for part in parts if part in _POWERS] + [p for p in (power, bare_power) if p]
    name = " ".join(part for part in parts if part not in _POWERS)
    return text[: found.start()].strip(), "^".join([name, *powers[:1]])


def plain_number(text: str) -> Fraction | None:
    """Return the number or fraction that a text is, with or without a unit in words; None where it is anything else."""
    found = _NUMBER.fullmatch(without_unit(text)[0])
    if not found:
        return None
    sign, decimal, divisor, above, below = found.groups()
    if not int(divisor or below or 1):
        return None
    size = Fraction((decimal or above).replace(",", "")) / int(divisor or below or 1)
    return -size if sign == "-" else size


_TUPLE = re.compile(r"([(\[])([^()\[\]{}]+)([)\]])")


_VALUES = re.compile(  # in one pair of brackets, at least two
    r"(\\\{|[(\[])(?=.*,)(?:(?!\\mid|\\colon)[^|:<>()\[\]]|[(\[][^()\[\]]*[)\]])*(?:\\\}|[)\]])"
)


_RATIO = re.compile(r"\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+")


_TIME = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}")


_BASED = re.compile(r"(\d+)_\{?(\d+)\}?")


_CHANGES_THE_NUMBER = re.compile(
    r"(?<!\\)\b(?:dozen|hundred|thousand|[mbtr]+illion|squared|cubed|minus|plus|times|over|factorial|sin|cos|tan|log|exp)\b",
    re.IGNORECASE,
)


_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")


_SET_AS_TEXT = re.compile(r"\\text\{([^{}]*)\}")


_WORDS = re.compile(r"\\text\{([A-Za-z ,.'-]+)\}|([A-Za-z'-]{4,}|[A-Za-z'-]+(?: [A-Za-z'-]+)+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Math:
    """1.0 where the completion's final answer equals the row's `answer`, or one of several it accepts, else 0.0.

    An answer that exhausts the comparison is wrong. None where the reference can not be read, be it its shape
    (`polyphony.rewards.answers`) or its mathematics, and where a worker was killed from outside.
    """

    version: ClassVar[int] = 2

    sources: Sequence[Source] = ("tag", "boxed", "marker", "number")
    """Where the answer may stand, first match first; leave out `number` to ask for a marked answer."""
    timeout_s: float = 3.0
    """Processor time for one comparison; one that simplifies at all does so in well under a second."""
    workers: int | None = None
    """Processes; None takes one a core, at most 16."""
    max_answer_chars: int = 1000
    """A longer final answer is none: it scores 0 without being read."""

    def __post_init__(self) -> None:
        unknown = set(self.sources) - {"tag", "boxed", "marker", "number"}
        if unknown or not self.sources:
            raise ValueError(f"math: sources are of tag, boxed, marker, number; got {self.sources!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"math: timeout_s must be > 0, got {self.timeout_s}")

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        answer: list,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        rows = [
            [(final_answer(completion, prompt, self.sources), reference) for reference in _references(accepted)]
            for prompt, completion, accepted in zip(prompts, completions, answer, strict=True)
        ]
        verdicts = {pair: self._at_sight(*pair) for pair in dict.fromkeys(pair for row in rows for pair in row)}
        open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        compared, exhausted = self._compare(open_pairs)
        verdicts |= compared
        scores = [_best([verdicts[pair] for pair in row]) for row in rows]
        graded = [(row, score) for row, score in zip(rows, scores, strict=True) if score is not None]
        tell(log_metric, exhausted=[not score and not exhausted.isdisjoint(row) for row, score in graded])
        return scores

    def is_valid(self, text: str) -> bool:
        """Say whether a text commits to an answer."""
        return bool(final_answer(text, sources=self.sources))

    def unreadable(self, answer: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference has no shape that is read, None where it has; its mathematics may still have none."""
        return None if _references(answer) else f"{answer!r:.60} is no expression and no list of such"

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> Hashable:
        """Return the final answer of a completion, equal for spellings of one number or word; None where there is none."""
        given = final_answer(completion, prompt, self.sources)
        if not given or len(given) > self.max_answer_chars or _contradicts_itself(given):
            return None
        return reading(given)

    def _at_sight(self, given: str | None, reference: str) -> bool | None:
        """Return the verdict where nothing must be parsed; None where it must."""
        if not given or len(given) > self.max_answer_chars or _contradicts_itself(given):
            return False
        return equal_at_sight(given, reference)

    def _compare(self, pairs: list[_Pair]) -> tuple[dict[_Pair, bool | None], set[_Pair]]:
        """Return the verdicts on pairs, and those that are wrong as the answer exhausts the comparison."""
        workers = shared_workers(
            "polyphony.rewards.math_worker:equivalent", size=self.workers, timeout_s=self.timeout_s
        )
        answers = workers.map([_job(given or "", reference) for given, reference in pairs])
        failed = [p for p, verdict in zip(pairs, answers, strict=True) if _is_own_doing(verdict)]
        suspects = list(dict.fromkeys(reference for _, reference in failed))
        probes = workers.map([_job("0", reference) for reference in suspects])  # the reference may have done it
        innocent = {r for r, verdict in zip(suspects, probes, strict=True) if isinstance(verdict, bool)}
        verdicts = {pair: _verdict(*pair, answer, innocent) for pair, answer in zip(pairs, answers, strict=True)}
        return verdicts, {pair for pair in failed if pair[1] in innocent}


_Pair = tuple[str | None, str]
"""What was answered, and a reference."""


def _job(given: str, reference: str) -> dict[str, str]:
    (ours, our_unit), (theirs, their_unit) = without_unit(undressed(given)), without_unit(undressed(reference))
    units = {"answer_unit": our_unit, "reference_unit": their_unit} if our_unit and their_unit else {}
    return {"answer": ours, "reference": theirs, **units}


def _is_own_doing(verdict: Any) -> bool:
    return isinstance(verdict, JobError) and not isinstance(verdict, KilledError)


def _verdict(given: str | None, reference: str, answer: Any, innocent: set[str]) -> bool | None:
    """Return a worker's answer, or what its failure means."""
    if isinstance(answer, bool):
        return answer
    if _is_own_doing(answer) and reference in innocent:
        logger.warning("math: 0 for %.80r, which exhausts the grader: %s", given, answer)
        return False
    why = answer or "the reference can not be read"
    logger.warning("math: no verdict on %.80r against %.80r: %s", given, reference, why)
    return None


def _best(verdicts: list[bool | None]) -> float | None:
    """Return the reward of a row from the verdicts on each reference that it accepts."""
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(any(known)) if known else None


def equal_at_sight(given: str, reference: str) -> bool | None:
    """Compare numbers, words, ratios and kinds of brackets without algebra; None where that decides nothing."""
    ours, theirs = undressed(given), undressed(reference)
    letter, other = choice(given) or given.strip("() "), choice(reference)
    if ours == theirs or letter == other:
        return letter == other or not (choice(given) and other)  # one value under two letters is a contradiction
    if _CHANGES_THE_NUMBER.findall(ours) != _CHANGES_THE_NUMBER.findall(theirs):
        return False  # math-verify drops words: 4 million would equal 4
    words = _WORDS.fullmatch(theirs)
    if words:  # as algebra a word is the product of its letters, and equals its anagrams
        return normalise(_SET_AS_TEXT.sub(r"\1", ours)) == normalise(words[1] or words[2])
    (ours, our_unit), (theirs, their_unit) = without_unit(ours), without_unit(theirs)
    if our_unit and their_unit and our_unit != their_unit:
        return None
    for decide in (_same_based, _same_ratio, _same_numbers):
        verdict = decide(ours, theirs)
        if verdict is not None:
            return verdict
    brackets = [found[1] for side in (ours, theirs) if (found := _VALUES.fullmatch(side))]
    return False if len(brackets) == 2 and brackets.count("\\{") == 1 else None  # a set is no tuple


def reading(given: str) -> Hashable:
    """Return what an answer says, without algebra: equal only where `equal_at_sight` would not tell two answers apart.

    Of an equation its last side; numbers and tuples of numbers by value, with their unit, words normalised, all else letter
    for letter.
    """
    text = undressed(_EQUALS.split(given)[-1]) or undressed(given)
    words, (bare_text, unit) = _WORDS.fullmatch(text), without_unit(text)
    spelt = normalise(words[1] or words[2]) if words else "".join(text.split())
    return tuple(_CHANGES_THE_NUMBER.findall(text)), unit, _numbers(bare_text) or spelt


def _same_based(ours: str, theirs: str) -> bool | None:
    """Compare numbers to a base, which math-verify drops. An answer may leave out the base that was asked for."""
    given, reference = _BASED.fullmatch(ours), _BASED.fullmatch(theirs)
    if not given or (not reference and not theirs.isdecimal()):
        return reference and ours == reference[1]
    if reference:
        return given.groups() == reference.groups()
    base = int(given[2])
    return 2 <= base <= 10 and all(int(digit) < base for digit in given[1]) and int(given[1], base) == int(theirs)


def _same_ratio(ours: str, theirs: str) -> bool | None:
    """Compare ratios up to a factor, but what may be two times of day as it stands."""
    if not (_RATIO.fullmatch(ours) and _RATIO.fullmatch(theirs)):
        return None
    a, b = ([Fraction(part.strip()) for part in side.split(":")] for side in (ours, theirs))
    if (_TIME.fullmatch(ours) and _TIME.fullmatch(theirs)) or not (any(a) and any(b)):
        return a == b
    return len(a) == len(b) and all(x * sum(b) == y * sum(a) for x, y in zip(a, b, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool | None:
    """Compare numbers and tuples of numbers; None where one is no such thing or may be the other's rounding."""
    a, b = _numbers(ours), _numbers(theirs)
    if not a or not b:
        return None
    return (
        a == b if a == b or "." not in ours + theirs or not ("/" in ours + theirs or "frac" in ours + theirs) else None
    )


def _numbers(text: str) -> tuple[Any, ...]:
    """Return a number, or the brackets and numbers of a tuple; empty where the text is neither."""
    whole = _TUPLE.fullmatch(text)
    parts = [plain_number(part.strip()) for part in (whole[2].split(",") if whole else [text])]
    if None in parts:
        return ()
    return (whole[1], *parts, whole[3]) if whole and len(parts) > 1 else tuple(parts)


def _contradicts_itself(given: str) -> bool:
    """Say whether an equation claims that two different numbers are equal: `3 = 4` must not pass for either."""
    numbers = {plain_number(undressed(part)) for part in given.split("=")} - {None}
    return len(numbers) > 1


@functools.lru_cache
def _say_unread(what: str) -> None:
    logger.warning("math: no verdict: the reference %s", what)


def _references(accepted: Any) -> list[str]:
    """Return a row's references as expressions, cleaned as an answer is."""
    texts = [
        final_answer(text, sources=["boxed"]) or bare(text.rpartition("####")[2]) for text in accepted_answers(accepted)
    ]
    if not any(texts):
        _say_unread("is missing" if accepted is None else f"{accepted!r:.80} is no expression and no list of such")
    return [text for text in texts if text]
