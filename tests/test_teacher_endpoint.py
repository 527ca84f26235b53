"""Teachers behind endpoints: what is refused before weights are loaded, and what a run does without them.

The real server is in tests/test_judge_vllm.py, which has one.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler

import pytest
from transformers import AutoTokenizer

from polyphony.launch.build import build_trainer
from polyphony.launch.preflight import preflight
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import changed_keys, claim_folder, start
from polyphony.rewards import endpoint
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.run.folder import RunFolder
from tests.conftest import POLICY
from tests.taught import recipe_of
from tests.test_judge import Listening

TOKENIZER = AutoTokenizer.from_pretrained(POLICY)


def plain(ids):
    """Log-probabilities that tokens alone decide."""
    return [None, *({str(token): {"logprob": -1 - token % 7}} for token in ids[1:])]


class Tutor:
    """A server that answers as vLLM's does; `says` makes log-probabilities of token ids, a status refuses."""

    def __init__(self, says=plain, *, decode=TOKENIZER.decode, models=("tutor",), room=256, port=0):
        self.says, self.decode, self.models, self.room, self.port = says, decode, models, room, port
        self.asked, self.keys = [], set()

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.tell({"data": [{"id": name, "max_model_len": owner.room} for name in owner.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.keys.add(self.headers.get("authorization"))
                if self.path == "/detokenize":
                    self.tell({"prompt": owner.decode(body["tokens"])} if owner.decode else 404)
                else:
                    owner.asked.append(body["prompt"])
                    told = owner.says(body["prompt"])
                    self.tell(told if isinstance(told, int) else {"choices": [{"text": "", "prompt_logprobs": told}]})

            def tell(self, reply):
                content = json.dumps(reply).encode()
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = Listening(("127.0.0.1", self.port), Handler)
        self.port, self.url = self.http.server_port, f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def without_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "_health", {})  # a server may have the port of one before
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def taught_by(url, **more):
    return {"t": {"endpoint": url, "client": {"patience_s": 0.3}, **more}}


def overrides_of(teachers):
    said = ["algorithm=distil", "rollouts.engine=transformers", f"teachers={json.dumps(teachers)}"]
    return [*said, "domains.sums.teacher=t", "domains.words.teacher=t"]


# --- refused before weights are loaded: the fixture's model has none ----------------------------------------------------


def swapped(ids):
    return TOKENIZER.decode([{100: 101, 101: 100}.get(token, token) for token in ids])


@pytest.mark.parametrize(
    ("tutor", "says"),
    [
        ({"says": lambda ids: None}, "no prompt_logprobs in the response, as vLLM's server gives them"),
        ({"says": lambda ids: plain(ids)[1:]}, r"prompt_logprobs of \d+ tokens in the response, \d+ were sent"),
        ({"says": lambda ids: plain([0, *ids[:-1]])}, "are not of the tokens that were sent"),
        ({"says": lambda ids: [None, *({str(i): {"logprob": 3.5}} for i in ids[1:])]}, "no log-probabilities: 3.5"),
        ({"says": lambda ids: [None, *({str(i): {"logprob": None}} for i in ids[1:])]}, "are no numbers"),
        ({"says": lambda ids: 401}, "/completions: status 401"),
        ({"decode": swapped}, "another vocabulary than the policy: token 100 is '.*' here and '.*' there"),
        ({"decode": None}, "/detokenize: status 404: its vocabulary cannot be compared with the policy's"),
        ({"models": ("a", "b")}, "serves a, b: name one of them"),
        ({"room": 12}, "row 1 .* tokens to read and 8 to score, its context holds 11"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value[:20],
)
def test_a_server_that_cannot_teach_is_refused_before_weights_are_loaded(recipe, tmp_path, tutor, says):
    with Tutor(**tutor) as server:
        loaded = load_recipe(recipe, overrides_of(taught_by(server.url)))
        with pytest.raises(RecipeError, match=rf"^teachers\.t[:.].*{says}"):
            build_trainer(loaded, tmp_path / "run")


def test_a_name_that_is_not_served_and_a_server_that_is_down_are_one_line(recipe, tmp_path):
    with Tutor() as server:
        loaded = load_recipe(recipe, overrides_of(taught_by(server.url, model="tudor")))
        with pytest.raises(RecipeError, match=r"serves no 'tudor'; did you mean 'tutor'\?"):
            build_trainer(loaded, tmp_path / "run")
    loaded = load_recipe(recipe, overrides_of(taught_by(server.url)))
    line = r"^teachers\.t: http://\S+ has answered nobody for \d s .*client.patience_s is 0.3"
    with pytest.raises(RecipeError, match=line):
        build_trainer(loaded, tmp_path / "run")
    patient = load_recipe(recipe, [*overrides_of(taught_by(server.url)), "teachers.t.client={patience_s: 600}"])
    (said,) = preflight(patient)
    assert "client.patience_s is 3)" in said
    assert list(preflight(patient, offline=True)) == []


# --- a run ------------------------------------------------------------------------------------------------------------

CONTEXT = "{prompt} You said: {attempt} It was {reward}. {feedback}"


def tells(prompts, completions, answer, log_extra=None, **columns):
    """A reward that has something to say of every other completion."""
    if log_extra is not None:
        log_extra("feedback", ["Look again." if i % 2 else None for i, _ in enumerate(completions)])
    return [0.5 * ("e" in str(said)) for said in completions]


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("distil/", "domain/", "num_tokens"))} for line in lines]


@pytest.mark.slow
def test_a_run_whose_teacher_is_gone_goes_on_from_its_checkpoint_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORS_KEY", "secret")
    overrides = ["grpo.max_steps=3", "eval.every=3", "checkpoint.every=3"]
    overrides += ["domains.a.reward=tests.test_teacher_endpoint:tells"]
    server = Tutor().__enter__()

    def recipe(*more):
        client = {"patience_s": 0.3, "api_key_env": "TUTORS_KEY"}
        teachers = {"t": {"endpoint": server.url, "client": client, "context": CONTEXT}}
        return recipe_of(tmp_path, teachers, *overrides, *more, a=("strings", "t"))

    def trained(run, *, resume=False):
        loaded = recipe()
        claim_folder(loaded, tmp_path / run, resume=resume)
        start(loaded, tmp_path / run).train(resume_from_checkpoint=resume)

    trained("whole")
    assert server.keys == {"Bearer secret"}
    read = [TOKENIZER.decode(ids) for ids in server.asked[1:]]  # after the one that tried it
    assert (
        sum("It was 0. Look again." in text for text in read) + sum("It was 0.5. Look again." in text for text in read)
        == 9
        == sum("The reward is 0" in text for text in read)
    )
    assert {key for key in numbers(tmp_path / "whole")[1] if key.startswith("distil/")} >= {"distil/a/kl"}

    asked = len(server.asked)
    server.says = lambda ids: plain(ids) if len(server.asked) < asked + 9 else 503  # in the second draw
    with pytest.raises(GraderGoneError, match=r"teachers\.t: \S+ has answered nobody for .* goes on with --resume"):
        trained("cut")
    (saved,) = (tmp_path / "cut" / "checkpoints").glob("checkpoint-*")
    assert saved.name == "checkpoint-1"

    server.says = lambda ids: [None, *({str(i): {"logprob": -2.0}} for i in ids[1:])]
    with pytest.raises(
        RecipeError, match=r"teachers\.t: its log-probabilities are not those .*\(tutor then, tutor now\)"
    ):
        trained("cut", resume=True)
    server.__exit__()
    with Tutor() as server:  # at another address
        assert list(changed_keys(recipe(), RunFolder(tmp_path / "cut"))) == ["teachers.t.endpoint"]
        trained("cut", resume=True)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    final = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert final[0] == final[1]


@pytest.mark.slow
def test_a_row_that_a_server_does_not_score_has_no_advantage_and_is_counted(tmp_path):
    def says(ids):
        return plain(ids) if len(server.asked) != 3 else [None, *({str(i): {"logprob": None}} for i in ids[1:])]

    with Tutor(says) as server:
        loaded = recipe_of(tmp_path, taught_by(server.url), a=("strings", "t"))
        trainer = build_trainer(loaded, tmp_path / "run")
        trainer.train()
    assert next(line["distil/a/missing"] for line in trainer.state.log_history if "distil/a/missing" in line) == 1
