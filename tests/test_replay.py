import pytest

from polyphony.curricula.schedulers.replay import Plateau, Protection, Replay, combine


def test_power_law_replay_by_hand():
    # ages 1 and 3 at exponent 1: weights 1 and 1/3, so .25 splits 3 : 1
    shares = Replay(fraction=0.25).shares({"new": 1, "old": 3})
    assert shares == pytest.approx({"new": 0.1875, "old": 0.0625})


def test_exponent_zero_spreads_evenly_and_no_past_means_no_replay():
    assert Replay(fraction=0.2, exponent=0).shares({"a": 1, "b": 50}) == pytest.approx({"a": 0.1, "b": 0.1})
    assert Replay().shares({}) == {}


def test_protection_adds_to_replay_up_to_half_of_the_draw():
    assert combine({"a": 0.1, "b": 0.15}, {"a": 0.2}) == pytest.approx({"a": 0.3, "b": 0.15})
    assert combine({"a": 0.1, "b": 0.15}, {"a": 0.25, "b": 0.25}) == pytest.approx({"a": 0.35 / 1.5, "b": 0.4 / 1.5})
    assert combine({"a": 0.0}, {}) == {"a": 0.0} and combine({}, {}) == {}


def test_a_plateau_needs_two_full_windows_and_no_rise_between_them():
    plateau = Plateau(window=2, gain=0.01)
    assert not plateau.is_reached([0.5, 0.5, 0.5])
    assert plateau.is_reached([0.2, 0.5, 0.5, 0.5, 0.5])
    assert not plateau.is_reached([0.4, 0.5, 0.5, 0.6])  # .55 against .45
    assert plateau.is_reached([0.6, 0.6, 0.5, 0.5])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Replay, {"kind": "uniform"}),
        (Replay, {"fraction": 0.6}),
        (Replay, {"exponent": -1}),
        (Protection, {"share": 0.9}),
        (Protection, {"max_drop": -0.1}),
        (Plateau, {"window": 0}),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
