from __future__ import annotations

import hashlib

import pytest
import torch

from polyphony.curricula.records import Domain
from polyphony.rewards.registry import find_reward, other_versions, version_of
from polyphony.trainer.data import PromptTable
from polyphony.trainer.run.origins import origin_of, refuse_other_teachers
from polyphony.trainer.run.provenance import provenance, refuse_other_data, versions_since


def ungraded(prompts, **columns):
    return [None] * len(prompts)


class NoSevens:
    """A reward that cannot read a seven."""

    def unreadable(self, answer, **columns):
        return "a seven" if answer == "7" else None


MATH = Domain(name="math", kind="structured", reward="exact")


def table(*ids) -> PromptTable:
    rows = [{"prompt": f"{i}+1=", "id": i} for i in ids]
    return PromptTable(rows, domain=MATH, where="domains.math.train", is_chat=True)


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"first")
    (tmp_path / "model-2.safetensors").write_bytes(b"second")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_versions_are_those_that_run():
    found = provenance(model="org/name", tables={}, rewards={})
    assert found["packages"]["torch"] == torch.__version__
    assert "trl" in found["packages"] and "deepspeed-of-the-future" not in found["packages"]


def test_weights_of_torchs_own_format_are_known_too(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"first")
    known = provenance(model=str(tmp_path), tables={}, rewards={})
    refuse_other_data(known, {}, model=str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="its weights are not those that the run began with"):
        refuse_other_data(known, {}, model=str(tmp_path))


def test_data_is_known_by_its_ids_in_their_order():
    tables = {"domains.math.train": table("a", "b"), "other": table("b", "a"), "same": table("a", "b")}
    data = provenance(model="org/name", tables=tables, rewards={})["data"]
    assert data["domains.math.train"].items() >= {"rows": 2, "sha256": hashlib.sha256(b"a\nb").hexdigest()}.items()
    assert data["same"] == data["domains.math.train"] != data["other"]


def test_weights_are_known_by_the_hash_of_their_files(weights):
    hashes = hashlib.sha256(b"first").digest() + hashlib.sha256(b"second").digest()
    found = provenance(model=str(weights), tables={}, rewards={})["model"]
    assert found["sha256"] == hashlib.sha256(hashes).hexdigest()
    (weights / "model-2.safetensors").write_bytes(b"sec0nd")
    assert provenance(model=str(weights), tables={}, rewards={})["model"]["sha256"] != found["sha256"]


def test_a_hub_model_has_no_hash_of_ours(tmp_path):
    assert provenance(model="org/name", tables={}, rewards={})["model"] == {"name": "org/name", "sha256": None}
    assert provenance(model=str(tmp_path), tables={}, rewards={})["model"]["sha256"] is None


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(model="org/name", tables={}, rewards={})["commit"] is None


def test_a_grader_is_named_with_the_version_of_its_rules():
    found = provenance(model="org/name", tables={}, rewards={"math": find_reward("exact"), "mine": ungraded})
    exact = {"reward": "polyphony.rewards.short_answer:Exact", "version": getattr(find_reward("exact"), "version", 1)}
    assert found["graders"] == {"math": exact, "mine": {"reward": "tests.test_provenance:ungraded", "version": 1}}


def test_scores_by_another_version_of_a_grader_are_told_from_todays():
    now = version_of(find_reward("exact"))
    assert other_versions({"math": now, "lost": {"reward": "gone.away:Grader", "version": 9}}) == []
    (line,) = other_versions({"math": now | {"version": 0}})
    assert line == f"math: graded by version 0 of polyphony.rewards.short_answer:Exact, now it is {now['version']}"


def test_held_out_rows_left_out_stand_in_the_provenance():
    domain = Domain(name="math", kind="structured", heldout=[], reward="exact")
    rows = [{"prompt": f"{n} =", "answer": str(n), "id": f"i{n}"} for n in range(200)]
    table = PromptTable(rows, domain=domain, where="domains.math.heldout", is_chat=False)
    with pytest.warns(UserWarning, match=r"1 of 200 rows .* cannot read \(row 8: a seven\); left out"):
        table.leave_out_unreadable(NoSevens(), most=0.01)
    assert provenance(model="org/name", tables={"heldout": table}, rewards={})["data"]["heldout"]["left_out"] == ["i7"]
    assert len(table) == 199


def test_rows_and_weights_that_are_others_now_are_refused_by_name(weights):
    def rows(answer) -> dict[str, PromptTable]:
        table = PromptTable(
            [{"prompt": "1+1=", "id": "a", "answer": answer}], domain=MATH, where="d.train", is_chat=True
        )
        return {"d.train": table}

    known = provenance(model=str(weights), tables=rows("2"), rewards={})
    refuse_other_data(known, rows("2"), model=str(weights))
    with pytest.raises(
        ValueError, match=r"d\.train: its rows are not those .* \(1 then, 1 now, and their digests differ\)"
    ):
        refuse_other_data(known, rows("3"), model=str(weights))  # the same id
    del known["data"]["d.train"]["content"]  # as an older version noted it
    refuse_other_data(known, rows("3"), model=str(weights))
    (weights / "model-1.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="its weights are not those that the run began with"):
        refuse_other_data(known, rows("2"), model=str(weights))


def test_a_teacher_that_is_another_now_is_refused_by_name(weights):
    says = {"name": "expert", "says": [-1.0, -2.0, -0.5]}
    known = provenance(model="m", tables={}, rewards={}, teachers={"t": origin_of(str(weights)), "far": says})
    refuse_other_teachers(known, {"t": origin_of(str(weights)), "far": says | {"says": [-1.01, -2.0, -0.48]}})
    refuse_other_teachers({}, {"far": says})  # as an older version noted it
    with pytest.raises(ValueError, match=r"^teachers\.far: its log-probabilities .* \(expert then, other now\)"):
        refuse_other_teachers(known, {"far": {"name": "other", "says": [-1.0, -3.0, -0.5]}})
    (weights / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^teachers\.t: adapter_config\.json is not as the run began with"):
        refuse_other_teachers(known, {"t": origin_of(str(weights))})
    (weights / "model-1.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"^teachers\.t: its weights are not those that the run began with"):
        refuse_other_teachers(known, {"t": origin_of(str(weights))})


def test_another_tokenizer_or_configuration_beside_the_same_weights_is_refused_by_name(weights):
    (weights / "tokenizer.json").write_text("[]")
    (weights / "results.json").write_text("of the user's own")
    known = provenance(model=str(weights), tables={}, rewards={})
    assert set(known["model"]["files"]) == {"config.json", "tokenizer.json"}
    (weights / "results.json").write_text("more")
    refuse_other_data(known, {}, model=str(weights))
    (weights / "tokenizer.json").write_text("{}")
    (weights / "chat_template.jinja").write_text("new")
    with pytest.raises(
        ValueError, match=r"chat_template\.jinja, tokenizer\.json are not as the run began with; give back"
    ):
        refuse_other_data(known, {}, model=str(weights))
    del known["model"]["files"]  # as an older version noted it
    refuse_other_data(known, {}, model=str(weights))


def test_other_versions_are_told_with_the_step_from_which_they_hold():
    now = provenance(model="org/name", tables={}, rewards={})
    assert versions_since(now, now, step=4) == []
    then = now | {"packages": now["packages"] | {"torch": "1.0"}, "commit": "0123456789abcdef"}
    lines = versions_since(then, now, step=4)
    assert lines[1] == f"torch: 1.0 until step 4, {torch.__version__} from there on"
    assert lines[0].startswith("commit: 0123456789ab until step 4, ")


def test_rows_in_memory_have_the_same_digest_in_every_process():
    class Odd:
        pass

    first, second = (
        PromptTable([{"prompt": "1", "id": "a", "odd": Odd()}], domain=MATH, where="d", is_chat=True) for _ in range(2)
    )
    found = [provenance(model="m", tables={"d": table}, rewards={})["data"]["d"] for table in (first, second)]
    assert found[0] == found[1]


def test_what_was_said_of_rows_is_kept():
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1=", "answer": "2"}, {"prompt": "3+3=", "answer": "6"}]
    told = PromptTable(rows, domain=MATH, where="domains.math.train", is_chat=True)
    with pytest.warns(UserWarning, match="1 of 3 rows repeat one before them"):
        told.tell()
    data = provenance(model="org/name", tables={"domains.math.train": told}, rewards={})["data"]
    (line,) = data["domains.math.train"]["told"]
    assert line.startswith("domains.math.train: 1 of 3 rows repeat ") and line.endswith("; left out")
