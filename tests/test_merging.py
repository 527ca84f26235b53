"""Experts merged: every formula on tensors worked by hand, ours against mergekit's own, folders whole or not there."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyphony.curricula.transfer.halves import half
from polyphony.launch.cli import main
from polyphony.launch.recipe import load_recipe
from polyphony.launch.verbs.merge import Merging, Search
from polyphony.trainer.merging import methods
from polyphony.trainer.merging.merge import merge
from polyphony.trainer.merging.methods import BLOCKWISE, largest, merge_tensor
from polyphony.trainer.merging.search import search_weights
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


@pytest.mark.parametrize("method", BLOCKWISE)
def test_a_tensor_in_blocks_is_the_tensor(tmp_path, experts, method, monkeypatch):
    given = experts[:1] if method == "interpolate" else experts
    settings = MergeSettings(method=method)
    whole = load_file(merge(given, tmp_path / "whole", base=str(POLICY), settings=settings) / "model.safetensors")
    monkeypatch.setattr(methods, "BLOCK", 1000)
    monkeypatch.setattr(methods, "SAMPLE", 256)
    cut = load_file(merge(given, tmp_path / "cut", base=str(POLICY), settings=settings) / "model.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


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


def adapter(folder, *, seed: int, base: str = str(POLICY), **changes) -> str:
    """A LoRA of the lab's policy, moved as if it had been trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": base}))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(folder / "a", seed=1), adapter(folder / "b", seed=2, r=2, target_modules=["q_proj"])]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "dare_ties", "slerp"])
def test_adapters_become_one_adapter_and_what_the_base_is_with_it(tmp_path, adapters, method):
    """Ranks add up, so that sums are exact: what whole models become, merged with the same weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = (0.6, 0.3) if method != "slerp" else (0.3,)
    settings = MergeSettings(method=method, weights=weights)
    out = merge(adapters, tmp_path / "out", base=str(POLICY), settings=settings)
    found = load_file(out / "model.safetensors")
    if method == "slerp":  # which PEFT has not
        assert not (out / "adapter").exists()
    else:
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(POLICY), out / "adapter"
        ).merge_and_unload()
        assert all(torch.allclose(p, found[n], atol=1e-6) for n, p in again.named_parameters())
    start, key, deltas = load_file(POLICY / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight", []
    for folder, scale in zip(adapters, (8 / 4, 8 / 2), strict=True):
        of = load_file(f"{folder}/adapter_model.safetensors")
        a, b = (of[f"base_model.model.{key.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        deltas.append(scale * (b @ a))
    if method in ("task_arithmetic", "linear"):
        total = 1.0 if method == "task_arithmetic" else 0.9
        change = sum(weight / total * delta for weight, delta in zip(weights, deltas, strict=True))
        assert torch.allclose(found[key], start[key] + change, atol=1e-6) and change.abs().max() > 1e-3
    if method == "ties":  # PEFT elects the sign by what is kept, unweighted, and cuts the mean to the sum of the ranks
        kept = [delta * largest(delta, 0.2) for delta in deltas]
        agree = [k.sign() * torch.where(sum(kept) >= 0, 1.0, -1.0) > 0 for k in kept]
        parts = [w * 2 / 0.9 * k * agrees for w, k, agrees in zip(weights, kept, agree, strict=True)]
        mean = sum(parts) / sum(agrees.float() for agrees in agree).clamp(min=1)
        u, size, v = torch.linalg.svd(mean, full_matrices=False)
        assert torch.allclose(found[key] - start[key], u[:, :6] * size[:6] @ v[:6], atol=1e-5)
    assert json.loads((out / "provenance.json").read_text())["merge"]["experts"][0]["name"] == adapters[0]


def with_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    return tensors


def wider(tensors):
    name = "model.layers.0.mlp.gate_proj.weight"
    return tensors | {name: torch.zeros(513, 128)}


def other_word(folder) -> str:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(document))
    return str(folder)


BAD = {
    "shapes": "wide: model.layers.0.mlp.gate_proj.weight has shape [513, 128], in .*policy it has shape [512, 128]",
    "lacks": "lacks: model.norm.weight is missing, in .*policy it has shape [128]",
    "vocabulary": "other has another vocabulary than .*policy: token",
    "base": "base .*nowhere: no such folder",
    "no base": "method ties needs the base that the experts were trained from: --base",
    "adapter": "expert .*foreign is an adapter of some/model, the base is .*policy",
    "no adapter's base": "expert .*foreign is an adapter of some/model: say so with --base some/model",
    "nan": "nan: model.layers.1.mlp.up_proj.weight has weights that are NaN or infinite",
    "nan adapter": "expert-nan: base_model.*lora_B.weight has weights that are NaN or infinite",
    "cut off": "expert .*cut was cut off while being saved",
    "damaged": "expert .*damaged: model.safetensors is damaged: ",
    "nothing": "expert .*nothing has neither config.json nor adapter_config.json",
    "occupied": "occupied exists; choose another --out",
    "config": "theta: rope_parameters is .*7.0.* in its config.json, .* in that of .*policy: the merged weights",
}


def bad(case: str, folder) -> dict:
    """Return what a case gives `merge` beside the method."""
    base, expert = str(POLICY), None
    if case == "shapes":
        expert = changed(folder / "wide", seed=0, edit=wider)
    elif case == "lacks":
        expert = changed(
            folder / "lacks", seed=0, edit=lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}
        )
    elif case == "vocabulary":
        changed(folder / "other", seed=0)
        expert = other_word(folder / "other")
    elif case in ("base", "no base"):
        base = str(folder / "nowhere") if case == "base" else None
    elif case in ("adapter", "no adapter's base"):
        expert = adapter(folder / "foreign", seed=0, base="some/model")
        base = base if case == "adapter" else None
    elif case == "nan":
        expert = changed(folder / "nan", seed=0, edit=with_nan)
    elif case == "nan adapter":
        expert = adapter(folder / "expert-nan", seed=0)
        file = folder / "expert-nan" / "adapter_model.safetensors"
        save_file({n: t * math.nan if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    elif case == "cut off":
        expert = changed(folder / "cut", seed=0)
        (folder / "cut" / "polyphony.json.unfinished").touch()
    elif case == "damaged":
        expert = changed(folder / "damaged", seed=0)
        (folder / "damaged" / "model.safetensors").write_bytes(b"short")
    elif case == "config":
        expert = changed(folder / "theta", seed=0)
        said = json.loads((folder / "theta" / "config.json").read_text())
        said["rope_parameters"] = {**said["rope_parameters"], "rope_theta": 7.0}
        (folder / "theta" / "config.json").write_text(json.dumps(said))
    elif case == "nothing":
        (folder / "nothing").mkdir()
        expert = str(folder / "nothing")
    return {"base": base, "expert": expert}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_told_in_one_line_and_leaves_nothing(tmp_path, experts, adapters, case):
    (tmp_path / "in").mkdir()
    given = bad(case, tmp_path / "in")
    out = tmp_path / "occupied"
    if case == "occupied":
        out.mkdir()
        (out / "theirs.txt").write_text("kept")
    method = "linear" if case == "no adapter's base" else "ties"
    names = [adapters[0] if case == "nan adapter" else experts[0], given["expert"] or experts[1]]
    with pytest.raises(ValueError, match=re.sub(r"([\[\]])", r"\\\1", BAD[case])) as told:
        merge(names, out, base=given["base"], settings=MergeSettings(method=method))
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "occupied"] if case == "occupied" else ["in"])


def test_of_a_folder_that_a_merge_made_for_itself_nothing_stays_when_it_fails(tmp_path, experts):
    nan = changed(tmp_path / "nan", seed=0, edit=with_nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge([experts[0], nan], tmp_path / "deep" / "er" / "out", settings=MergeSettings(method="linear"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*file/out: "):
        merge(experts, tmp_path / "file" / "out", settings=MergeSettings(method="linear"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nan"]


@pytest.mark.parametrize("where", ["base", "first"])
def test_an_output_layer_that_is_tied_may_stand_in_a_file_or_not(tmp_path, experts, where):
    """As in models on the hub; a model that Transformers saves anew has none. Files of other formats do not count."""
    with_head = tmp_path / "head"
    shutil.copytree(POLICY if where == "base" else experts[0], with_head)
    tensors = load_file(with_head / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, with_head / "model.safetensors", metadata={"format": "pt"})
    save_file({"tok_embeddings.weight": torch.ones(2)}, with_head / "consolidated.safetensors")
    base, given = (str(with_head), experts) if where == "base" else (str(POLICY), [str(with_head), experts[1]])
    settings = MergeSettings(method="task_arithmetic", weights=(0.5,))
    found = load_file(merge(given, tmp_path / "out", base=base, settings=settings) / "model.safetensors")
    plain = load_file(merge(experts, tmp_path / "plain", base=str(POLICY), settings=settings) / "model.safetensors")
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert ("lm_head.weight" in found) == (where == "first")
    assert where == "base" or torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_an_expert_without_weight_has_no_core():
    assert merged([A, B], method="cpi", weights=(1.0, 0.0)) == A


@pytest.mark.parametrize(
    ("settings", "experts_given", "message"),
    [
        ({"method": "tie"}, 2, "method 'tie': expected linear, .*; did you mean 'ties'"),
        ({"weights": (1.0, 2.0, 3.0)}, 2, "weights 1, 2, 3: expected one, or one for each of 2 experts"),
        ({"weights": (math.nan,)}, 2, "weights nan: expected finite numbers"),
        ({"weights": (-1.0, 2.0)}, 2, "weights -1, 2: ties takes proportions, none below 0"),
        ({"method": "task_arithmetic", "weights": (0.0,)}, 2, "weights 0: expected one that is not 0"),
        ({"method": "slerp", "weights": (1.5,)}, 2, "weight 1.5: under slerp a share, 0 to 1"),
        ({"method": "slerp"}, 3, "method slerp takes 2 experts, got 3"),
        ({"method": "interpolate"}, 2, "method interpolate takes 1 expert, got 2"),
        ({"density": 0.0}, 2, "density 0: expected above 0, at most 1"),
        ({"method": "linear", "density": 0.5}, 2, "density: method linear keeps all of a difference"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, experts_given, message):
    with pytest.raises(ValueError, match=message):
        MergeSettings(**settings).check(experts_given, has_base=True)


def test_the_verb_merges_what_run_folders_hold(tmp_path, experts, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: run")
    shutil.copytree(experts[0], run / "final")
    given = ["merge", str(run), experts[1], "--base", str(POLICY), "--method", "task_arithmetic"]
    assert main([*given, "--weight", "1", "0", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    one, out = (load_file(f"{folder}/model.safetensors") for folder in (experts[0], tmp_path / "out"))
    assert all(torch.allclose(one[name], out[name], atol=1e-6) for name in one)
    assert main([*given, "--weight", "1", "2", "3", "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert said == "polyphony merge: weights 1, 2, 3: expected one, or one for each of 2 experts\n"
    assert main([*given, "--search", "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("polyphony merge: --search and --recipe go together")


def test_weights_are_sought_one_at_a_time_and_no_more_than_are_paid_for():
    def score(weights):
        return -abs(weights[0] - 0.25) - abs(weights[1] - 1.125)

    settings = MergeSettings(method="task_arithmetic")
    tried = search_weights(score, settings, experts=2, most=50)
    assert next(iter(tried)) == (1.0, 1.0) and max(tried, key=tried.get) == (0.25, 1.125)
    assert len(search_weights(score, settings, experts=2, most=4)) == 4
    # proportions: (1, 1) again is (.5, .5), and nothing at all is no merge
    shares = search_weights(lambda w: -w[0], MergeSettings(method="linear"), experts=2, most=50)
    assert max(shares, key=shares.get) == (0.0, 1.0) and (0.5, 0.5) not in shares and (0.0, 0.0) not in shares
    alone = search_weights(lambda w: -abs(w[0] - 0.6), MergeSettings(method="slerp"), experts=2, most=50)
    assert max(alone, key=alone.get) == (0.625,)


@pytest.mark.slow
def test_a_search_sees_the_deciding_half_alone_and_the_other_judges(tmp_path, experts, capsys):
    """The second expert is noise that says nothing right: the search leaves it away, and the published half shows it."""
    noise = changed(tmp_path / "noise", seed=9, scale=0.1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(document()))
    given = ["merge", str(POLICY), noise, "--method", "linear", "--search", "--recipe", str(tmp_path / "recipe.yaml")]
    assert main([*given, "--share", "1e-4", "--out", str(tmp_path / "out"), "--json"]) == 2
    assert re.search("of a probe's tokens .* do not pay for two weights", capsys.readouterr().err)
    assert main([*given, "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert re.match(r"merge: at most 0.0\d+ million tokens, \d+.\d% of a probe's: up to \d+ weights", said.err)
    assert found["weights"] == [1.0, 0.0] and found["tried"][0]["weights"] == [1.0, 1.0]
    low, mid, high = found["published"]["sums"]
    assert mid > 0 and low <= mid <= high
    merging = Merging.of([str(POLICY), noise], base=None, settings=MergeSettings(method="linear"))
    seeking = Search(merging=merging, recipe=load_recipe(tmp_path / "recipe.yaml"), scratch=tmp_path / "none")
    seeking.read()
    sets = {which: {half(i) for i in data.heldout["sums"].ids} for which, data in seeking.data.items()}
    assert sets == {"steer": {"steer"}, "report": {"report"}} and seeking.items == 24
    made = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert made["search"] == found and made["merge"]["weights"] == [1.0, 0.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise", "out", "recipe.yaml"]


def document():
    """A recipe of one domain that the lab's policy knows; Transformers samples."""
    rows = {"generator": "polyphony.launch.lab.world:rows", "domain": "arithmetic"}
    domain = {"kind": "structured", "reward": "exact", "train": {**rows, "split": "train", "size": 16}}
    domain["heldout"] = {**rows, "split": "heldout", "size": 24}
    grpo = {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    grpo |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "seed": 1}
    quick = {"rollouts": {"engine": "transformers"}, "eval": {"samples": 1, "kl_items": 0}}
    return {"name": "sought", "model": str(POLICY), "domains": {"sums": domain}, "grpo": grpo, **quick}
