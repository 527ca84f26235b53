"""Experts merged: every formula on tensors worked by hand, ours against mergekit's own, folders whole or not there."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyphony.trainer.merging import methods
from polyphony.trainer.merging.merge import merge
from polyphony.trainer.merging.methods import largest, merge_tensor
from polyphony.trainer.merging.settings import METHODS, MergeSettings
from polyphony.trainer.merging.shared import shared_parameters
from tests.conftest import POLICY

BASE = [1.0, 1.0, 1.0, 1.0]
A, B = [5.0, 0.0, 1.5, 3.0], [-1.0, -2.0, 1.1, 2.0]
"""Differences from the base: 4, -1, .5, 2 and -2, -3, .1, 1."""


def merged(experts, base=BASE, **settings) -> list[float]:
    start = None if base is None else torch.tensor(base)
    found = merge_tensor([torch.tensor(e) for e in experts], start, MergeSettings(**settings))
    return pytest.approx(found.tolist(), abs=1e-6)


def test_linear_is_the_weighted_mean():
    assert merged([A, B], None, method="linear", weights=(1.0, 3.0)) == [0.5, -1.5, 1.2, 2.25]


def test_task_arithmetic_adds_the_weighted_differences():
    # .5 (4, -1, .5, 2) + (-2, -3, .1, 1) = (0, -3.5, .35, 2)
    assert merged([A, B], method="task_arithmetic", weights=(0.5, 1.0)) == [1.0, -2.5, 1.35, 3.0]


def test_ties_trims_elects_a_sign_and_averages_what_agrees():
    # kept: 4, 0, 0, 2 and -2, -3, 0, 0; sums 2, -3, 0, 2; so 4 (the -2 disagrees), -3, 0, 2
    assert merged([A, B], method="ties", density=0.5) == [5.0, -2.0, 1.0, 3.0]
    # all kept: 2 of (4, -2) is +: 4; (-1, -3): -2; (.5, .1): .3; (2, 1): 1.5
    assert merged([A, B], method="ties", density=1.0) == [5.0, -1.0, 1.3, 2.5]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_some_and_makes_up_for_it(method):
    """What is kept has the magnitude of all, mergekit's reading: 7.5 in sum."""
    torch.manual_seed(1)
    delta = torch.tensor(merge_tensor([torch.tensor(A)], torch.tensor(BASE), MergeSettings(method=method)).tolist()) - 1
    kept = delta != 0
    assert 0 < kept.sum() < 4 and delta.abs().sum().item() == pytest.approx(7.5, abs=1e-5)
    scale = delta[kept] / (torch.tensor(A) - 1)[kept]
    assert scale.tolist() == pytest.approx([scale[0].item()] * len(scale), abs=1e-5)


def test_slerp_goes_along_the_arc():
    half = math.sqrt(0.5)
    assert merged([[1.0, 0.0], [0.0, 1.0]], None, method="slerp") == [half, half]
    # a third of 90 degrees: cos 30, sin 30
    assert merged([[2.0, 0.0], [0.0, 2.0]], None, method="slerp", weights=(1 / 3,)) == [math.sqrt(3), 1.0]


def test_interpolation_goes_a_share_of_the_way_from_the_base():
    assert merged([A], method="interpolate", weights=(0.25,)) == [2.0, 0.75, 1.125, 1.5]


def test_cpi_takes_each_core_as_it_is_and_slerps_the_rest():
    """Cores of a quarter: the 4 of one, the 8 of the other; at right angles SLERP is (a + b) / sqrt 2."""
    half = math.sqrt(0.5)
    experts = [[3.0, 0.0, 0.0, 4.0], [0.0, 6.0, 8.0, 0.0]]
    assert merged(experts, [0.0] * 4, method="cpi", density=0.25) == [3 * half, 6 * half, 8.0, 4.0]


def test_where_cores_meet_the_larger_change_is_kept():
    # cores of one number, the first of both; the rest at right angles: SLERP takes 1 / sqrt 2 of each
    experts, half = [[5.0, 1.0, 3.0], [-7.0, 5.0, 10.0]], math.sqrt(0.5)
    assert merged(experts, [0.0, 1.0, 3.0], method="cpi", density=0.34) == [-7.0, 6 * half, 13 * half]


def test_the_largest_are_exactly_as_many_and_of_equals_the_first(monkeypatch):
    assert largest(torch.tensor([1.0, -2.0, 2.0, 2.0, 0.0]), 0.4).tolist() == [False, True, True, False, False]
    assert largest(torch.tensor([0.0, 3.0, 0.0, 0.0]), 0.9).tolist() == [False, True, False, False]
    assert largest(torch.tensor(2.0), 0.1).item() is True
    monkeypatch.setattr(methods, "SAMPLE", 64)
    torch.manual_seed(0)
    for numbers in (torch.randn(100, 99), torch.randn(100, 99).mul(4).round()):
        size = numbers.abs().flatten()
        found = largest(numbers, 0.2)
        assert found.sum() == 1980 and size[found.flatten()].min() >= size[~found.flatten()].max()


@pytest.mark.parametrize("method", METHODS)
def test_ours_is_mergekits_own(method):
    """On random tensors of float32, what mergekit makes of whole state dictionaries; CPI is not mergekit's."""
    from mergekit.merge_methods import merge_state_dicts

    torch.manual_seed(3)
    base, first, second = ({"w": torch.randn(40, 30)} for _ in range(3))
    experts, weights = [first, second], (0.3, 0.6)
    said = {"weight": list(weights)}
    if method in ("slerp", "interpolate", "cpi"):
        weights = (0.3,)
    settings = MergeSettings(method=method, weights=weights)
    torch.manual_seed(5)
    if method == "cpi":
        delta = first["w"] - base["w"]
        mixed = merge_state_dicts([first, second], "slerp", base=0, parameters={"t": 0.5})["w"]
        expected = torch.where(largest(delta, 0.1), first["w"], mixed)
        other = largest(second["w"] - base["w"], 0.1)
        expected = torch.where(other & ~largest(delta, 0.1), second["w"], expected)
        shared = other & largest(delta, 0.1) & ((second["w"] - base["w"]).abs() > delta.abs())
        expected = torch.where(shared, second["w"], expected)
    elif method == "linear":
        expected = merge_state_dicts(experts, method, parameters=said)["w"]
    elif method == "slerp":
        expected = merge_state_dicts(experts, method, base=0, parameters={"t": 0.3})["w"]
    elif method == "interpolate":
        experts = [first]
        expected = merge_state_dicts([base, first], "linear", parameters={"weight": [0.7, 0.3]})["w"]
    else:
        density = {"density": settings.kept} if method != "task_arithmetic" else {}
        expected = merge_state_dicts([base, *experts], method, base=0, parameters=said | density)["w"]
    torch.manual_seed(5)
    found = merge_tensor([e["w"].clone() for e in experts], base["w"], settings)
    assert torch.allclose(found, expected, atol=1e-5)


def changed(folder, *, seed: int, scale: float = 0.01, edit=None):
    """The lab's policy with other weights, as an expert that was trained from it."""
    shutil.copytree(POLICY, folder)
    torch.manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t + scale * torch.randn_like(t) for n, t in tensors.items()}
    save_file(edit(tensors) if edit else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return [changed(folder / name, seed=seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("method", METHODS)
def test_what_comes_out_is_a_model_folder_that_says_what_it_is(tmp_path, experts, method):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = experts[:1] if method == "interpolate" else experts
    out = merge(given, tmp_path / "new" / "out", base=str(POLICY), settings=MergeSettings(method=method))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(POLICY))
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(POLICY).chat_template
    weights, start, first = (load_file(f"{f}/model.safetensors") for f in (out, POLICY, experts[0]))
    assert weights.keys() == start.keys()
    assert all(not torch.equal(weights[n], start[n]) and not torch.equal(weights[n], first[n]) for n in weights)
    made = json.loads((out / "provenance.json").read_text())["merge"]
    assert made["method"] == method and [e["name"] for e in made["experts"]] == given
    assert made["base"]["sha256"] and len({e["sha256"] for e in made["experts"]}) == len(given)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_who_shares_parameters_by_hand(tmp_path):
    """Two tensors of ten, cores of one number each. In `u` both changed the first most, in opposite directions; in `v` not
    the same one: 1 of 3 is shared. Differences (4, ..) and (-2, 1, ..); (3) and (0, 5): cosine -8 / (5 sqrt 30)."""
    zero = {name: torch.zeros(10) for name in "uv"}

    def folder(name, **numbers):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        tensors = {n: zero[n].clone() for n in zero}
        for tensor, values in numbers.items():
            tensors[tensor][: len(values)] = torch.tensor(values)
        save_file(tensors, path / "model.safetensors")
        return str(path)

    base = folder("base")
    named = {"a": folder("a", u=[4.0], v=[3.0]), "b": folder("b", u=[-2.0, 1.0], v=[0.0, 5.0])}
    (found,) = shared_parameters(named, base)
    assert (found.first, found.second) == ("a", "b")
    assert found.core_overlap == pytest.approx(1 / 3) and found.sign_conflicts == 1.0
    assert found.cosine == pytest.approx(-8 / (5 * math.sqrt(30)))
    (same,) = shared_parameters({"a": base, "b": base}, base)
    assert math.isnan(same.core_overlap) and math.isnan(same.sign_conflicts) and math.isnan(same.cosine)
