"""The episodes of one batch, led from turn to turn: what the engine samples next, and what is asked of environments.

No episode waits for another: one whose tool has answered goes on while others are sampled or wait for theirs. What a call
did not come back from ends its episode with reward 0; a fault that no call caused leaves it without a reward; an episode
whose process went down with another's begins again, from its seeds. Where several were at work in a process that is late,
each begins again in one of its own: which of them held up the rest, only that tells.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyphony.curricula.records import Completion, Prompt
from polyphony.trainer.engine.turns import Wait
from polyphony.trainer.engine.vllm import OnFinished, Request
from polyphony.trainer.environments.acting import Acting
from polyphony.trainer.environments.calls import MAKE_S, Ask
from polyphony.trainer.environments.hosts import Event, Events, Host
from polyphony.trainer.environments.led import Led, Rules
from polyphony.trainer.environments.wording import told_at_end

MOST_RESTARTS = 3
"""Of an episode whose process went down with others'."""
MOST_ALONE = 8
"""Episodes that have a process of their own, at once."""
BY_POLICY: tuple[Ask | None, ...] = ("calls", "reply")
"""What the policy brought about, and answers for."""


class Conversations:
    """The turns of one batch, for an engine to sample.

    Example: `batch = Conversations(prompts, requests, rules, events); policy.converse(batch); batch.completions()`
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        rules: Rules,
        events: Events,
        on_finished: OnFinished | None = None,
    ) -> None:
        self._rules, self._events, self._on_finished = rules, events, on_finished
        self._asked = prompts
        self._done: dict[int, Completion] = {}
        self._seats: dict[int, Led] = {}
        self._sampled: dict[int, tuple[Led, int]] = {}
        """What is being sampled: by its number an episode and its attempt."""
        self._numbers = itertools.count()
        self._ready: list[tuple[int, Request]] = []
        self._unbegun: deque[Led] = deque()
        for place, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            acting = rules.acting.get(prompt.domain)
            if acting is not None:
                request = replace(request, episode=place)
            led = Led(place=place, prompt=prompt, request=request, acting=acting)
            if acting is None:
                self._sample(led, request)
            else:
                self._unbegun.append(led)
        self._left = len(prompts)

    def completions(self) -> list[Completion]:
        """Return what came of each, in order."""
        return [self._done[place] for place in range(len(self._done))]

    # --- what the engine asks -----------------------------------------------------------------------------------------

    def waiting(self, wait: Wait) -> list[tuple[int, Request]]:
        """Return what is to be sampled now, in the order of the episodes, not of the clock: some engines know no seeds."""
        self._hear(block=False)
        while wait != "none" and self._left and (not self._ready or (wait == "all" and self._at_work)):
            self._hear(block=True)
        ready, self._ready = sorted(self._ready, key=lambda asked: self._sampled[asked[0]][0].place), []
        return ready

    def take(self, place: int, completion: Completion) -> None:
        """Take in a turn; `place` is the number that it was asked under."""
        led, attempt = self._sampled.pop(place)
        if attempt != led.attempt:  # its process went down meanwhile
            return
        if led.acting is None:
            self._tell(led.place, completion)
            return
        before = led.opening
        led.add(completion)
        said, is_malformed = led.acting.wording.parsed(completion.ids, before)
        led.messages.append(said)
        if is_malformed and led.ids[-1] in self._rules.ends:
            led.failures.append("malformed_calls")
        self._after_turn(led, led.acting, said)

    # --- from turn to turn --------------------------------------------------------------------------------------------

    def _begin_some(self) -> None:
        most = self._rules.episodes
        for led in list(self._unbegun):
            if most is not None and len(self._seats) >= most:
                return
            if led.is_alone and sum(other.is_alone for other in self._seats.values()) >= MOST_ALONE:
                continue
            self._unbegun.remove(led)
            self._begin(led)

    def _begin(self, led: Led) -> None:
        assert led.acting is not None
        led.seat = self._host(led).open(led.acting, alone=led.is_alone)
        self._seats[led.seat] = led
        asked, row = self._asked[led.place], led.prompt
        names = {"seed": seed_of(asked), "id": asked.id, "domain": asked.domain}
        self._ask(led, "reset", {"names": names, "columns": {"prompt": row.prompt, **row.columns}})

    def _after_turn(self, led: Led, acting: Acting, said: Mapping[str, Any]) -> None:
        calls = said.get("tool_calls")
        if led.ids[-1] not in self._rules.ends:  # it ran into the limit, and what it was about to say is unknown
            led.cut = "length"
            self._end(led)
        elif calls:
            if self._rules.most_turns is not None and led.rounds >= self._rules.most_turns:
                led.cut = "turns"
                self._end(led)
                return
            led.rounds += 1
            led.calls += len(calls)
            self._ask(led, "calls", calls)
        elif acting.has_reply:
            self._ask(led, "reply", dict(said))
        else:
            self._end(led)

    def _go_on(self, led: Led, acting: Acting, messages: Sequence[Mapping[str, Any]]) -> None:
        """Add what was said to the policy, and ask for its next turn; as in TRL, what does not fit ends the episode."""
        room = self._room(led)
        if sum(len(m["content"]) for m in messages) > acting.wording.longest_token * room:
            suffix = [0] * room  # longer than the room, whatever its tokens
        else:
            suffix = acting.wording.after(messages)
        if len(suffix) >= room:
            led.cut = "length"
            self._end(led)
            return
        led.messages += messages
        led.add_others(suffix)
        self._sample(led, led.next_request(room - len(suffix)))

    def _room(self, led: Led) -> int:
        room = led.request.max_tokens
        if self._rules.context is not None:
            room = min(room, self._rules.context - len(led.prompt.ids))
        return room - len(led.ids)

    def _sample(self, led: Led, request: Request) -> None:
        number = next(self._numbers)
        self._sampled[number] = led, led.attempt
        self._ready.append((number, request))

    def _end(self, led: Led) -> None:
        if led.acting is not None and led.acting.has_reward and led.fault is None:
            self._ask(led, "reward", None)
        else:
            self._finish(led)

    def _finish(self, led: Led) -> None:
        environment = None
        led.attempt += 1  # of what is still being sampled for it, nothing counts
        if led.seat is not None:
            environment = self._host(led).environment(led.seat)
            self._host(led).close(led.seat)
            del self._seats[led.seat]
        self._tell(led.place, led.completion(self._rules, environment))

    def _tell(self, place: int, completion: Completion) -> None:
        self._done[place] = completion
        self._left -= 1
        if self._on_finished is not None:
            self._on_finished(place, completion)

    # --- what environments are asked, and answer ------------------------------------------------------------------------

    @property
    def _at_work(self) -> bool:
        return any(led.asked is not None for led in self._seats.values())

    def _host(self, led: Led) -> Host:
        assert led.acting is not None
        return self._rules.hosts(led.acting)

    def _ask(self, led: Led, what: Ask, given: Any) -> None:
        assert led.seat is not None
        led.ask(what, MAKE_S + self._rules.timeout_s)  # its process may have to start
        self._host(led).ask(led.seat, what, given)

    def _hear(self, *, block: bool) -> None:
        """Take in what environments answered; where asked to, wait for one answer, or for a limit to pass."""
        self._begin_some()
        timeout = None
        if block:
            at_work = [led.deadline for led in self._seats.values() if led.asked is not None]
            timeout = max(0.0, min(at_work, default=time.monotonic()) - time.monotonic())
        try:
            event = self._events.get(block=block, timeout=timeout)
            while True:
                self._take_in(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass
        late = [(seat, led) for seat, led in self._seats.items() if led.asked is not None and led.is_late]
        for seat, led in late:
            if self._seats.get(seat) is led:  # it may have begun again with another
                self._give_up(led)
        self._begin_some()

    def _take_in(self, event: Event) -> None:
        led = self._seats.get(event.seat)
        if led is None or led.acting is None:  # of an episode that was given up
            return
        if event.lost is not None:
            self._lose(led, event)
            return
        if event.begun is not None:
            led.is_begun = True
            led.limit(MAKE_S if event.begun == "making" else self._rules.timeout_s)
            return
        what, led.asked = led.asked, None
        if event.error is not None:
            self._fail(led, f"{what}: {event.error}")
        elif what == "reset":
            self._open(led, led.acting, event.value)
        elif what == "calls":
            led.failures += [answer["failure"] for answer in event.value if answer["failure"]]
            said = [{"role": "tool", "name": a["name"], "content": a["content"]} for a in event.value]
            self._go_on(led, led.acting, said)
        elif what == "reply" and event.value is not None:
            self._go_on(led, led.acting, [{"role": "user", "content": event.value}])
        elif what == "reply":
            self._end(led)
        else:
            led.own_reward = event.value
            self._finish(led)

    def _open(self, led: Led, acting: Acting, told: str | None) -> None:
        """Show the policy what its environment begins with, at the end of the prompt's last message as in TRL."""
        asked = self._asked[led.place]
        if told:
            messages: Any = asked.prompt
            led.prompt = replace(asked, prompt=told_at_end(messages, told), ids=acting.wording.prompt(messages, told))
        if (room := self._room(led)) < 1:
            self._fail(led, f"reset: the prompt has {len(led.prompt.ids)} tokens, the context {self._rules.context}")
        else:
            self._sample(led, led.next_request(room))

    def _fail(self, led: Led, what: str, *, is_forfeit: bool = False) -> None:
        led.fault, led.is_forfeit, led.asked = what, is_forfeit, None
        self._finish(led)

    def _give_up(self, led: Led) -> None:
        """End an episode whose environment is past its limit, or find out whether it is that one's; those that shared its
        process begin again."""
        assert led.seat is not None
        host = self._host(led)
        beside = [self._seats[seat] for seat in host.beside(led.seat) if seat in self._seats]
        if not led.is_begun and any(other.is_at_work for other in beside):
            led.limit(self._rules.timeout_s)  # it waits for others, which have limits
            return
        lost = [self._seats[seat] for seat in host.drop(led.seat) if seat in self._seats]
        suspects = [other for other in lost if other.is_at_work]
        is_unclear = bool(suspects) or (led.asked in BY_POLICY and not (led.is_begun or led.is_alone))
        for other in lost:
            self._again(other, alone=other in suspects or other.attempt > 0)
        if is_unclear:
            self._again(led, alone=True)
        else:
            what = f"{led.asked}: no answer within {led.given_s:g} s"
            self._leave(led, what, is_forfeit=led.asked in BY_POLICY)

    def _leave(self, led: Led, what: str, *, is_forfeit: bool = False) -> None:
        """End an episode whose instance is gone."""
        assert led.seat is not None
        del self._seats[led.seat]
        led.seat = None
        self._fail(led, what, is_forfeit=is_forfeit)

    def _lose(self, led: Led, event: Event) -> None:
        self._host(led).close(event.seat)
        if event.lost == "its_own" and led.asked in BY_POLICY:
            self._leave(led, f"{led.asked}: the process ended", is_forfeit=True)
        else:
            self._again(led, alone=event.lost != "others" or led.attempt > 0)

    def _again(self, led: Led, *, alone: bool) -> None:
        assert led.seat is not None
        self._ready = [(number, request) for number, request in self._ready if self._sampled[number][0] is not led]
        if led.attempt >= MOST_RESTARTS:
            self._leave(led, f"the environment's process was lost {led.attempt + 1} times")
            return
        del self._seats[led.seat]
        led.begin_again(self._asked[led.place], alone=alone)
        self._unbegun.appendleft(led)


def seed_of(prompt: Prompt) -> int:
    """Return what an environment is seeded with for a row: the same at every draw, for every completion of its group."""
    digest = hashlib.sha256(f"{prompt.domain}/{prompt.id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
