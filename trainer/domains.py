"""The domains of a run with their rows read, checked and tokenisable: all that can be checked before weights are loaded.

`find_overlap` finds training rows that leak a held-out row: the same prompt, or 13 of its words in a row.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig

from polyphony.curricula.records import Domain, Prompt
from polyphony.rewards import find_reward
from polyphony.rewards.shaping import within
from polyphony.trainer.data import PromptTable
from polyphony.trainer.environments.acting import Acting, those_that_act
from polyphony.trainer.rows import load_rows
from polyphony.trainer.settings import DataSettings

Told = Callable[[str, int, int | None], None]
"""Hears how far the rows are: what is done with them, with how many so far, of how many (None: not known yet)."""
TOLD_EVERY = 250


NGRAM_WORDS = 13
"""Words in a row that two prompts may not share; 13 is the length GPT-3's decontamination used (arXiv:2005.14165)."""


BOILERPLATE_SHARE = 0.01
"""An n-gram in more than this share of one domain's held-out rows (and in more than two) is a template, not a leak."""


INSTRUCTION_SHARE = 0.1
"""So is one in more than this share of the training rows: in few held-out rows, their own repetition says nothing."""


def find_overlap(train: PromptTable, heldout: Iterable[PromptTable]) -> dict[str, str]:
    """Return, by id, what each training prompt repeats of a held-out prompt of any domain: all of it, or a run of its words.

    What a user says in several held-out rows that are not the same (`Go.`, under a task in the system message) is not one
    of them: such rows are compared whole.
    """
    tables = list(heldout)
    of_train, *of_heldout = ({i: _said(table, i) for i in table.ids} for table in (train, *tables))
    rows_of: dict[str, set[str]] = {}
    for user, everything in (said for texts in of_heldout for said in texts.values()):
        rows_of.setdefault(user, set()).add(everything)
    whole: dict[str, str] = {}
    for table, texts in zip(tables, of_heldout, strict=True):
        for i, (user, everything) in texts.items():
            for text in (everything, user) if user and len(rows_of[user]) == 1 else (everything,):
                whole.setdefault(text, f"the prompt of {table.row_of(i)}")
    grams = _telling([e for _, e in of_train.values()], [[e for _, e in texts.values()] for texts in of_heldout])
    found = {}
    for i, (user, everything) in of_train.items():
        words = (f"the words {gram!r}" for gram in _ngrams(everything) if gram in grams)
        if repeated := whole.get(everything) or whole.get(user) or next(words, None):
            found[i] = repeated
    return found


def _said(table: PromptTable, prompt_id: str) -> tuple[str, str]:
    user, everything = table.said(prompt_id)
    return _normalise(user), _normalise(everything)


def _telling(train: Sequence[str], heldout: Sequence[Sequence[str]]) -> set[str]:
    """The n-grams of held-out rows that tell one of them: those that are no template, and no instruction."""
    grams: set[str] = set()
    templates: set[str] = set()
    for texts in heldout:
        counts = Counter(gram for text in texts for gram in set(_ngrams(text)))
        grams.update(counts)
        templates |= {gram for gram, n in counts.items() if n > max(2, BOILERPLATE_SHARE * len(texts))}
    in_train = Counter(gram for text in train for gram in set(_ngrams(text)) & grams)
    templates |= {gram for gram, n in in_train.items() if n > max(2, INSTRUCTION_SHARE * len(train))}
    return grams - templates


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _ngrams(text: str) -> Iterator[str]:
    words = text.split()
    return (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))


TURN_MARKS = tuple(
    """
    <|im_start|> <|start_header_id|> <|begin_of_text|> <start_of_turn> [INST] <s>[INST] <|user|> <|system|> <|User|>
    <｜User｜> <|start|> <|im_system|> [gMASK]
    """.split()  # noqa: SIM905
)
"""What turns begin with in the templates of other families: text for another model, that no template of this one knows."""


TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "[/INST]", "<|endoftext|>", "<|end|>")
"""And what they end with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainData:
    """Domains, their tables, their length limits.

    Example: `DomainData.load([math, writing], tokenizer=tokenizer, args=GRPOConfig(...))`
    """

    domains: tuple[Domain, ...]
    train: Mapping[str, PromptTable]
    heldout: Mapping[str, PromptTable]
    limits: Mapping[str, int]
    """Per domain, the most tokens a completion may have."""
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Tokens that prompt and completion may fill together; None where the model does not say."""
    longest: int = 0
    """Tokens of the longest prompt together with its longest completion."""
    spare: Mapping[str, PromptTable] = field(default_factory=dict)
    """Per domain that is only watched, the rows to recover it with (`guardrails.<d>.prompts`)."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Per domain, training rows left out because a held-out row repeats them."""
    repeating: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Per domain, the ids of training rows that repeat a held-out one and are kept (`data.overlap: keep`)."""
    acting: Mapping[str, Acting] = field(default_factory=dict)
    """Domains that act: their environments, tools and words."""
    answers: Mapping[str, PromptTable] = field(default_factory=dict)
    """Under `algorithm: sft`, what is learned from, by its place."""
    skills: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By domain and id of a row with a column `skill`, that part of the domain: `domain/skill`, as in metric keys."""

    @classmethod
    def load(
        cls,
        domains: Sequence[Domain],
        *,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        context: int | None = None,
        settings: DataSettings | None = None,
        folder: Path | None = None,
        spare: Mapping[str, Any] | None = None,
        told: Told | None = None,
        as_trl: Collection[str] = (),
    ) -> DomainData:
        """Read and check every domain; rows whose reference its reward cannot read are left out, up to a share.

        `as_trl` are domains whose rows were given as to TRL's trainer: all are kept that say the same, and none need be held
        out.

        `told` hears what is done with how many rows so far, and of how many, None where that is not known yet.
        Raises ValueError naming the domain and the row.
        """
        _check_names(domains, may_be_unseen=as_trl)
        shared = args.chat_template_kwargs or {}  # a domain's own arguments win
        domains = [replace(d, chat_template_kwargs={**shared, **d.chat_template_kwargs}) for d in domains]  # type: ignore[dict-item]
        domains = [replace(d, reward=within(d.reward, _limit(d, args.max_completion_length))) for d in domains]
        domains, acting = those_that_act(domains, tokenizer)
        taken = settings or DataSettings()
        is_chat = tokenizer.chat_template is not None
        told, read = told or _told_nobody, list[int]()

        def tables(split: str) -> dict[str, PromptTable]:
            found = {}
            for domain in domains:
                where, source = _source(domain, split, spare or {})
                if source is not None:
                    rows = load_rows(source, where=where, folder=folder)
                    how: dict[str, Any] = {"where": where, "is_chat": is_chat, "keeps_repeats": domain.name in as_trl}
                    found[domain.name] = table = PromptTable(rows, domain=domain, **how)
                    table.tell()
                    read.append(len(table))
                    told("read", sum(read), None)
                    table.leave_out_unreadable(_reward_of(domain), most=taken.max_unreadable)
            return found

        heldout, train, to_recover = tables("heldout"), tables("train"), tables("prompts")
        if not train:
            raise ValueError("no domain has `train` rows: at least one must not be watch-only")
        limits = {d.name: _limit(d, args.max_completion_length) for d in domains}
        rows: dict[str, Any] = {"train": train, "heldout": heldout, "spare": to_recover}
        data = cls(domains=tuple(domains), limits=limits, tokenizer=tokenizer, context=context, acting=acting, **rows)
        data._check_text()
        longest = data._leave_out_overlong(told)
        data._check_tools()
        data._check_halves()
        dropped, repeating = _resolve_overlap(train, heldout, taken, spare=to_recover)
        data = replace(data, longest=longest, skills=_skills(data.tables.values()))
        return replace(data, dropped=dropped, repeating=repeating)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.domains)

    @property
    def tables(self) -> dict[str, PromptTable]:
        """All rows, by their place in a recipe."""
        every = (self.train, self.heldout, self.answers, self.spare)
        return {table.where: table for tables in every for table in tables.values()}

    @property
    def marks(self) -> tuple[str, ...]:
        """What no answer holds: the special tokens that frame a turn, and what frames one in templates of other families."""
        return (*TURN_MARKS, *TURN_ENDS, *self._frames())

    def rows_of(self, domain: str) -> PromptTable:
        """Return what is practised of a domain: its training rows, or those that a watched one is recovered with."""
        return self.train[domain] if domain in self.train else self.spare[domain]

    def to_recover(self, domains: Iterable[str]) -> dict[str, list[str]]:
        """Return by domain the ids of what it is recovered with, where that is not all that is trained on: never what
        repeats a held-out row. Raises ValueError for one of `domains`, which may be recovered, that has nothing else."""
        found = {name: list(table.ids) for name, table in self.spare.items()}
        for name in self.repeating.keys() & set(domains):
            found[name] = [i for i in self.train[name].ids if i not in self.repeating[name]]
            if not found[name]:
                raise ValueError(
                    f"guardrails.{name}: action: recover, and all its training rows repeat held-out rows "
                    "(data.overlap=keep): nothing is left to recover it with"
                )
        return found

    @property
    def openings(self) -> dict[str, str]:
        """By domain, a thought that the chat template has begun for the policy (`<think>`), where it has."""
        found = {}
        for domain in self.domains if self.tokenizer.chat_template is not None else ():
            prompt = next(iter(self.heldout.get(domain.name) or self.rows_of(domain.name))).prompt
            if isinstance(prompt, str):
                continue
            asked, begun = (
                str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=adds, **kwargs))  # type: ignore[arg-type]
                for kwargs in [dict(domain.chat_template_kwargs)]
                for adds in (False, True)
            )
            _, tag, rest = begun.removeprefix(asked).rpartition("<think>")
            if tag and "</think>" not in rest:
                found[domain.name] = tag + rest
        return found

    @property
    def framing(self) -> frozenset[int]:
        """Token ids that frame what is said and are no part of it: ends, padding, what a template puts around a turn.

        Other tokens marked special, a tool call's for example, are said by the policy.
        """
        tokenizer: Any = self.tokenizer
        special = set(tokenizer.all_special_ids)
        framing = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            with suppress(
                TypeError, TemplateError
            ):  # one that refuses such a conversation has its ends by the other names
                framing |= special & set(
                    tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
                )
        return frozenset(framing - {None})

    @property
    def n_train(self) -> int:
        """Training prompts of all domains."""
        return sum(len(table) for table in self.train.values())

    def asked(self, row: Mapping[str, Any]) -> Prompt:
        """Return a row that is no domain's own as a prompt of the domain that its column `domain` names, or of the only one.

        Raises ValueError where there is none of that name, and for a row that is no prompt.
        """
        names = self.names
        name = names[0] if len(names) == 1 else row.get("domain")
        if name not in names:
            raise ValueError(f"eval_dataset: column `domain` is {name!r}, expected one of {', '.join(names)}")
        is_chat = self.tokenizer.chat_template is not None
        domain = self.domains[names.index(name)]
        return next(iter(PromptTable([row], domain=domain, where="eval_dataset", is_chat=is_chat)))

    def tokenized(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Return the prompts with their token ids, through the chat template with their domain's arguments."""
        kwargs = {d.name: dict(d.chat_template_kwargs) for d in self.domains}
        return [replace(prompt, ids=self._ids(prompt, kwargs[prompt.domain])) for prompt in prompts]

    def _ids(self, prompt: Prompt, chat_template_kwargs: Mapping) -> list[int]:
        if isinstance(prompt.prompt, str):
            begins = str(self.tokenizer.bos_token or "")  # a text that has one gets no second
            is_begun = bool(begins) and prompt.prompt.startswith(begins)
            return self.tokenizer(prompt.prompt, add_special_tokens=not is_begun)["input_ids"]  # type: ignore[return-value]
        tools: dict[str, Any] = {"tools": list(prompt.tools)} if prompt.tools else {}
        try:
            if prompt.domain in self.acting:
                return self.acting[prompt.domain].wording.prompt(prompt.prompt)
            encoded = self.tokenizer.apply_chat_template(
                prompt.prompt,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **chat_template_kwargs,
                **tools,
            )
        except (TypeError, TemplateError) as error:
            # a template refuses what it does not know: a system role, roles that do not alternate, a tool without a name
            raise ValueError(
                f"domain {prompt.domain!r}: the chat template refuses prompt {prompt.id!r}: {error}"
            ) from error
        return encoded["input_ids"]  # type: ignore[index,return-value]

    def _check_text(self) -> None:
        """Raise ValueError for text that went through a chat template already, and would again; warn of tokens inside."""
        if self.tokenizer.chat_template is None:
            return
        begins, frames = (*self._turn_begins(), *TURN_MARKS), self._frames()
        for table in self.tables.values():
            framed = {}
            for prompt_id in table.ids if table.domain.as_chat else ():
                for text in table.texts_of(prompt_id):
                    if text.lstrip().startswith(begins):
                        raise ValueError(
                            f"{table.row_of(prompt_id)}: the text {text.strip()!r:.40} went through a chat template already "
                            f"and would again: give messages, or set domains.{table.domain.name}.as_chat: false"
                        )
                    if inside := next((mark for mark in frames if mark in text), None):
                        framed[prompt_id] = f"{inside!r}"
            if framed:
                what = "rows have in their text what the policy reads as the frame of a turn"
                table.warn(f"{table.where}: {len(framed)} of {len(table)} {what} ({table.shown(framed)})")

    def _frames(self) -> list[str]:
        """The special tokens that frame a turn, as a text would have them."""
        return sorted(mark for i in self.framing if len(mark := str(self.tokenizer.decode([i])).strip()) > 2)

    def _turn_begins(self) -> tuple[str, ...]:
        """What a rendered chat may begin with: tokens that frame a turn, and marks that are plain text (`[INST]`)."""
        framing = {str(self.tokenizer.decode([i])) for i in self.framing}
        with suppress(TypeError, TemplateError):
            asked = self.tokenizer.apply_chat_template([{"role": "user", "content": "\x1a"}], tokenize=False)
            framing.add(str(asked).partition("\x1a")[0].rpartition("\n")[2].strip())
        return tuple(sorted(mark for mark in framing if len(mark) > 2 and not mark.isalnum()))

    def _check_tools(self) -> None:
        """Warn where rows have functions that the policy would not be shown; refuse what a domain that acts cannot use."""
        for table in self.tables.values():
            prompt = next((prompt for prompt in table if prompt.tools), None)
            if acting := self.acting.get(table.domain.name):
                acting.check_rows(table, with_tools=prompt)
                continue
            if prompt is None:
                continue
            shown, hidden = self.tokenized([prompt, replace(prompt, tools=())])
            if shown.ids == hidden.ids:
                what = "a prompt that is text has" if isinstance(prompt.prompt, str) else "the chat template has"
                said = f"{table.row_of(prompt.id)}: `tools` are not shown to the policy: {what} no place for them"
                warnings.warn(said, stacklevel=3)

    def _check_halves(self) -> None:
        for table in self.heldout.values():
            if len(table) < 2:
                raise ValueError(f"{table.where}: 1 item; at least 2 are needed, one for each half: steer and report")

    def _leave_out_overlong(self, told: Told) -> int:
        """Leave out prompts that the context does not hold with their completions; return the longest that stay, in tokens.

        Warns with their number and the first three. Raises ValueError where a table has no others.
        """
        longest, done, of = 0, 0, sum(map(len, self.tables.values()))
        every = (self.train, self.heldout, self.spare)
        for name, table in ((name, table) for tables in every for name, table in tables.items()):
            lengths, rest = {}, iter(table)
            while prompts := list(islice(rest, TOLD_EVERY)):
                lengths |= {prompt.id: len(prompt.ids) + self.limits[name] for prompt in self.tokenized(prompts)}
                done += len(prompts)
                told("tokenized", done, of)
            most = self.context or max(lengths.values())
            too_long = {i: f"{n - self.limits[name]} tokens" for i, n in lengths.items() if n > most}
            longest = max([longest, *(n for n in lengths.values() if n <= most)])
            if too_long:
                table.leave_out(
                    too_long,
                    f"with completions of {self.limits[name]} tokens (max_completion_length) exceed the context of "
                    f"{self.context}",
                )
        return longest


def _skills(tables: Iterable[PromptTable]) -> dict[tuple[str, str], str]:
    return {(t.domain.name, i): f"{t.domain.name}/{skill}" for t in tables for i, skill in t.skills.items()}


def _told_nobody(what: str, done: int, of: int | None) -> None:
    pass


def code_of(args: GRPOConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return which revision of a model's files is read, and whether its own code is run, as TRL reads its weights.

    `args` are TRL's arguments, or a recipe's `grpo`.
    """
    said = args if isinstance(args, Mapping) else vars(args)
    given = init if isinstance(init := said.get("model_init_kwargs"), Mapping) else {}
    revision = {"revision": given["revision"]} if given.get("revision") else {}
    return {"trust_remote_code": bool(given.get("trust_remote_code", said.get("trust_remote_code"))), **revision}


def context_of(model: Any, **code: Any) -> int | None:
    """Return the tokens that a prompt and its completion may fill together; `model` is one, or its name with `code_of`."""
    config = AutoConfig.from_pretrained(model, **code) if isinstance(model, str) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _source(domain: Domain, split: str, spare: Mapping[str, Any]) -> tuple[str, Any]:
    """Return where a recipe has rows of a domain, and what it has there: `prompts` are those of its guardrail."""
    if split == "prompts":
        return f"guardrails.{domain.name}.prompts", spare.get(domain.name)
    return f"domains.{domain.name}.{split}", getattr(domain, split)


def _reward_of(domain: Domain) -> Any:
    try:
        return find_reward(domain.reward)
    except ValueError as error:
        raise ValueError(f"domains.{domain.name}.reward: {error}") from error


def _check_names(domains: Sequence[Domain], *, may_be_unseen: Collection[str]) -> None:
    names = [d.name for d in domains]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"domains named twice: {repeated}")
    for domain in domains:
        if domain.heldout is None and domain.name not in may_be_unseen:
            raise ValueError(
                f"domain {domain.name!r} has no `heldout` rows: what training does to it could not be seen"
            )


def _limit(domain: Domain, most: int | None) -> int:
    if most is None:
        raise ValueError("max_completion_length must be a number: completions without a limit are not supported")
    limit = domain.max_completion_length or most
    if limit > most:
        raise ValueError(f"domain {domain.name!r}: max_completion_length must be in 1..{most} (the run's), got {limit}")
    return limit


def _resolve_overlap(
    train: Mapping[str, PromptTable],
    heldout: Mapping[str, PromptTable],
    settings: DataSettings,
    *,
    spare: Mapping[str, PromptTable],
) -> tuple[dict[str, int], dict[str, frozenset[str]]]:
    """Do what is asked with rows that repeat held-out ones; `spare` ones, to recover a domain with, are never kept.

    Returns by domain how many were left out, and the ids of those that were kept.
    """
    dropped, kept = {}, {}
    for name, table in [*train.items(), *spare.items()]:
        found = find_overlap(table, heldout.values())
        if not found:
            continue
        message = f"{table.where}: {len(found)} of {len(table)} rows repeat held-out rows"
        why = f" ({table.shown(found)})"
        if settings.overlap == "error":
            raise ValueError(f"{message}, for example id {min(found)!r}{why}")
        if settings.overlap == "keep" and table not in spare.values():
            table.warn(f"{message}{why}; kept, as asked for")
            kept[name] = frozenset(found)
            continue
        table.warn(f"{message}{why}; left out")
        table.drop(set(found))
        dropped[name] = len(found)
        if len(table) == 0:
            raise ValueError(f"{message}{why}: nothing is left to train on")
    return dropped, kept
