"""`multiple_choice`: the letter the completion commits to.

A choice of four pays a quarter for guessing.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from polyphony.rewards.answers import answer_region, final_answer, unlatexed
from polyphony.rewards.registry import refusal
from polyphony.rewards.short_answer import normalise

logger = logging.getLogger(__name__)

_MARKER = re.compile(
    r"""(?<![A-Za-z])(?:ans(?:wer(?:\ to\ th(?:e|is)\ question)?)?
           |(?:correct|right|best|final)\ (?:option|choice|statement|response|letter|one))
        (?:["'*_]{0,4}|,\ (?:therefore|then|thus|hence),)[ \t]{0,4}
        (?:is(?![a-mo-z])(?!\ (?:correct|right|clear|obvious)\b)  # before n't too: "isn't B, it's A" commits as well
           |(?:must|should|would|will|has\ to)\ be\b|[:：=]|[-–—](?=[ \t]))
      |答案[ \t]{0,4}(?:应?该?[是为选]|[:：])[:：]?""",
    re.IGNORECASE | re.VERBOSE,
)
_LEAD = re.compile(  # what may stand before a choice and says nothing but that it comes
    r"""(?:so|thus|hence|therefore|then|finally|in\ conclusion|overall|of\ (?:the|these)\ (?:four\ )?(?:choices|options)
        |(?:given|based\ on|among|from|considering|according\ to)\ [^,.;\n]{1,60}(?=,)
        |correct(?=:)|(?:no|wait|actually)(?=,)|we\ (?:get|have)
        |(?:I|we)(?:\ would|\ will|['’]d|['’]ll)?\ (?:think|believe|say|choose|pick|select|go\ with|go\ for|answer)
         (?:\ that)?|I(?:['’]m|\ am)\ going\ (?:with|for)
        |my\ (?:choice|pick)\ is|it(?:\ is|['’]s|\ must\ be|\ should\ be|\ has\ to\ be)|definitely|clearly|certainly
        |obviously|indeed|surely|simply|the\ letter|selected|letter
        |(?:the\ )?(?:correct\ |right\ |final\ )?(?:option|choice|answer)
        |(?:not|n['’]t)\ [(]?[A-Z][)]?[,;]?\ (?:but\ rather|but|it\ is|it['’]s|rather))[\s:：,—–-]{1,4}
      |(?:所以|因此|故)(?=选)|选项?(?=[A-Z])""",
    re.IGNORECASE | re.VERBOSE,
)
_LETTER = re.compile(r"[(\[]{0,3}([A-Za-z])(?![\w'’+#])[)\]]{0,3}")
_IS_RIGHT = re.compile(
    r"\s+is (?:the )?(?:correct|right|best|answer)(?: (?:answer|option|choice|one))?(?=[\s.,;:!]|\Z)"
)
_SEPARATOR = re.compile(r"\s{0,3}(?:[.:：,;!。]{1,3}|[—–-](?=\s))?\s{0,3}")
_REASON = re.compile(
    r"[,;.]?\s+\(?(?:(?:because|since|as(?! well)|rather than|instead of)\s|not \(?[A-Z]\b)", re.IGNORECASE
)
_ITEM = re.compile(r"\A(?:(?:[-–>→#=]{1,4}|[:：])\s{1,4})+")
"""What may stand before a line: the marks of lists, titles and conclusions."""
_EXPLAINING = re.compile(r"[.:：,;!。]|\s+[—–-]\s")
_TRAILING = re.compile(r"(\S.*?)\s*\(([A-Z])\)")
_FURTHER = re.compile(r"(?i:or|and|nor|but)\b|\W{0,3}[A-Z]\b(?!['’])")
_ANOTHER = re.compile(
    r"\b(?i:or|and|both|but|however|actually|wait|maybe|perhaps|possibly|instead|also|either)\b[^.]{0,40}?[\s(]([B-HJ-Z])\b"
    r"|\b([B-HJ-Z]|A(?= is\b))\)? (?:is|may be|might be|could be|seems) (?:\w+ )?(?:correct|right|possible|true)\b"
)
_SET = re.compile(r"\*\*|__|[\"“”`$]|\\[()\[\]]|(?<!\w)'(?=[A-Za-z]'(?!\w))|(?<=(?<!\w)'[A-Za-z])'(?!\w)")
"""Marks that set a text and are no part of it; apostrophes only around one letter."""


class MultipleChoice:
    """1.0 where the completion commits to the row's `answer`, else 0.0; None where the row can not be read.

    `answer` is a letter, `B. Paris`, a choice's text or its index from 0. With the column `choices` (the texts in
    order, or by their labels) the text of a choice counts as its letter. An answer that names two letters, or a letter
    and the text of another choice, commits to none.
    """

    version: ClassVar[int] = 2

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        answer: list,
        choices: list | None = None,
        **columns: Any,
    ) -> list[float | None]:
        rows = zip(prompts, completions, answer, choices or [None] * len(answer), strict=True)
        return [_score(*row) for row in rows]

    def unreadable(self, answer: Any = None, choices: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference can not be read; None where it can."""
        return refusal(right_letter, answer, choices)

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> str | None:
        """Return the letter that a completion commits to."""
        return chosen_letter(completion, columns.get("choices"), prompt)


def _score(prompt: Any, completion: Any, answer: Any, choices: Any) -> float | None:
    try:
        right = right_letter(answer, choices)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return float(chosen_letter(completion, choices, prompt) == right)


def chosen_letter(completion: Any, choices: Any, prompt: Any = None) -> str | None:
    """Return the letter that a completion commits to; None where it commits to none or to several.

    The last tag or box counts, else what follows the last "the answer is". Without a mark the answer stands on the
    first or the last line; a list of all choices has two such lines.
    """
    names = choice_names(choices)
    marked = final_answer(completion, prompt, ("tag", "boxed"))
    region = answer_region(completion, prompt) if marked is None else marked
    announced = [marker.end() for marker in _MARKER.finditer(region) if region[marker.end() :][:1000].strip()]
    if announced:
        return _committed(region[announced[-1] :].strip().partition("\n")[0], names, is_marked=True)
    if marked is not None:
        return _committed(marked, names, is_marked=True)
    lines = [line for line in region.split("\n") if line.strip()]
    found = {_committed(line, names) for line in (*lines[:1], *lines[-1:])} - {None}
    return found.pop() if len(found) == 1 else None


def _committed(answer: str, names: Mapping[str, tuple[str, ...]], is_marked: bool = False) -> str | None:
    """Return the letter of an answer that is a letter, the text of a choice, or both of the same choice.

    Marked as the answer, or with a reason, the letter may be explained: `B. It lies in France`.
    """
    answer = _plain(answer)
    body = _without_lead(answer).rstrip(".!。 ")
    whole = _letter_of_text(answer, names) or _letter_of_text(body, names)
    if trailing := _TRAILING.fullmatch(body):
        return trailing[2] if _letter_of_text(trailing[1], names) == trailing[2] else whole
    letter = _LETTER.match(body)
    if not letter:
        return whole or _letter_of_text(_without_end(body), names)
    said = _IS_RIGHT.match(body, letter.end())
    rest = body[said.end() if said else letter.end() :]
    if not rest.strip(" .:：!。*"):
        return letter[1].upper()
    exact = _letter_of_text(body, names, str.casefold)
    if exact or not letter[1].isupper():
        return exact or whole
    explanation = rest[_SEPARATOR.match(rest).end() :]  # type: ignore[union-attr]  # it matches the empty text
    named = _letter_of_text(explanation, names)
    if letter[1] in (named, whole):
        return letter[1]
    is_announced = is_marked or said or body != answer.rstrip(".!。 ") or not names
    is_separate = _EXPLAINING.match(rest) or letter[0][-1] in ")]"
    if _REASON.match(rest) or (is_announced and is_separate and not named):
        return None if _FURTHER.match(explanation) or _names_another(explanation, letter[1]) else letter[1]
    return whole if rest[0] == " " and explanation[:1].islower() else None  # the article of "A dog"


def _without_end(text: str) -> str:
    """Return a choice's text without its reason and without "is the right answer"."""
    text = _REASON.split(text)[0]
    end = _IS_RIGHT.search(text)
    return text[: end.start()] if end and end.end() == len(text) else text


def _names_another(explanation: str, letter: str) -> bool:
    others = {found for match in _ANOTHER.finditer(explanation) for found in match.groups() if found}
    for sentence in re.split(r"[.;!]\s+", explanation)[:20]:
        if lone := _LETTER.fullmatch(_without_lead(sentence).strip(" .!")):
            others.add(lone[1].upper())
    return bool(others - {letter})


def _without_lead(text: str) -> str:
    while lead := _LEAD.match(text):
        text = text[lead.end() :]
    return text


def _plain(answer: str) -> str:
    text = " ".join(_SET.sub("", unlatexed(answer)).split())
    return _ITEM.sub("", "".join(c for c in text if c.isprintable())).strip("*_{} ")


def choice_names(choices: Any) -> dict[str, tuple[str, ...]]:
    """Return what each of a row's choices is called, by letter; empty without choices.

    Read: a list of texts, `{"A": text, ..}`, `{"label": [..], "text": [..]}` (ARC), a list of `{"label", "text"}`, and
    the JSON of these. Where labels are no letters (ARC's "1" to "4"), letters count the choices, and the label is a
    name too. Nulls, which tables fill in, are no choices. Raises ValueError where nothing can be read.
    """
    labelled = {} if choices is None else _labelled(choices)
    if all(label in string.ascii_uppercase for label in labelled):
        return {label: (text,) for label, text in labelled.items()}
    numbered = zip(string.ascii_uppercase, labelled.items(), strict=False)
    return {letter: (text, label, f"{label} {text}") for letter, (label, text) in numbered}


def _labelled(choices: Any) -> dict[str, str]:
    given = choices
    try:
        if isinstance(choices, str):
            choices = json.loads(choices)
        if isinstance(choices, Mapping) and isinstance(choices.get("text"), list | tuple):
            choices = dict(zip(choices["label"], choices["text"], strict=True))
        elif isinstance(choices, list | tuple) and choices and all(isinstance(c, Mapping) for c in choices):
            choices = {c["label"]: c["text"] for c in choices}
        elif isinstance(choices, list | tuple):
            choices = dict(zip(string.ascii_uppercase, choices, strict=False))
        named = {str(label).strip("(). ").upper(): text for label, text in choices.items() if text is not None}
        if not all(label and isinstance(text, str | int | float) for label, text in named.items()):
            raise ValueError("a choice is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"multiple_choice: choices must be texts, in order or by label, got {given!r:.100}: {error}"
        ) from None
    return {label: str(text) for label, text in named.items()}


def right_letter(answer: Any, choices: Any = None) -> str:
    """Return the letter of a row's answer. Raises ValueError where it is none of the choices."""
    names = choice_names(choices)
    letters = "".join(names) or string.ascii_uppercase
    plain = answer[0] if isinstance(answer, list | tuple) and len(answer) == 1 else answer
    letter = _letter_of_index(plain, letters) if isinstance(plain, int | float) else None
    if isinstance(plain, str):
        label = plain.strip().strip("().").upper()
        letter = label if len(label) == 1 and label in letters else _letter_of_reference(plain.strip(), names)
    elif letter and isinstance(choices, list) and plain in choices and choices.index(plain) != plain:
        letter = None  # of 2, 3 and 5: is 2 the first or the last?
    if letter is None or letter not in letters:
        raise ValueError(
            f"multiple_choice: answer must be one letter of {letters[0]} to {letters[-1]}, the text of a choice or its "
            f"index from 0, got {answer!r:.100}"
        )
    return letter


def _letter_of_index(index: float, letters: str) -> str | None:
    """Return the letter of a number; tables make floats of integers."""
    if isinstance(index, bool) or index not in range(len(letters)):
        return None
    return letters[int(index)]


def _letter_of_reference(answer: str, names: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return the letter of a choice's text, or of `B. Paris` where that is B's text."""
    whole = _letter_of_text(answer, names)
    leading = re.fullmatch(r"\(?([A-Z])[).:]+\s+(\S.*)", answer)
    if whole or not leading or (names and _letter_of_text(leading[2], names) != leading[1]):
        return whole
    return leading[1]


def _letter_of_text(
    text: str, names: Mapping[str, tuple[str, ...]], fold: Callable[[str], str] = normalise
) -> str | None:
    given = fold(text)
    matches = [letter for letter, known in names.items() if given in map(fold, known)]
    return matches[0] if given and len(matches) == 1 else None
