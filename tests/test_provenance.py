from __future__ import annotations

import hashlib

import pytest
import torch

from polyphony.curricula.records import Domain
from polyphony.trainer.data import PromptTable
from polyphony.trainer.run.provenance import provenance

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
    found = provenance(model="org/name", tables={})
    assert found["packages"]["torch"] == torch.__version__
    assert "trl" in found["packages"] and "deepspeed-of-the-future" not in found["packages"]


def test_data_is_known_by_its_ids_in_their_order():
    tables = {"domains.math.train": table("a", "b"), "other": table("b", "a"), "same": table("a", "b")}
    data = provenance(model="org/name", tables=tables)["data"]
    assert data["domains.math.train"] == {"rows": 2, "sha256": hashlib.sha256(b"a\nb").hexdigest()}
    assert data["same"] == data["domains.math.train"] != data["other"]


def test_weights_are_known_by_the_hash_of_their_files(weights):
    hashes = hashlib.sha256(b"first").digest() + hashlib.sha256(b"second").digest()
    found = provenance(model=str(weights), tables={})["model"]
    assert found == {"name": str(weights), "sha256": hashlib.sha256(hashes).hexdigest()}
    (weights / "model-2.safetensors").write_bytes(b"sec0nd")
    assert provenance(model=str(weights), tables={})["model"]["sha256"] != found["sha256"]


def test_a_hub_model_has_no_hash_of_ours(tmp_path):
    assert provenance(model="org/name", tables={})["model"] == {"name": "org/name", "sha256": None}
    assert provenance(model=str(tmp_path), tables={})["model"]["sha256"] is None


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(model="org/name", tables={})["commit"] is None
