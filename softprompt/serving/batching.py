"""One pass of continuous batching: waiting requests join pools, and all rows make a step."""

import dataclasses
import functools
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

from softprompt.inference.pool import Draw, Joining, padded
from softprompt.inference.pool_programs import Choice
from softprompt.serving.bank import Bank, LoadedTask
from softprompt.serving.placement import Kind, KindPools, PoolSlot, Sizes
from softprompt.serving.requests import Finish, OnEvent, Request, Token
from softprompt.serving.text import TextStream

PREFILL = 512  # padded input tokens that are run between two steps; at least one input is run


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the engine, with its task as it was when the request came.

    Attributes:
        stream: gives its tokens their texts.
        pool_slot: of its row; None while it waits.
        made: how many tokens it has generated.
        cancelled: its caller wants no more events.
        finished: its `Finish` was sent.
    """

    request: Request
    on_event: OnEvent
    task: LoadedTask
    stream: TextStream
    pool_slot: PoolSlot | None = None
    made: int = 0
    cancelled: bool = False
    finished: bool = False

    def emit(self, event: Token | Finish) -> None:
        """Calls `on_event`; an error that it raises cancels the request."""
        try:
            self.on_event(event)
        except Exception:
            self.cancelled = True


class Batcher:
    """The pools of all kinds, and the requests whose rows are in them.

    One thread calls `join`, `step` and `finish`.

    Attributes:
        running: the requests with rows.
        counts: of tokens, steps and requests so far.
    """

    def __init__(self, bank: Bank, sizes: Sizes) -> None:
        self._bank, self._sizes = bank, sizes
        self._eos = bank.loaded.tokenizer.eos_id
        self._kinds: dict[Kind, KindPools] = {}
        self._lock = threading.Lock()
        self.running: list[Ticket] = []
        self.counts: Counter[str] = Counter(tokens=0, steps=0, requests=0)

    def pools(self, task: LoadedTask) -> KindPools:
        """The pools of a task's kind, compiled for the kind's first task."""
        if task.kind not in self._kinds:  # rows of other kinds do not wait for the compiler
            with self._lock:
                if task.kind not in self._kinds:
                    bank, lane = self._bank, self._bank.lane(task)
                    made = KindPools(bank.model, bank.loaded.weights, lane, self._sizes)
                    # A new dict, because other threads may read the old one.
                    self._kinds = {**self._kinds, task.kind: made}
        return self._kinds[task.kind]

    def join(self, waiting: Sequence[Ticket]) -> list[Ticket]:
        """Runs the inputs of requests, oldest first, within the budget; returns the others."""
        budget, left, batches = PREFILL, list[Ticket](), dict[object, list[Ticket]]()
        demand = Counter(ticket.task.info.digest for ticket in waiting)
        taking = {kind: made.open_pools(len(waiting)) for kind, made in self._kinds.items()}
        for ticket in waiting:
            size = padded(len(ticket.request.tokens))
            if ticket.cancelled:
                self.finish(ticket, "cancelled")
            elif size > budget and budget < PREFILL:
                left.append(ticket)
            elif not ticket.request.max_new:
                budget -= size
                self._echo(ticket)
                self.finish(ticket, "length")
            elif pool_slot := self._assign(ticket, demand, taking):
                ticket.pool_slot, budget = pool_slot, budget - size
                batches.setdefault((pool_slot.pool, size), []).append(ticket)
            else:
                left.append(ticket)
        for batch in batches.values():
            assert batch[0].pool_slot is not None
            together = batch[0].pool_slot.pool.grid.together
            for first in range(0, len(batch), together):
                self._prefill(batch[first : first + together])
        return left

    def step(self) -> None:
        """Frees the rows of cancelled requests, and runs a token of every other row."""
        for ticket in [one for one in self.running if one.cancelled]:
            self.finish(ticket, "cancelled")
        for kind in self._kinds.values():
            for pool in kind.pools:
                if not pool.running:
                    continue
                choice = pool.step()
                self.counts["steps"] += 1
                for ticket in [
                    one for one in self.running if one.pool_slot and one.pool_slot.pool is pool
                ]:
                    assert ticket.pool_slot is not None
                    self._take(ticket, Choice(*(field[ticket.pool_slot.slot] for field in choice)))

    def finish(self, ticket: Ticket, reason: str, error: str = "") -> None:
        """Frees a request's row, and reports its end, once."""
        if ticket.finished:
            return
        ticket.finished = True
        if ticket.pool_slot is not None:
            ticket.pool_slot.pool.leave(ticket.pool_slot.slot)
            ticket.pool_slot = None
            self.running = [one for one in self.running if one is not ticket]
        self.counts["requests"] += 1
        ticket.emit(Finish(reason, len(ticket.request.tokens), ticket.made, error))

    def _assign(
        self, ticket: Ticket, demand: Counter[str], taking: Mapping[Kind, set[int]]
    ) -> PoolSlot | None:
        task, digest = ticket.task, ticket.task.info.digest
        lane, open_ = functools.partial(self._bank.lane, task), taking.get(task.kind, set())
        return self.pools(task).assign(digest, demand[digest], lane, open_)

    def _prefill(self, batch: Sequence[Ticket]) -> None:
        """Runs the inputs of requests in one program."""
        rows = []
        for ticket in batch:
            assert ticket.pool_slot is not None
            request = ticket.request
            draw = Draw(request.temperature, request.top_k, request.top_p, request.seed)
            rows.append(
                Joining(ticket.pool_slot.slot, request.tokens, draw, bool(request.logprobs))
            )
        assert batch[0].pool_slot is not None
        self.running = [*self.running, *batch]
        for ticket, choice in zip(batch, batch[0].pool_slot.pool.join(rows), strict=True):
            if ticket.request.echo:
                self._echo(ticket)
            self._take(ticket, choice)

    def _take(self, ticket: Ticket, choice: Choice) -> None:
        """Reports a row's next token, and ends the request where it ends."""
        if not math.isfinite(choice.logprobs):
            error = f"task {ticket.request.task!r} gives probabilities that are not finite"
            self.finish(ticket, "error", error)
            return
        if int(choice.ids) == self._eos:
            for event in ticket.stream.flush():
                ticket.emit(event)
            self.finish(ticket, "stop")
            return
        ticket.made += 1
        self.counts["tokens"] += 1
        ended = ticket.made == ticket.request.max_new
        events = ticket.stream.push(_token(choice, ticket.request))
        stopped = ticket.stream.stopped
        if ended and not stopped:
            events += ticket.stream.flush()
        for event in events:
            ticket.emit(event)
        if stopped or ended:
            self.finish(ticket, "stop" if stopped else "length")

    def _echo(self, ticket: Ticket) -> None:
        """Reports the input's tokens, with their log-probabilities if the request wants them."""
        request, stream = ticket.request, TextStream(self._bank.loaded.tokenizer)
        tokens = [Token(id_, "", math.nan) for id_ in request.tokens]
        if request.logprobs is not None and len(tokens) > 1:
            scores = self.pools(ticket.task).scores
            assert scores is not None, "an engine with these sizes scores no texts"
            scored = scores(self._bank.lane(ticket.task), request.tokens)
            each = (Choice(*(field[n] for field in scored)) for n in range(len(tokens) - 1))
            tokens[1:] = [_token(choice, request) for choice in each]
        for token in tokens:
            for event in stream.push(token):
                ticket.emit(event)
        for event in stream.flush():
            ticket.emit(event)


def _token(choice: Choice, request: Request) -> Token:
    """A token as an event, without its text."""
    ids, logprobs = (field[: request.logprobs or 0] for field in choice[2:])
    top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return Token(int(choice.ids), "", float(choice.logprobs), top)
