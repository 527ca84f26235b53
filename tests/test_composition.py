import random

import pytest

from polyphony.rewards.procedural import ATOMS, Composition, CompositionConfig, composition


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("blen", "zcba"),
        ("dorp", "bcza"),
        ("fask", "zabc"),
        ("gume", "bazc"),
        ("hilb", "bcz"),
        ("jent", "abc"),
        ("kroy", "aabcz"),
        ("lusp", "abczz"),
        ("mave", "bcda"),
        ("nirt", "zaby"),
        ("pawl", "abcz"),
        ("quob", "ac"),
    ],
)
def test_atoms_by_hand(name, result):
    assert Composition(chain=(name,), letters="abcz").answer == result


def test_every_atom_was_worked_by_hand():
    assert len(ATOMS) == 12


def test_functions_apply_from_the_inside_out():
    # hilb first: "bc"; then lusp: "bcz"; then blen: "zcb"
    drawn = Composition(chain=("blen", "lusp", "hilb"), letters="abc")
    assert drawn.answer == "zcb"
    assert drawn.question(definitions=False) == 'What is blen(lusp(hilb("abc")))?'
    assert drawn.question(definitions=True).splitlines()[0] == "blen(s) reverses the string."


def test_depth_and_letters_are_as_asked_and_no_answer_is_empty():
    config = CompositionConfig(depth=8, min_letters=1, max_letters=2)
    drawn = [composition(config, random.Random(seed)) for seed in range(200)]
    assert {len(d.chain) for d in drawn} == {8}
    assert {len(d.letters) for d in drawn} == {1, 2}
    assert all(d.answer for d in drawn)


@pytest.mark.parametrize(
    ("settings", "message"), [({"depth": 0}, "depth must be at least 1"), ({"min_letters": 9}, "min_letters <= max")]
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompositionConfig(**settings)
