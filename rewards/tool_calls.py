"""Read the calls of a text, in the formats in which models write them; nothing is ever run.

JSON (OpenAI's, Hermes', Llama 3's, Mistral's, Anthropic's and BFCL's keys), Python calls, XML functions (Qwen3-Coder,
`<invoke>`) and a name before its JSON (Kimi, DeepSeek, Mistral's `[ARGS]`), with and without their marks. What looks
like a call and is in none of them raises ValueError: it is a wrong call, not no call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from polyphony.rewards.answers import answer_region, completion_text, fenced_blocks

MAX_CHARS = 100_000
"""Longer texts hold no call that anybody meant."""
MAX_DEPTH = 50

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""What the arguments of a call are called: OpenAI, Llama 3, LangChain, Anthropic."""

_OPENING = re.compile(
    r"<(?:\w{1,20}:)?(?:tool_calls?|function_?calls?)>|\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_call\|>"
    r"|<\|tool_calls?(?:_section)?_(?:begin|start)\|>|<｜tool▁calls?▁begin｜>"
    r"|(?m:^)Action:(?=[ \t]{0,8}[\w.-]{1,99}[ \t]{0,8}\n[ \t]{0,8}Action Input:)"
)
_CLOSING = re.compile(
    r"</(?:\w{1,20}:)?(?:tool_calls?|function_?calls?)>|<\|/tool_call\|>"
    r"|<\|tool_calls?(?:_section)?_end\|>|<｜tool▁calls?▁end｜>"
)
_SEPARATOR = re.compile(
    r"<\|tool_call_argument_begin\|>|\[CALL_ID\]\w+|\[ARGS\]|(?:function)?<｜tool▁sep｜>|\n[ \t]{0,8}Action Input:"
)
_END_OF_TURN = re.compile(r"(?:<\|(?:eot_id|eom_id|im_end|end)\|>|</s>)\Z")
_XML, _XML_END = (
    re.compile(r"<(?:function=|(?:\w{1,20}:)?invoke name=)"),
    re.compile(r"</(?:\w{1,20}:)?(?:function|invoke)>"),
)
_PARAMETER = re.compile(r"<(?:\w{1,20}:)?parameter(?:=| name=)")
_PARAMETER_END = re.compile(r"</(?:\w{1,20}:)?parameter>")
_NAMED = re.compile(r"\s{0,8}(?:functions\.)?([\w.-]+?)(?::\d+)?\s{0,8}(?:```(?:json)?\s{0,8})?(?=\{)")
"""A function's name (Kimi's with a number) right before its arguments, which DeepSeek fences."""
_ANSWER = re.compile(r"<answer>(.*)</answer>\Z", re.DOTALL)

_JSON_START, _CALL_START = re.compile(r"\{|\[\s*[\[{]"), re.compile(r"\[?\s*(?<![\w.])[\w.]+\(")
"""How a text begins that is nothing but calls; `f(x) = 2x is a function.` does not end like one."""
_LOOKS_LIKE_A_CALL = re.compile(
    r'[\[{][\[{\s]{0,8}"(?:name|function|tool_calls|arguments|parameters)"\s{0,8}:'
    r'|[\[{][\[{\s]{0,8}"type"\s{0,8}:\s{0,8}"(?:function|tool_use)"'
    r'|^\[\s{0,8}\{\s{0,8}"[\w.-]{1,99}"\s{0,8}:\s{0,8}\{|^[\w.:-]{1,99} ?\{\s{0,8}["}]'
    r"|\[?(?<![\w.])[\w.]+\(\s{0,8}[A-Za-z_]\w*\s{0,8}=(?!=)|^\[\s{0,8}[\w.]+\(",
    re.MULTILINE,
)
_OWN_PLACE = re.compile(r"(?:\A|\n|[:：])[ \t`]{0,8}\Z")
"""What stands before a call that is made and not only spoken of."""


class Untyped(str):
    """A value that XML gives without its type: the text, or what it is as JSON."""

    __slots__ = ()


def calls_of(completion: Any) -> list[dict[str, Any]]:
    """Return the calls of a completion; none where it makes none. Raises ValueError where a call can not be read.

    In this order: the messages' own `tool_calls`, what is marked as calls, the whole text or its `<answer>`, the last
    fenced block, what ends the text after a line of its own or a colon.
    """
    if isinstance(completion, list):
        structured = [call for message in completion for call in message.get("tool_calls") or []]
        if structured:
            return [unwrapped(call) for call in structured]
    text = completion_text(completion)
    if len(text) > MAX_CHARS and "</think>" not in text[-MAX_CHARS:]:
        raise ValueError("too long")
    return calls_in(answer_region(completion))


def calls_in(text: str) -> list[dict[str, Any]]:
    """Return the calls of a text without thoughts."""
    text = _END_OF_TURN.sub("", text).strip()
    if any(mark.search(text) for mark in (_OPENING, _CLOSING, _SEPARATOR, _XML)):
        return [call for block in _marked(text) for call in _read(block)]
    text = (inside[1] if (inside := _ANSWER.search(text)) else text).strip()
    text = text if text.startswith("```") else text.strip("`").strip()
    if _is_nothing_but_calls(text):
        return _read(text)
    fenced = [block for _, block in fenced_blocks(text)[-1:] if _is_nothing_but_calls(block.strip())]
    if fenced:
        return _read(fenced[0])
    found = _LOOKS_LIKE_A_CALL.search(text)
    if not found:
        return []
    if not _OWN_PLACE.search(text[: found.start()]):
        raise ValueError(f"a call that is only spoken of: {found[0]!r}")
    return _read(text[found.start() :])


def _is_nothing_but_calls(text: str) -> bool:
    return bool(_JSON_START.match(text) or (_CALL_START.match(text) and text[-1] in ")];"))


def _marked(text: str) -> list[str]:
    """Return what stands between marks; a mark that is cut off at either end reaches to the end of the text."""
    opening, closing, xml = _OPENING.search(text), _CLOSING.search(text), _XML.search(text)
    if closing and (not opening or closing.start() < opening.start()):
        text = "<tool_call>" + text  # the first mark was left to the prompt, or vanished as a special token
    elif not opening and xml:
        text = text[xml.start() :]
    parts = _OPENING.split(text)[1:] or [text]
    blocks = [block for part in parts if (block := _CLOSING.split(part)[0]).strip()]
    if not blocks:
        raise ValueError("a mark without a call")
    return blocks


def _read(text: str) -> list[dict[str, Any]]:
    """Return the calls of a text that is nothing but calls: a list, or one after the other."""
    text = _SEPARATOR.sub(" ", text).strip()
    text = "\n".join(block for _, block in fenced_blocks(text)) if text.startswith("```") else text.strip("`")
    text = text.strip()
    if _XML.match(text):
        return [_xml_call(part) for part in _XML.split(text)[1:]]
    if _NAMED.match(text):
        return list(_named_calls(text))
    try:
        values = _read_json(text)
    except json.JSONDecodeError:
        values = _read_python(text)
    return [call for value in values for call in unwrapped_all(value)]


def unwrapped_all(value: Any) -> list[dict[str, Any]]:
    """Return the calls of one JSON value: a call, a list of them, or an object that holds such a list."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    return [unwrapped(call) for call in (value if isinstance(value, list) else [value])]


def unwrapped(call: Any) -> dict[str, Any]:
    """Return `{"name", "arguments"}` (and `label`) of a call in any of its usual wrappings."""
    inner = [call.get(key) for key in ("function", "function_call")] if isinstance(call, dict) else []
    if named := [value for value in inner if isinstance(value, dict) and "name" in value]:
        call = named[0]
    elif isinstance(call, dict) and isinstance(call.get("function"), str):
        call = {"name": call["function"], **{k: v for k, v in call.items() if k != "function"}}
    elif isinstance(call, dict) and len(call) == 1 and isinstance(next(iter(call.values())), dict):
        call = {"name": next(iter(call)), "arguments": next(iter(call.values()))}  # BFCL's {"f": {"a": 1}}
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"not a call: {call!r:.100}")
    given = [call[key] for key in ARGUMENT_KEYS if call.get(key) is not None]
    if len(given) > 1 or (not given and set(call) - {"name", "type", "id", "label", *ARGUMENT_KEYS}):
        raise ValueError(f"which are the arguments? {call!r:.100}")
    arguments = given[0] if given else {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be an object, got {arguments!r:.100}")
    return {"name": call["name"], "arguments": arguments, "label": call.get("label")}


def _xml_call(part: str) -> dict[str, Any]:
    """Return the call of what follows `<function=` or `<invoke name=`."""
    name, opened, body = _XML_END.split(part)[0].partition(">")
    first, *parameters = _PARAMETER.split(body)
    if not opened or (first.strip() and parameters):
        raise ValueError(f"not a call: {part!r:.100}")
    if first.strip():
        return unwrapped({"name": name.strip("\"' "), "arguments": first})
    pairs = []
    for parameter in parameters:
        key, opened, rest = parameter.partition(">")
        value, *after = _PARAMETER_END.split(rest)
        if not opened or len(after) != 1 or after[0].strip():
            raise ValueError(f"a parameter is cut off: {parameter!r:.100}")
        pairs.append((key.strip("\"' "), Untyped(value.removeprefix("\n").removesuffix("\n"))))
    return {"name": name.strip("\"' "), "arguments": _only_once(pairs)}


def _named_calls(text: str) -> Iterator[dict[str, Any]]:
    """Yield the calls of a text like `functions.find:0 {"who": "Ada"} functions.mail:1 {}`."""
    while text:
        name = _NAMED.match(text)
        if not name:
            raise ValueError(f"neither a name nor its arguments: {text!r:.100}")
        arguments, end = _DECODER.raw_decode(text[name.end() :])
        yield unwrapped({"name": name[1], "arguments": arguments})
        text = text[name.end() + end :].strip().removeprefix("```").lstrip("\n;, ")


def _read_json(text: str) -> list[Any]:
    values, position = [], 0
    while rest := text[position:].strip().lstrip("; \n" if values else " "):
        value, end = _DECODER.raw_decode(rest)
        values.append(value)
        position = len(text.rstrip()) - len(rest) + end
    return values


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_only_once)


def _read_python(text: str) -> list[Any]:
    try:
        statements = ast.parse(text).body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"neither JSON nor a Python call: {error}") from None
    if not statements or not all(isinstance(statement, ast.Expr) for statement in statements):
        raise ValueError("neither JSON nor Python calls")
    return [_python_value(statement.value, 0) for statement in statements if isinstance(statement, ast.Expr)]


def _python_value(node: ast.AST, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("a call's arguments must be named")
        arguments = {str(keyword.arg): _python_value(keyword.value, depth + 1) for keyword in node.keywords}
        return {"name": ast.unparse(node.func), "arguments": arguments}
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(item, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key, depth + 1) for key in node.keys if key is not None]
        values = [_python_value(value, depth + 1) for value in node.values]
        return _only_once(list(zip(map(str, keys), values, strict=True)))
    return ast.literal_eval(node)
