"""Several engines as one: who samples what, who has which weights, and what happens when one dies.

What an engine sends while it is stale (engine_states.py) is held back until it is alive, and thrown away if it dies
before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from gspo_megatron.base.errors import EngineError, EnginesDown, EnginesStale, WrongWeights, plural
from gspo_megatron.rollout.engine import Engine, PauseMode, Piece, Request, Weights
from gspo_megatron.rollout.engine_states import Member
from gspo_megatron.rollout.fan_out import fan_out
from gspo_megatron.rollout.flights import OF_THE_RUN, Flight, Heard, closed_at_end, reason_of

TURN_S = 0.1
"""How soon a stop is noticed while no engine sends anything."""


class EnginePool:
    """Engines with the same weights.

    Attributes:
        version: of the weights that the engines have; -1 before the first `update`.
        ended: responses, so far.
        deaths: of engines, so far.
        continued: requests that were cut by a death so far, and continued on another engine.

    Args:
        probe: compares the log-probs of an engine with the trainer's; says what is wrong with them, if anything.
        start: starts an engine again; returns when it answers. None: what is dead stays dead.
        send: gives new weights to all of these paused engines at once; reads the tensors once. None: through
            `Engine.load`, each in a thread of its own.
        load: gives a paused engine the current weights. It is called for an engine that was started again, at any time,
            in a thread. None: such an engine stays stale until the next `update`.
        most_starts: how often one engine is started again before it has taken FORGIVEN updates of weights.
        most_in_flight: requests that one engine has at once, unless a single group is larger.
        returns: what brings an engine back that has died, as the user reads it.
        say: called with a line for the user, from any thread.

    Raises, all methods but `close`:
        EnginesDown: no engine is alive, and none is returning; EnginesStale where some wait for weights.
        Refused: an engine refuses what it was asked.
        CannotSend: the trainer's side of `send` has failed.
        WrongWeights: an engine has other log-probs than the trainer.
    """

    def __init__(
        self,
        engines: Seq[Engine],
        *,
        probe: Callable[[Engine], str],
        start: Callable[[Engine], None] | None = None,
        send: Callable[[Seq[Engine], Weights], None] | None = None,
        load: Callable[[Engine], None] | None = None,
        most_starts: int = 3,
        most_in_flight: int = 256,
        returns: str = "it is started again",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.members = [Member(engine) for engine in engines]
        self.version, self.ended, self.deaths, self.continued = -1, 0, 0, 0
        self._start, self._send, self._load, self._probe, self._say = start, send, load, probe, say
        self._most_starts, self._most_in_flight, self._returns = most_starts, most_in_flight, returns
        self._changed = threading.Condition()
        """Of everything here that threads share."""
        self._waiting: deque[Flight] = deque()
        self._flights: set[Flight] = set()
        self._fault: WrongWeights | None = None
        self._closed = False
        self._weights_change = threading.Lock()
        """Held while engines take weights."""
        self._update, self._taking, self._given = ExitStack(), list[Member](), False
        """Of the update: what is left to do, the engines that stood still, and whether they were given everything."""

    # ------------------------------------------------------------------------------------------------- data plane

    def generate(self, groups: Seq[Seq[Request]], stop: Callable[[], bool] = lambda: False) -> Iterator[Piece]:
        """Pieces of the requests of all groups, as they are sampled; each request ends with one whose `finish` is
        `stop` or `length`. One engine samples a group. Closing the iterator ends all requests, and so does `stop`, at
        which it looks also while nothing comes."""
        heard: SimpleQueue[Heard] = SimpleQueue()
        flights = [self.submit(group, heard) for group in groups]
        under_way = len(flights)
        try:
            while under_way and not stop():
                try:
                    _, piece = heard.get(timeout=TURN_S)
                except Empty:
                    continue
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    under_way -= 1
                else:
                    yield piece
        finally:
            for flight in flights:
                self.cancel(flight)

    def submit(self, requests: Seq[Request], heard: SimpleQueue[Heard]) -> Flight:
        """Begins to sample a group; the oldest that waits gets the next free engine. `heard`: see `Flight`."""
        flight = Flight(requests, heard)
        with self._changed:
            self._flights.add(flight)
            self._waiting.append(flight)
        threading.Thread(target=self._fly, args=(flight,), name="rollouts", daemon=True).start()
        return flight

    def cancel(self, flight: Flight) -> None:
        """Ends a flight after its next piece, without a further word."""
        with self._changed:
            flight.cancelled = True
            self._changed.notify_all()

    def _fly(self, flight: Flight) -> None:
        known_from = self.version
        try:
            while flight.going_on:
                seat = self._seat(flight)
                if seat is None:
                    return
                self._sample(flight, *seat, known_from)
            flight.heard.put((flight, None))
        except BaseException as error:
            flight.heard.put((flight, error))
        finally:
            with self._changed:
                self._flights.discard(flight)
                if flight in self._waiting:
                    self._waiting.remove(flight)
                self._changed.notify_all()

    def _seat(self, flight: Flight) -> tuple[Member, int] | None:
        """The engine with the fewest requests, once it has room, and which life it is in; None if nobody wants the
        flight any more."""
        count = len(flight.going_on)
        with self._changed:
            while True:
                if flight.cancelled:
                    return None
                self._check()
                alive = [member for member in self.members if member.state == "alive"]
                best = min(alive, key=lambda member: member.in_flight, default=None)
                room = best is not None and best.in_flight + count <= max(self._most_in_flight, count)
                if best is not None and room and self._waiting[0] is flight:
                    self._waiting.popleft()
                    best.in_flight += count
                    self._changed.notify_all()
                    return best, best.lives
                self._changed.wait()

    def _check(self) -> None:
        if self._fault:
            raise self._fault
        if not any(member.state == "alive" or member.returning for member in self.members):
            # While weights change, engines are stale for a moment.
            if self._weights_change.locked() and any(member.answers for member in self.members):
                return
            down = EnginesStale if any(member.answers for member in self.members) else EnginesDown
            error = down(f"no engine is left to sample with: {self._states()}")
            if isinstance(error, EnginesStale):
                error.ended = self.ended
            raise error

    def _sample(self, flight: Flight, member: Member, life: int, known_from: int) -> None:
        """One engine's turn: until every response has ended or was aborted, or the engine is dead."""
        requests = flight.going_on
        open_ = {request.id for request in requests}
        try:
            with closed_at_end(member.engine.generate(requests)) as stream:
                for piece in stream:
                    if not self._is_proven(member, life, flight):
                        return
                    if piece.id not in open_:
                        raise EngineError(f"answered request {piece.id}, which it was not asked, or which had ended")
                    answer = flight.answers[piece.id]
                    piece = answer.dated(piece, self.version)
                    answer.add(piece, range(known_from, self.version + 1))
                    if piece.tokens or answer.finish:
                        # An aborted request is continued: for whoever asked it has not ended.
                        flight.heard.put((flight, replace(piece, finish=answer.finish)))
                    with self._changed:
                        self.ended += bool(answer.finish)
                    if piece.finish:
                        open_.discard(piece.id)
                        self._leave(member, 1)
            if open_:
                raise EngineError(f"ended its answer before {plural(len(open_), 'request')} had ended")
        except OF_THE_RUN:
            raise
        except EngineError as error:
            self._died(member, life, str(error))
            self._continue(flight)
        finally:
            self._leave(member, len(open_))
            with self._changed:
                # Before those that have not begun.
                self._waiting.appendleft(flight)

    def _is_proven(self, member: Member, life: int, flight: Flight) -> bool:
        """Whether what the engine has sent can be used; waits while it is stale."""
        with self._changed:
            self._changed.wait_for(
                lambda: member.state != "stale" or member.lives != life or flight.cancelled or self._fault is not None
            )
            return member.state == "alive" and member.lives == life and not flight.cancelled

    def _leave(self, member: Member, count: int) -> None:
        with self._changed:
            member.in_flight -= count
            self._changed.notify_all()

    def _continue(self, flight: Flight) -> None:
        """After a death: responses whose last token arrived, without the word that they have ended, have ended."""
        for answer in [answer for answer in flight.answers.values() if not answer.finish]:
            answer.close_if_whole()
            if answer.finish:
                flight.heard.put((flight, Piece(answer.request.id, (), (), (), answer.finish)))
            else:
                self.continued += 1

    # ---------------------------------------------------------------------------------------------- control plane

    def update(self, weights: Weights, mode: PauseMode = "keep") -> None:
        """Gives all engines new weights; they are paused meanwhile. What is sampled under way goes on with the new
        weights (`keep`, `abort`), or ends before (`wait`). Reads the tensors to the end in any case.

        In three parts, of which the ranks of a trainer work together in the second only, to make the tensors."""
        self.begin_update(mode)
        try:
            self.give(weights)
        finally:
            self.end_update()

    def begin_update(self, mode: PauseMode) -> None:
        """Engines stand still until `end_update`, which must be called."""
        self._given = False
        with ExitStack() as steps:
            steps.enter_context(self._weights_change)
            steps.callback(self._prove_given)
            self._taking = steps.enter_context(self._paused(self.members, mode))
            self._update = steps.pop_all()

    def end_update(self) -> None:
        """They go on, and prove that they have the weights."""
        self._update.close()
        if self._given:
            with self._changed:
                self._check()

    def _prove_given(self) -> None:
        if self._given:
            self._each(self._taking, self._prove)
            with self._changed:
                self._changed.notify_all()

    def give(self, weights: Weights) -> None:
        """Between the two: the weights, whose tensors are read to the end in any case."""
        members = self._taking
        with self._changed:
            self.version = weights.version
            for member in members:
                if member.state == "alive":
                    member.to("stale")
        if self._send is None:
            fan_out(weights, [self._guarded(member, member.engine.load) for member in members])
            self._given = True
            return
        lives = [member.lives for member in members]
        try:
            self._send([member.engine for member in members], weights)
        except OF_THE_RUN:
            raise
        except EngineError as error:
            # Nobody knows who has what.
            for member, life in zip(members, lives, strict=True):
                self._died(member, life, str(error))
        finally:
            for _ in weights.tensors:
                pass
        self._given = True

    @contextmanager
    def paused(self, mode: PauseMode) -> Iterator[list[Member]]:
        """All engines that answer stand still; they go on at the end, also after an error."""
        with self._weights_change, self._paused(self.members, mode) as members:
            yield members

    @contextmanager
    def _paused(self, members: Seq[Member], mode: PauseMode) -> Iterator[list[Member]]:
        chosen = [member for member in members if member.answers]
        try:
            self._each(chosen, lambda member: member.engine.pause(mode))
            yield [member for member in chosen if member.answers]
        finally:
            # Every one of them: the answer to `pause` may have been lost on its way.
            self._each(chosen, lambda member: member.engine.resume())

    def _prove(self, member: Member) -> None:
        """stale -> alive.

        Raises:
            EngineError: it has not taken the weights.
        """
        if (version := member.engine.version()) != self.version:
            raise EngineError(f"has weights of version {version} after those of version {self.version} were loaded")
        complaint = self._probe(member.engine)
        with self._changed:
            if complaint:
                self._fault = WrongWeights(
                    f"{member.engine.name}, after weights of version {self.version} were loaded: {complaint}"
                )
            elif member.state == "stale":
                member.to("alive")
                member.has_taken_weights()
            self._changed.notify_all()

    def _each(self, members: Seq[Member], call: Callable[[Member], None]) -> None:
        """Calls it for each that answers, at the same time. One that fails is dead."""
        chosen = [member for member in members if member.answers]
        with ThreadPoolExecutor(max(1, len(chosen)), "engines") as threads:
            list(threads.map(lambda member: self._guarded(member, call)(member), chosen))

    def _guarded(self, member: Member, call: Callable[[Any], None]) -> Callable[[Any], None]:
        """The call, after which the engine is dead if it failed by itself."""
        life = member.lives

        def guarded(argument: Any) -> None:
            try:
                call(argument)
            except OF_THE_RUN:
                raise
            except EngineError as error:
                self._died(member, life, str(error))

        return guarded

    # ----------------------------------------------------------------------------------------------------- deaths

    def _died(self, member: Member, life: int, why: str) -> None:
        with self._changed:
            if member.lives != life or not member.answers or self._closed:
                return
            member.to("dead")
            member.why, self.deaths = why, self.deaths + 1
            owned, member.returning = member.returning, self._may_return(member)
            self._changed.notify_all()
        # What it samples for others would wait for its own time limits.
        member.engine.give_up()
        then = f"; {self._returns}" if member.returning else self._given_up(member)
        self._say(f"{member.engine.name} is dead: {why}{then}")
        if member.returning and not owned:
            threading.Thread(target=self._bring_back, args=(member,), name="engine", daemon=True).start()

    def _given_up(self, member: Member) -> str:
        return f", and given up (engine.most_starts={self._most_starts})" if self._start and member.starts else ""

    def _may_return(self, member: Member) -> bool:
        return self._start is not None and member.starts < self._most_starts and not self._closed

    def _bring_back(self, member: Member) -> None:
        """dead -> restarting -> stale -> alive, in a thread of its own. Whatever goes wrong there, nobody else hears
        of it: the engine is dead again, and the run goes on or is told."""
        start = self._start
        assert start is not None
        while True:
            with self._changed:
                if member.state != "dead" or not self._may_return(member):
                    member.returning = False
                    self._changed.notify_all()
                    break
                member.begin_life()
            try:
                start(member.engine)
            except Exception as error:
                with self._changed:
                    member.to("dead")
                    member.why = reason_of(error)
                continue
            try:
                self._bring_up_to_date(member)
            except Exception as error:
                self._died(member, member.lives, reason_of(error))
        if self._closed:
            return
        then = {
            "alive": "samples again",
            "stale": "answers again, and gets weights with the next update",
        }
        self._say(f"{member.engine.name} {then.get(member.state, f'stays dead: {member.why}')}")

    def _bring_up_to_date(self, member: Member) -> None:
        """restarting -> stale, and -> alive where it can be given the weights now."""
        with self._weights_change:
            with self._changed:
                member.to("stale")
            if load := self._load:
                with self._paused([member], "keep"):
                    self._each([member], lambda member: load(member.engine))
                self._each([member], self._prove)

    def _states(self) -> str:
        return "; ".join(
            f"{m.engine.name} is {m.state}" + (f" ({m.why})" if m.why and m.state != "alive" else "")
            for m in self.members
        )

    def close(self) -> None:
        """Ends everything under way."""
        with self._changed:
            self._closed = True
            for flight in self._flights:
                flight.cancelled = True
            self._changed.notify_all()
