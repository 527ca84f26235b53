"""What a teacher reads and the policy does not: a template in the place of the last message.

Its fields are the row's, and three of the very completion that is scored (arXiv:2606.11173 distils from such feedback).
"""

from __future__ import annotations

from dataclasses import replace
from string import Formatter

from polyphony.curricula.records import Completion, Prompt

PROMPT = "prompt"
"""The field of a template that stands for what the policy reads."""
ATTEMPT, REWARD, FEEDBACK = "attempt", "reward", "feedback"
"""Those that stand for the completion: its text; its reward; what its reward told of it, else the reward in words."""
OF_ATTEMPT = (ATTEMPT, REWARD, FEEDBACK)


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


def in_context(context: str, prompt: Prompt, attempt: Completion | None = None) -> Prompt:
    """Return the prompt as a teacher with this context reads it; the attempt's fields are empty without one.

    Raises ValueError for a field that the row lacks, and for one of the attempt's that the row has too.

    Example: `in_context("{prompt} Answer: {answer}", prompt)` changes `2+2=` of a row with answer 4 to `2+2= Answer: 4`.
    """
    messages = prompt.prompt
    said = messages if isinstance(messages, str) else messages[-1]["content"]
    if not isinstance(said, str):
        raise ValueError(f"domain {prompt.domain!r}: prompt {prompt.id!r} ends with a message that is no text")
    values = {PROMPT: said}
    for name in fields_of(context):
        if name in OF_ATTEMPT and name in prompt.columns:
            raise ValueError(
                f"domain {prompt.domain!r}: row {prompt.id!r} has a field {name!r}, which in a context is the attempt's"
            )
        if name in OF_ATTEMPT:
            values[name] = _of_attempt(name, attempt)
        elif name != PROMPT and (value := prompt.columns.get(name)) is None:
            raise ValueError(
                f"domain {prompt.domain!r}: row {prompt.id!r} has no field {name!r}, which the context names"
            )
        elif name != PROMPT:
            values[name] = str(value)
    text = (context if PROMPT in fields_of(context) else context + "\n\n{prompt}").format(**values)
    if isinstance(messages, str):
        return replace(prompt, prompt=text, ids=())
    return replace(prompt, prompt=[*messages[:-1], {**messages[-1], "content": text}], ids=())


def _of_attempt(name: str, attempt: Completion | None) -> str:
    if attempt is None or name == ATTEMPT:
        return attempt.text if attempt else ""
    if name == FEEDBACK and attempt.feedback is not None:
        return attempt.feedback
    reward = "unknown" if attempt.reward is None else f"{attempt.reward:g}"
    return reward if name == REWARD else f"The reward is {reward}."
