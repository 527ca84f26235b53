"""What the sandbox's two processes say to each other: plain data by exact type, and a reference for all else."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import math
import os
import re
from unittest import mock

import numpy as np
import pytest

from polyphony.rewards.sandbox.messages import MAX_MESSAGE, BridgeError, Channel, find, mutable, named, pack, unpack

Point = collections.namedtuple("Point", "x y")

PLAIN = [
    None,
    True,
    7,
    "seven",
    2.5,
    float("inf"),
    3 + 4j,
    b"\x00\xff",
    bytearray(b"ab"),
    (1, (2,)),
    [1, [2.0, "a"]],
    {1, 2},
    frozenset({"a"}),
    {"a": [1], (1, 2): {"b": None}},
    collections.deque([1, 2]),
    collections.Counter("aab"),
    collections.OrderedDict([("b", 1), ("a", 2)]),
    range(1, 9, 2),
    decimal.Decimal("0.10"),
    fractions.Fraction(1, 3),
    datetime.date(2024, 2, 29),
    datetime.datetime(2024, 2, 29, 12, 30),
    datetime.time(12, 30),
    datetime.timedelta(days=1, seconds=2, microseconds=3),
]


def there_and_back(value, refer=lambda value: {"reference": 1}, resolve=lambda data: data):
    return unpack(json.loads(json.dumps(pack(value, refer))), resolve)


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_comes_back_equal_and_of_its_exact_type(value):
    back = there_and_back(value)
    assert back == value and type(back) is type(value)


def test_what_is_not_plain_is_a_reference():
    class Mine:
        pass

    assert pack([Mine()], lambda value: {"reference": 3}) == {"list": [{"reference": 3}]}
    assert there_and_back(Mine(), resolve=lambda data: ("found", data)) == ("found", {"reference": 1})


def test_a_subclass_does_not_get_to_lie_about_what_it_holds():
    class Seven(int):
        def __int__(self):
            return 8

    class Liar(list):
        def __iter__(self):
            return iter(["what the test expects"])

    class Word(str):
        def __str__(self):
            return "expected"

    assert there_and_back(Seven(7)) == 7
    assert there_and_back(Liar([1])) == [1]
    assert there_and_back(Word("said")) == "said"


def test_arrays_keep_their_type_and_scalars_become_numbers():
    array = np.array([[1.5, 2.0]], dtype="float32")
    back = there_and_back(array)
    assert back.dtype == array.dtype and back.tolist() == array.tolist()
    assert there_and_back(np.int64(3)) == 3
    assert there_and_back(np.array([object()])) == {"reference": 1}  # of objects: not plain


def test_a_named_tuple_is_read_as_one_and_its_class_is_the_same_each_time():
    first, second = there_and_back(Point(1, [2])), there_and_back(Point(3, 4))
    assert (first.x, first.y) == (1, [2]) and type(first) is type(second) is not Point


def test_only_the_standard_library_is_found_by_name():
    assert named(math.sqrt) == ["math", "sqrt"] and find("math", "sqrt") is math.sqrt
    assert named(re) == ["re", ""] and find("re", "") is re
    assert named(np.array) is None and named(mock.ANY) is None
    # what stands for a name is for its reader to say: the tests' process takes fewer than the program's
    assert unpack({"named": ["re", ""]}, lambda data: data) == {"named": ["re", ""]}
    assert find("math", "no_such_name") is None
    assert mutable([[1], (1,), {}, "a", bytearray()]) == [[1], {}, bytearray()]


def test_messages_cross_a_pipe_a_line_each_and_what_is_none_is_an_error():
    reads, writes = os.pipe()
    channel = Channel(reads, os.dup(writes))
    channel.send({"call": "a\u2028b"})
    assert channel.receive() == {"call": "a\u2028b"}
    os.write(writes, b"no message\n")
    with pytest.raises(BridgeError, match="not a message"):
        channel.receive()
    os.write(writes, b'{"cut": ')
    channel._writes.close()
    os.close(writes)
    with pytest.raises(BridgeError, match="the other process ended or sent too much"):
        channel.receive()
    assert MAX_MESSAGE == 16 << 20
