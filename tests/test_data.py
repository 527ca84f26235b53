from __future__ import annotations

import json
from dataclasses import replace

import pytest

from polyphony.curricula.records import Domain
from polyphony.trainer.data import PromptTable, content_id
from polyphony.trainer.domains import find_overlap
from polyphony.trainer.environments.calls import methods_of
from polyphony.trainer.rows import load_rows

MATH = Domain(name="math", kind="structured", reward="exact")


def table(rows, *, domain=MATH, is_chat=True):
    return PromptTable(rows, domain=domain, where="domains.math.train", is_chat=is_chat)


def test_a_malformed_line_is_named_with_file_and_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not valid JSON"):
        load_rows("rows.jsonl", where="domains.math.train", folder=tmp_path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected an object, got list"):
        load_rows("rows.jsonl", where="here", folder=tmp_path)


def test_a_missing_file_is_named_with_its_place_in_the_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"domains\.math\.train: file .*rows\.jsonl does not exist"):
        load_rows("rows.jsonl", where="domains.math.train", folder=tmp_path)


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    first, second = (table(load_rows(f"rows.{kind}", where="x", folder=tmp_path)) for kind in ("jsonl", "parquet"))
    assert list(first) == list(second)


def test_nulls_that_a_file_format_puts_in_are_not_the_rows_own(tmp_path):
    from datasets import Dataset

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "2"}}}
    rows = [
        {"prompt": [{"role": "user", "content": "1"}], "tools": [call]},
        {
            "prompt": [{"role": "user", "content": "2"}, {"role": "assistant", "tool_calls": [other, call]}],
            "tools": None,
        },
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    first, second = table(rows), table(load_rows("rows.parquet", where="x", folder=tmp_path))
    assert (first.ids, [p.prompt for p in first]) == (second.ids, [p.prompt for p in second])
    assert [p.tools for p in first] == [p.tools for p in second] == [[call], []]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1+1="}, r" has no `prompt`, did you mean `question`\?; its columns are \['question'\]"),
        ({"prompt": '[{"role": "user", "content": "1"}]'}, "its `prompt` is JSON text of messages, "),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a list of parts of text, got a part {'type'"),
        ({"prompt": "1", "tools": "hammer"}, "`tools` is a list of functions' schemas, or JSON text"),
        ({"prompt": "1", "tools": [5]}, "`tools` is a list of functions' schemas, got 5 among them"),
    ],
)
def test_what_a_policy_cannot_be_asked_is_refused_by_row(row, message):
    with pytest.raises(ValueError, match=rf"domains\.math\.train: row 1.*{message}"):
        table([row])


def test_under_as_chat_false_rows_are_of_one_kind():
    as_text = Domain(name="math", kind="structured", reward="exact", as_chat=False)
    with pytest.raises(ValueError, match="row 2: under as_chat: false all rows are text, or all are conversations"):
        table([{"prompt": "1"}, {"prompt": [{"role": "user", "content": "1"}]}], domain=as_text)


def test_a_limit_takes_the_first_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(5)))
    assert len(load_rows({"path": "rows.jsonl", "limit": 2}, where="x", folder=tmp_path)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"generator": "nowhere:rows"}, "generator 'nowhere:rows' cannot be imported"),
        ({"generator": "builtins:len", "wrong": 1}, "generator 'builtins:len'"),
        ({"file": "x"}, "unknown key 'file'; known: environment, generator, limit, name, path, revision, split"),
        ({"split": "x"}, r"expected `path` \(with `split`, `limit`\), `generator` or"),
        ({"path": "x.jsonl", "lmit": 1}, "unknown key 'lmit'; did you mean 'limit'"),
        ({"path": "x.jsonl", "split": "test"}, "split 'test' is for hf:// sources and folders"),
        ({"generator": 5}, "expected generator: pkg.module:function"),
        ({"generator": "math:sqrt", "x": 4}, "generator 'math:sqrt'"),
        ({"generator": "time:time"}, "expected rows, a path, hf://org/name or a generator, got generator 'time:time'"),
        ({"environment": f"{__name__}:Sums"}, "count must be a whole number of at least 1, got 0"),
        (
            {"environment": f"{__name__}:Sums", "count": 2, "seed": -1},
            "seed must be a whole number of at least 0, got -1",
        ),
        ({"environment": f"{__name__}:Sums", "count": 2, "sead": 1}, "unknown key 'sead'; did you mean 'seed'"),
        ({"environment": f"{__name__}:Sums", "count": 99}, "Sums': rows raised OverflowError: only 50 are there"),
        (
            {"environment": f"{__name__}:Tooled", "count": 2},
            r"Tooled' makes no rows: it has no class method rows\(count",
        ),
        ({"environment": "nowhere:Game", "count": 2}, "domains.math.train: environment 'nowhere:Game'"),
        (5, "expected rows, a path, hf://org/name or a generator, got int 5"),
        ((row for row in ()), "got generator <generator"),
        ("hf://", "expected hf://org/name, got 'hf://'"),
    ],
)
def test_a_source_of_unknown_form_is_an_error(source, message):
    with pytest.raises(ValueError, match=message):
        load_rows(source, where="domains.math.train")


def test_the_id_of_a_row_is_its_content_and_nothing_else():
    row = {"prompt": "1+1=", "answer": "2"}
    assert content_id(row) == content_id({"answer": "2", "prompt": "1+1=", "level": 3})
    assert content_id(row) != content_id({"prompt": "1+1=", "answer": "3"})


def test_a_message_that_only_calls_tools_needs_no_content():
    calls = [{"role": "user", "content": "1"}, {"role": "assistant", "tool_calls": [{"type": "function"}]}]
    assert len(table([{"prompt": calls}])) == 1


def test_an_id_given_twice_is_an_error_that_names_both_rows():
    with pytest.raises(ValueError, match="id 'a' stands in row 1 and again in row 3"):
        table([{"prompt": "1", "id": "a"}, {"prompt": "2", "id": "b"}, {"prompt": "3", "id": "a"}])


def test_identical_rows_without_ids_count_once():
    found = table([{"prompt": "1", "answer": "2"}] * 3)
    assert (len(found), found.repeated) == (1, 2)


def test_text_that_only_looks_like_messages_is_text():
    rows = [{"prompt": '[1, 2] has no "role"'}, {"prompt": '["role", {"role": 1}]'}]
    assert [p.prompt[0]["content"] for p in table(rows)] == [row["prompt"] for row in rows]


def test_text_becomes_a_conversation_under_a_chat_template_with_its_system_prompt():
    domain = Domain(name="math", kind="structured", reward="exact", system_prompt="Be brief.")
    (prompt,) = table([{"prompt": "1+1="}], domain=domain)
    assert prompt.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
    ]


def test_text_stays_text_without_a_chat_template():
    assert next(iter(table([{"prompt": "1+1="}], is_chat=False))).prompt == "1+1="


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(ValueError, match="row 1 is a conversation, but the tokenizer has no chat template"):
        table([{"prompt": [{"role": "user", "content": "1"}]}], is_chat=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1", "answer": "2"},
        {"prompt": "1", "ground_truth": "2"},
        {"prompt": "1", "data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "2"}},
        {"prompt": "1", "answer": "2", "reward_model": "not verl's"},
    ],
)
def test_the_reference_is_found_under_the_names_in_use(row):
    (prompt,) = table([row])
    assert prompt.columns["answer"] == "2"


def test_other_columns_reach_the_reward_and_prompt_id_domain_do_not():
    (prompt,) = table([{"prompt": "1", "id": "a", "domain": "math", "level": 3}])
    assert prompt.columns == {"level": 3, "answer": None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"question": "1"}], r"row 1 has no `prompt`, did you mean `question`\?; its columns are \['question'\]"),
        ([{"prompt": ""}], "row 1 has an empty `prompt`"),
        (["1"], "row 1: expected an object, got '1'"),
        ([{"prompt": [{"content": "1"}]}], "row 1: a prompt is text or a list of messages with role and content, got "),
        ([{"prompt": [{"role": "user", "content": None}]}], "row 1: a prompt is text or a list of messages"),
        ([{"prompt": "1", "completions": ["2"]}], "row 1: column 'completions' needs another name"),
    ],
)
def test_bad_rows_are_errors_that_name_the_place(rows, message):
    with pytest.raises(ValueError, match=rf"domains\.math\.train: {message}"):
        table(rows)


def counted(size):
    for i in range(size):
        yield {"prompt": f"{i} ="}


class Sums:
    """An environment that makes its own rows."""

    def reset(self, first):
        return f"{first} + {first} ="

    @classmethod
    def rows(cls, count, seed):
        if count > 50:
            raise OverflowError("only 50 are there")
        return ({"prompt": "Add.", "first": 100 * seed + n} for n in range(count))


class Tooled:
    """One whose tool is called as a maker of rows is."""

    def reset(self):
        return None

    def rows(self, table: str) -> str:
        """Count the rows of a table."""
        return table


def test_an_environment_may_make_its_own_rows():
    source = {"environment": f"{__name__}:Sums", "count": 3, "seed": 2}
    assert [row["first"] for row in load_rows(source, where="x")] == [200, 201, 202]
    playing = replace(MATH, environment=f"{__name__}:Sums")
    train, heldout = (
        PromptTable(load_rows({**source, "seed": seed}, where=name), domain=playing, where=name, is_chat=True)
        for name, seed in (("train", 2), ("heldout", 3))
    )
    assert (len(train), find_overlap(train, [heldout])) == (3, {})  # one prompt, and other columns
    assert len(find_overlap(train, [train])) == 3
    assert methods_of(Sums()) == {} and list(methods_of(Tooled())) == ["rows"]


def test_a_generator_function_may_yield_its_rows():
    assert len(load_rows({"generator": f"{__name__}:counted", "size": 3}, where="x")) == 3


def test_a_hub_source_that_cannot_be_loaded_is_named_with_its_place(monkeypatch):
    import datasets

    with pytest.raises(ValueError, match=r"domains\.d\.train: expected hf://org/name, got 'hf://'"):
        load_rows("hf://", where="domains.d.train")
    asked = []

    def missing(name, split):
        asked.append((name, split))
        raise FileNotFoundError("no such set")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match=r"domains\.d\.train: hf://a/b \(split 'test'\) cannot be loaded: no such set"):
        load_rows({"path": "hf://a/b", "split": "test"}, where="domains.d.train")
    assert asked == [("a/b", "test")]


LINES = b'{"prompt": "1"}\n\n{"prompt": "2"}\n'


@pytest.fixture
def files(tmp_path):
    import pyarrow

    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))
    (tmp_path / "b.json").write_text('[{"prompt": "3"},\n{"prompt": "4"}]')
    for name, codec in (("c.jsonl.gz", "gzip"), ("d.jsonl.zst", "zstd")):
        with pyarrow.output_stream(str(tmp_path / name), compression=codec) as packed:
            packed.write(LINES)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ("a.jsonl", "12"),
        ("b.json", "34"),
        ("c.jsonl.gz", "12"),
        ("d.jsonl.zst", "12"),
        (["b.json", "a.jsonl"], "3412"),
        ("*.js*", "12341212"),
        (".", "12341212"),
        ({"path": ["b.json", "a.jsonl"], "limit": 3}, "341"),
    ],
)
def test_files_are_read_as_users_have_them(files, source, prompts):
    found = load_rows(source, where="x", folder=files)
    assert [row["prompt"] for row in found] == [found[i]["prompt"] for i in range(len(found))] == list(prompts)


def test_a_row_is_known_by_its_file_and_line(files):
    rows = load_rows(["b.json", "a.jsonl"], where="x", folder=files)
    with pytest.raises(ValueError, match=r"row 1 is text: as_chat.*\(.*b\.json\)"):
        table(rows, domain=Domain(name="math", kind="structured", as_chat=False, system_prompt="be brief"))
    assert rows.place(3).endswith("a.jsonl:3")


def test_files_of_a_folder_are_split_by_their_names(files):
    for name in ("train-0.jsonl", "test.jsonl", "validation/x.jsonl"):
        (files / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (files / "set" / name).write_text(json.dumps({"prompt": name}) + "\n")
    (files / "set" / "again").symlink_to(files / "set")
    read = {s: load_rows({"path": "set", "split": s}, where="x", folder=files) for s in ("train", "test", "validation")}
    assert [[row["prompt"] for row in rows] for rows in read.values()] == [
        ["train-0.jsonl"],
        ["test.jsonl"],
        ["validation/x.jsonl"],
    ]
    with pytest.raises(ValueError, match="no rows of split 'dev'; its splits are test, train, validation"):
        load_rows({"path": "set", "split": "dev"}, where="x", folder=files)


def test_what_save_to_disk_wrote_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    kept = Dataset.from_list([{"prompt": "1"}])
    kept.save_to_disk(str(tmp_path / "one"))
    DatasetDict(test=kept).save_to_disk(str(tmp_path / "many"))
    assert load_rows("one", where="x", folder=tmp_path)[0] == {"prompt": "1"}
    assert len(load_rows({"path": "many", "split": "test"}, where="x", folder=tmp_path)) == 1
    with pytest.raises(ValueError, match="many has no split 'train'; its splits are test"):
        load_rows("many", where="x", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "one.json",
            b'{\n"data": [{"prompt": "1"}]}',
            r"one\.json: is one dict with the keys 'data': expected a list of rows, or one",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: nested too deeply"),
        ("a.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: Exceeds the limit"),
        ("a.json", b'[{"prompt": "1"},\n{]', r"a\.json:2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "\\ud800", "id": 1}', r"row 1: half a character.* \(.*a\.jsonl:1\)"),
        ("a.jsonl", b"\n", r"domains\.math\.train: no rows in .*a\.jsonl"),
        ("a.jsonl.gz", b"no", r"a\.jsonl\.gz: not readable as gzip"),
        ("a.parquet", b"no", r"a\.parquet: not a readable Parquet file"),
        ("a.csv", b"", "cannot read 'a.csv'; known"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        table(load_rows(name, where="domains.math.train", folder=tmp_path))


def test_an_empty_parquet_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"prompt": []}).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match=r"no rows in .*rows\.parquet"):
        table(load_rows("rows.parquet", where="x", folder=tmp_path))


def test_a_skill_names_a_part_of_a_domain_in_metric_keys():
    rows = [{"prompt": "1", "skill": "adding up"}, {"prompt": "2"}, {"prompt": "3", "skill": "v1.2"}]
    found = table(rows)
    assert [found.skills.get(i) for i in found.ids] == ["adding up", None, "v1.2"]
    for odd in ("a/b", "", 3, ["x"]):
        with pytest.raises(ValueError, match=r"domains.math.train: row 1: column `skill` names a part of the domain"):
            table([{"prompt": "1", "skill": odd}])
