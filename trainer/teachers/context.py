"""What a teacher reads and the policy does not: a template with fields of the row, in the place of the last message."""

from __future__ import annotations

from dataclasses import replace
from string import Formatter

from polyphony.curricula.records import Prompt

PROMPT = "prompt"
"""The field of a template that stands for what the policy reads."""


def fields_of(context: str) -> tuple[str, ...]:
    """Return the fields of a template, each once. Raises ValueError for one that is more than a name."""
    try:
        parts = list(Formatter().parse(context))
    except ValueError as error:
        raise ValueError(f"{error}: braces hold a field of the row, {{{{ and }}}} stand for themselves") from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ValueError(
                f"field {{{name}}}: expected the name of a field of the row; {{{{ and }}}} stand for braces"
            )
    return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def in_context(context: str, prompt: Prompt) -> Prompt:
    """Return the prompt as a teacher with this context reads it. Raises ValueError for a field that the row lacks.

    Example: `in_context("{prompt} Answer: {answer}", prompt)` changes `2+2=` of a row with answer 4 to `2+2= Answer: 4`.
    """
    messages = prompt.prompt
    said = messages if isinstance(messages, str) else messages[-1]["content"]
    if not isinstance(said, str):
        raise ValueError(f"domain {prompt.domain!r}: prompt {prompt.id!r} ends with a message that is no text")
    values = {PROMPT: said}
    for name in fields_of(context):
        if name != PROMPT and (value := prompt.columns.get(name)) is None:
            raise ValueError(
                f"domain {prompt.domain!r}: row {prompt.id!r} has no field {name!r}, which the context names"
            )
        if name != PROMPT:
            values[name] = str(value)
    text = (context if PROMPT in fields_of(context) else context + "\n\n{prompt}").format(**values)
    if isinstance(messages, str):
        return replace(prompt, prompt=text, ids=())
    return replace(prompt, prompt=[*messages[:-1], {**messages[-1], "content": text}], ids=())
