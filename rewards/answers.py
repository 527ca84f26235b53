"""Find the answer a completion commits to: its last tag, its last box, its last "answer:" line or its last number.

What comes before a closing `</think>` is thought, not answer; a prompt that is repeated word for word is not an answer
either. Every search is linear in the text and reads only its end, so a huge completion costs no more than a long one.

A completion is text, whether TRL hands it over as a string or as messages (`completion_text`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]{0,3}([\w+-]*)[^\n]*\n", re.MULTILINE)


_CLOSING = re.compile(r"\n[ \t]{0,3}```")


def completion_text(completion: str | list[dict]) -> str:
    """Return the text: the string itself, or the contents of the assistant's messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each fenced block in order; a block that is cut off reaches to the end."""
    blocks, position = [], 0
    while opening := _FENCE.search(text, position):
        closing = _CLOSING.search(text, opening.end() - 1)
        content = text[opening.end() : closing.start() if closing else None]
        indented = opening[0][0] in " \t"  # a block of a list's entry
        blocks.append((opening[1].lower(), textwrap.dedent(content) if indented else content))
        position = closing.end() if closing else len(text)
    return blocks


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


_BETWEEN_BOXES = re.compile(r"[\s$,;.&\\]{0,12}(?:(?:and|or|\\text\{ ?(?:and|or) ?\})[\s$,;\\]{0,12})?")


def answer_region(completion: Any, prompt: Any = None) -> str:
    """Return the part of the completion that may hold its answer; empty where a thought was never finished."""
    text = completion_text(completion)[-READ_CHARS:]
    head, closed, tail = text.rpartition("</think>")
    text = tail if closed else text
    if not closed and "<think>" in head + tail:
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
            return _bare(found if inner is None else inner)
    return None


def unlatexed(text: str) -> str:
    """Return an answer in words without LaTeX's commands for fonts: `\\text{Paris}` is Paris."""
    return _FONT.sub(r"\1", text)


def _prompt_texts(prompt: Any) -> list[str]:
    if prompt is None:
        return []
    messages = [prompt] if isinstance(prompt, str) else [str(message.get("content") or "") for message in prompt]
    return [message.strip() for message in messages]


def _bare(answer: str) -> str:
    """Drop what surrounds an answer without being part of it: white space, Markdown's marks, a closing full stop."""
    answer = answer.strip().strip("*`").strip()
    return answer[:-1].rstrip("*` ") if answer.endswith(".") else answer


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
