"""Find the answer a completion commits to: its last tag, its last box, its last "answer:" line or its last number.

What comes before a closing `</think>` is thought, not answer; a prompt that is repeated word for word is not an answer
either. Every search is linear in the text and reads only its end, so a huge completion costs no more than a long one.

A completion is text, whether TRL hands it over as a string or as messages (`completion_text`).

`accepted_answers` has the shapes in which a row's reference answer comes: a text; a number (a float that is whole, as
Parquet makes of integers with gaps, is that integer); a list of accepted answers; an object as Search-R1 (`target`),
TriviaQA (`value`, `aliases`), SQuAD (`text`) or verl (`ground_truth`) write it; JSON or Python text of a list of texts
or of such an object. Anything else is unreadable, never its `str()`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_FENCE = re.compile(r"^([ \t]{0,16})(`{3,}|~{3,})([ \t]{0,3}[\w+-]*)[^\n]*\n?", re.MULTILINE)


def completion_text(completion: str | list[dict]) -> str:
    """Return the text: the string itself, or the contents of the assistant's messages joined by newlines.

    Of several turns, of those after the last that somebody else said: what was said before a tool's answer is no answer.
    """
    if isinstance(completion, str):
        return completion
    others = [i for i, message in enumerate(completion) if message.get("role") != "assistant"]
    completion = completion[others[-1] + 1 :] if others else completion
    return "\n".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each fenced block in order; a block that is cut off reaches to the end.

    A block of Markdown that holds blocks is those. A fence that names a language begins a block wherever it stands.
    """
    blocks, fences, position = [], list(_FENCE.finditer(text)), 0
    while position < len(fences):
        opening = fences[position]
        after = _fence_after(fences, position)
        end = len(fences) if after is None else after
        is_closed = after is not None and not _begins(fences[after])
        content = textwrap.dedent(text[opening.end() : None if after is None else fences[after].start()])
        language = opening[3].strip().lower()
        nested = fenced_blocks(content) if language in ("", "md", "markdown") else []
        blocks += nested or [(language, content if after is None else content.removesuffix("\n"))]
        position = end + is_closed
    return blocks


def _fence_after(fences: list[re.Match], position: int) -> int | None:
    """Return which fence ends the block that begins at `position`: that closes it, or begins the next one.

    A fence deeper than CommonMark lets it stand is the program's, as in a docstring, unless no other closes the block.
    """
    opening, deeper = fences[position], None
    for number in range(position + 1, len(fences)):
        fence = fences[number]
        if not fence[2].startswith(opening[2]):
            continue
        if len(fence[1]) <= len(opening[1]) + 3:
            return deeper if _begins(fence) and deeper is not None else number
        if not _begins(fence):
            deeper = number
    return deeper


def _begins(fence: re.Match) -> bool:
    """Say whether a fence names a language, so that it can close nothing; a word behind a space may be a remark."""
    return fence[3].strip() != "" and fence[3][0] not in " \t"


Source = Literal["tag", "boxed", "marker", "number"]


READ_CHARS = 100_000
"""An answer stands at the end; what is further from it than this is not read."""


ECHO_CHARS = 12
"""A shorter prompt line may well be an answer ("Paris") and is never taken for an echo."""


ANSWER_WORDS = r"\b(?:answer|(?:correct|right) (?:option|choice))\*{0,2}[ \t]{0,4}(?:is|:|=)"
"""How an answer is announced in words; to be matched in any case."""


_MARKER = re.compile(
    rf"(?:{ANSWER_WORDS}|####(?=[ \t]{{0,4}}[-$\d(\\]))[\s:=*]{{0,8}}(?:(?:\\\[|\$\$)\s{{0,4}}\n)?", re.IGNORECASE
)


_EXPLANATION = re.compile(r"[,;]?\s+\(?(?:because|since)\s|(?<=[\d$})])\.\s+(?=[A-Z])")


_POWER = r"\^(?:-?\d+|\{-?\d+\})"


_NUMBER = re.compile(  # a minus between two numbers is a range; the exponent of 10^8 is no number of its own
    r"(?:(?<![\w)\]}])-)?(?:\\[dt]?frac\{-?\d+\}\{\d+\}|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
    rf"(?:[eE][-+]?\d+)?(?:{_POWER})?(?: ?(?:\\times|\\cdot|\u00d7|\*) ?10{_POWER})?(?: ?\\?%)?"
)


_FONT = re.compile(r"\\(?:text|math|m)(?:bf|it|rm|box)?\{([^{}]*)\}")


_BRACE = re.compile(r"\\boxed ?\{|\\[{}]|[{}]")


_SET = r"\\(?:text\w*|math\w+|mbox)"


_SPACE_BETWEEN = rf"(?:[\s$~&]|\\\\|\\[()\[\],;:! ]|\\q?quad(?![a-z])|{_SET}\{{\s*\}})"


_AND = rf"(?:[,;]|(?:and|or)(?![a-z])|\\(?:l?or|l?and|vee|wedge)(?![a-z])|{_SET}\{{[\s,]*(?:and|or)[\s,]*\}})"


_BETWEEN_BOXES = re.compile(  # `x =` may stand before a further box that is announced by a word or a comma
    rf"{_SPACE_BETWEEN}{{0,12}}(?:\.?{_SPACE_BETWEEN}{{0,12}}|(?:{_AND}{_SPACE_BETWEEN}{{0,12}}){{1,2}}"
    rf"(?:[A-Za-z](?:_\{{?\w{{1,3}}\}}?)?\s{{0,2}}=\s{{0,2}})?)"
)


def answer_region(completion: Any, prompt: Any = None) -> str:
    """Return the part of the completion that may hold its answer; empty where a thought was never finished.

    A further thought that was begun after it and never finished is no part of it either.
    """
    text = completion_text(completion)[-READ_CHARS:]
    _, closed, tail = text.rpartition("</think>")
    text, begun, _ = tail.partition("<think>")
    if begun and not closed:
        return ""
    for message in _prompt_texts(prompt):
        if len(message) >= ECHO_CHARS:
            text = text.replace(message, "\n")
    return text.strip()


def final_answer(
    completion: Any, prompt: Any = None, sources: Sequence[Source] = ("tag", "boxed", "marker")
) -> str | None:
    """Return what the completion commits to by the first of `sources` that it uses; None where it uses none.

    Boxes that only a comma, `and` or `or` separates are one answer of several parts, so naming two values earns
    nothing where one is asked for; otherwise the last box counts.
    """
    text = answer_region(completion, prompt)
    for source in sources:
        found = _FINDERS[source](text, prompt)
        if found is not None:
            inner = _boxed(found, None) if source in ("tag", "marker") else None
            return bare(found if inner is None else inner)
    return None


def bare(answer: str) -> str:
    """Drop what surrounds an answer without being part of it: white space, Markdown's marks, a closing full stop."""
    answer = answer.strip().strip("*`").strip()
    return answer[:-1].rstrip("*` ") if answer.endswith(".") else answer


def unlatexed(text: str) -> str:
    """Return an answer in words without LaTeX's commands for fonts: `\\text{Paris}` is Paris."""
    return _FONT.sub(r"\1", text)


def _prompt_texts(prompt: Any) -> list[str]:
    if prompt is None:
        return []
    messages = [prompt] if isinstance(prompt, str) else [str(message.get("content") or "") for message in prompt]
    return [message.strip() for message in messages]


def _tag(text: str, _prompt: Any) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _boxed(text: str, _prompt: Any) -> str | None:
    """Return the last run of closed boxes, its parts joined by commas."""
    parts: list[str] = []
    begin = len(text)
    for start, inside, close in reversed(_boxes(text)):
        if start >= begin:
            continue  # lies inside a box already taken
        if parts and not _BETWEEN_BOXES.fullmatch(text[close + 1 : begin]):
            break
        parts.append(text[inside:close].strip())
        begin = start
    return ", ".join(dict.fromkeys(reversed(parts))) if parts else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Return (start, start of the content, closing brace) of every closed box, in the order of their ends."""
    found, open_braces = [], []
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            start, inside = open_braces.pop() if open_braces else (None, 0)
            if start is not None:
                found.append((start, inside, match.start()))
        elif match[0] != "\\{" and match[0] != "\\}":
            open_braces.append((match.start() if match[0] != "{" else None, match.end()))
    return found


def _marker(text: str, _prompt: Any) -> str | None:
    """Return what follows the last marker on its line, or on the next line with something on it, without its reason."""
    found = None
    for marker in _MARKER.finditer(text):
        if text[marker.end() : marker.end() + 1].strip():
            found = marker
    return _EXPLANATION.split(text[found.end() :].partition("\n")[0], maxsplit=1)[0] if found else None


def _number(text: str, prompt: Any) -> str | None:
    for line in "\n".join(_prompt_texts(prompt)).splitlines():
        if len(line.strip()) >= ECHO_CHARS:
            text = text.replace(line.strip(), "\n")
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    return numbers[-1] if numbers else None


_FINDERS = {"tag": _tag, "boxed": _boxed, "marker": _marker, "number": _number}


_NAMES = ("target", "value", "aliases", "normalized_aliases", "text", "ground_truth", "answer", "answers")
"""Under which names an object holds accepted answers; all that it has are read."""


def accepted_answers(reference: Any) -> list[str]:
    """Return the answers that a row accepts, without repetitions; empty where the reference can not be read.

    Example: `accepted_answers({"target": ["Oslo", 4.0]}) -> ["Oslo", "4"]`
    """
    found = _texts(_unpacked(reference) if isinstance(reference, str) else reference)
    return list(dict.fromkeys(text.strip() for text in found or [] if text.strip()))


def _texts(reference: Any) -> list[str] | None:
    """Return all texts of a reference; None where a part of it can not be read. Parquet's nulls in lists are nothing."""
    if hasattr(reference, "tolist"):  # NumPy's arrays and numbers
        reference = reference.tolist()
    if isinstance(reference, str):
        return [reference]
    if isinstance(reference, numbers.Real) and not isinstance(reference, bool):
        return [_is_number(reference)] if math.isfinite(reference) else None
    if isinstance(reference, Mapping):
        reference = [reference[name] for name in _NAMES if reference.get(name) is not None] or None
    if not isinstance(reference, list | tuple):
        return None
    parts = [_texts(part) for part in reference if part is not None]
    return None if None in parts else [text for part in parts if part for text in part]


def _is_number(number: numbers.Real) -> str:
    if isinstance(number, float):  # 15 digits hold in a double; further ones are noise of arithmetic
        return str(int(number)) if number.is_integer() else f"{number:.15g}"
    return str(number)


def _unpacked(text: str) -> Any:
    """Return the list or object that a text writes down, or the text.

    A list of numbers stays text: it is an interval, a vector or an answer of several parts.
    """
    for read in (json.loads, ast.literal_eval) if text.strip()[:1] in ("[", "{") and len(text) < 10_000 else ():
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = read(text.strip())
            if isinstance(found, dict) or (
                isinstance(found, list) and found and all(isinstance(part, str) for part in found)
            ):
                return found
    return text
