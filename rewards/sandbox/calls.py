"""Tests that are a function's name, arguments and result: what a row of calls is turned into asks here."""

import json
import math
import sys

TOLERANCE = 1e-6
"""Relative, and absolute below 1: what most tasks that ask for a number with decimals allow."""


def gives(name, given, expected, wrapped=False):
    """Say whether the function, or the method of `Solution`, returns what is expected of it; both are JSON.

    Without a name it is the first public method. `wrapped`: the result may stand in a list of its own.
    """
    arguments, result = json.loads(given), json.loads(expected)
    place = sys.modules["solution"]
    if hasattr(place, "Solution"):
        name = name or next(n for n in list(place.Solution.__dict__) if not n.startswith("_"))
        place = place.Solution()
    function = getattr(place, name)
    value = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
    is_wrapped = wrapped and isinstance(result, list) and len(result) == 1
    return same(value, result) or (is_wrapped and same(value, result[0]))


def same(value, expected):
    """Compare as JSON would: a tuple is a list, a number with decimals is met within `TOLERANCE`."""
    if isinstance(expected, list):
        is_list = isinstance(value, (list, tuple)) and len(value) == len(expected)
        return is_list and all(map(same, value, expected))
    if isinstance(expected, dict):
        value = {_key(k): v for k, v in value.items()} if isinstance(value, dict) else None
        return value is not None and set(value) == set(expected) and all(same(value[k], expected[k]) for k in expected)
    if isinstance(value, (int, float)) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or value == expected
    return type(value) in (str, int, float, bool, type(None)) and value == expected


def _key(key):
    return key if isinstance(key, str) else json.dumps(key)
