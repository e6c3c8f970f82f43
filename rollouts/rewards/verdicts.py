"""Verdicts: what a rollout will earn, known before it ends, so that it need not be finished.

A reward declares them with a method or a function attribute beside itself:

    decided(prompt, completion_so_far, **columns) -> float | None

It returns the number that the reward gives to *every* completion that begins with
`completion_so_far`, or None while that is open. `prompt` is what the reward gets (text, or messages).
`completion_so_far` is text, for conversations too, and begins with the rollout's start where there is
one (`Prompt.start_ids`). Columns of the data set, and `completion_ids` (the tokens so far), go to the
parameters of these names. A verdict is no guess: reward, posterior and advantage of a rollout that is
ended are what they would have been, so nothing is reweighted.

A rollout ends when every reward with a weight has decided. A reward without `decided` leaves all
rollouts open; so does one that does not apply to the prompt. Axes: N rollouts, K rows.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollouts.engines.contract import asked_at
from rollouts.prompts import Prompt
from rollouts.rewards.calls import (
    RewardError,
    is_async,
    numbers_of,
    outcome_of,
    reason_of,
    start_of,
)
from rollouts.rewards.contract import (
    RESERVED_COLUMNS,
    RewardFunction,
    RewardResult,
    name_of,
    nearest,
    own_copy,
    score,
)
from rollouts.rewards.watchdog import Overdue

Decided = Callable[..., float | None]
"""`decided(prompt, completion_so_far, **columns)`: the final reward, or None while that is open."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not one yet."""


def decided_of(function: RewardFunction) -> Decided | None:
    """How a reward decides before the end; None if it does not.

    A `functools.partial` has a `decided` of its own or none: that of the function inside knows nothing
    of the arguments that were bound.
    """
    return getattr(function, "decided", None)


def undecided(functions: Sequence[RewardFunction], weights: Sequence[float] | None) -> list[str]:
    """Names of the rewards with a weight that cannot decide before the end."""
    return [
        name_of(function)
        for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True)
        if weight != 0 and decided_of(function) is None
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opinion:
    """What one reward says of one unfinished completion."""

    value: float | None = None
    failure: str = ""
    error: BaseException | None = None


@dataclass(slots=True)
class _Asking:
    """How far one call has come; a thread that was abandoned must not go on."""

    found: list[list[_Opinion]] = field(default_factory=list)
    place: int = 0
    is_given_up: bool = False


MOST_OVERDUE = 3
"""Rows of one question that may take `timeout` seconds before the others fail (project default)."""


class Verdicts:
    """Asks rewards whether rollouts are decided, and rewards those that were ended.

    A reward that raises, takes too long, or returns NaN or infinity for an unfinished completion ends
    the rollout, which then counts as failed, as one whose finished reward cannot be had.

    Args:
        functions: the reward functions; all with a weight have `decided`.
        decode: texts of lists of token ids, as the rewards get them.
        weights: one per function. A function of weight 0 without `decided` says nothing of a rollout
            that was ended: it is only reported, over the others.
        timeout: seconds that one question, about however many rollouts, may take, or None.
        columns: names of the data set's columns, if the functions' parameters are to be checked.

    Raises:
        RewardError: if a `decided` is no ordinary function of these arguments, or a reward with a
            weight has none.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        decode: Callable[[list[list[int]]], list[str]],
        *,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        if missing := undecided(functions, weights):
            raise RewardError(f"reward {missing[0]} has no `decided`, so it ends no rollout")
        self._names = [name_of(function) for function in functions]
        self._decided = [decided_of(function) for function in functions]
        self._functions, self._decode, self._timeout = list(functions), decode, timeout
        self._weights = list(weights or [1.0] * len(functions))
        self._takes = [_parameters(decided) for decided in self._decided]
        # Engines may ask from several threads; rewards need not know that.
        self._lock = threading.Lock()
        for name, decided in zip(self._names, self._decided, strict=True):
            _check_decided(name, decided, columns)

    def over(self, prompts: Sequence[Prompt], ids_N: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each rollout may end: `SamplingParams.over`, for engines.

        Args:
            prompts: N, the prompt of each rollout.
            ids_N: N, the completion so far of each, its start included.
        """
        rows = list(zip(prompts, self._texts(ids_N), ids_N, strict=True))
        return [self._is_over(of_row) for of_row in self._opinions(rows, until_open=True)]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        ids_N: Sequence[Sequence[int]],
        decided_N: Tensor | None,
        *,
        max_failed_share: float = 0.0,
        **settings: Any,
    ) -> RewardResult:
        """`rollouts.rewards.contract.score`, where rows that a verdict ended get their verdict.

        No function is called for such a row: its text is shorter than what the verdict is about.

        Args:
            prompts, completions, ids_N: as for `score`.
            decided_N: (N,) bool, rows that were ended; None: no row was.
            max_failed_share: of all rows.
            settings: further arguments of `score`.
        """
        over = [] if decided_N is None else decided_N.nonzero().flatten().tolist()
        ids_K = [ids_N[row] for row in over]
        rows = zip([prompts[row] for row in over], self._texts(ids_K), ids_K, strict=True)
        opinions = dict(zip(over, self._opinions(list(rows)), strict=True))
        failed = {
            row: reason
            for row, of_row in opinions.items()
            if (reason := self._failure(prompts[row], of_row))
        }
        allowed = max_failed_share * len(prompts)
        if len(failed) > allowed + 1e-9:
            row = min(failed)
            raise RewardError(
                f"at least {len(failed)} of {len(prompts)} rewards failed, more than "
                f"max_failed_share={max_failed_share:g} allows. The first: prompt "
                f"{prompts[row].key}, reward function {failed[row]}; the completion so far begins "
                f"{start_of(completions[row])}"
            ) from next((o.error for o in opinions[row] if o.error is not None), None)
        rest = [row for row in range(len(prompts)) if row not in opinions]
        result = score(
            self._functions,
            [prompts[row] for row in rest],
            [completions[row] for row in rest],
            [ids_N[row] for row in rest],
            weights=self._weights,
            max_failed_share=min(max(allowed - len(failed), 0.0) / max(len(rest), 1), 1.0),
            **settings,
        )
        return self._merged(result, rest, opinions, failed) if over else result

    def check(
        self,
        prompts: Sequence[Prompt],
        ids_N: Sequence[Sequence[int]],
        result: RewardResult,
        *,
        every: int,
    ) -> None:
        """Compare verdicts with the rewards of finished rollouts, wherever an engine would have asked.

        Args:
            prompts: N, the prompt of each rollout.
            ids_N: N whole completions, starts included.
            result: their rewards. Rows that failed are left out.
            every: `SamplingParams.verdict_every`.

        Raises:
            RewardError: naming the reward, the prompt, the cut and both values, if they differ.
        """
        for row, (prompt, ids) in enumerate(zip(prompts, ids_N, strict=True)):
            if row in result.failed:
                continue
            finals = [result.per_function[name][row] for name in self._names]
            start = len(prompt.start_ids)
            cuts = [ids[: start + at] for at in asked_at(len(ids) - start, every)] + [ids]
            for text, name, said in self._contradictions(prompt, cuts, finals):
                raise RewardError(
                    f"the verdicts of reward {name} are wrong: for prompt {prompt.key}, after "
                    f"{len(text)} characters, {start_of(text[-80:])}, its `decided` {said}. Correct it "
                    "(check_verdicts tests it), or write verdict_every: 0"
                )

    def _contradictions(
        self, prompt: Prompt, cuts: Sequence[Sequence[int]], finals: Sequence[float | None]
    ) -> Iterator[tuple[str, str, str]]:
        """Text, name and words of each verdict at a cut that is not the finished reward."""
        texts = self._texts(cuts)
        rows = [(prompt, text, ids) for text, ids in zip(texts, cuts, strict=True)]
        for text, opinions in zip(texts, self._opinions(rows), strict=True):
            for name, opinion, final in zip(self._names, opinions, finals, strict=True):
                if said := _contradiction(opinion, final):
                    yield text, name, said

    def _texts(self, ids_N: Sequence[Sequence[int]]) -> list[str]:
        """Completions so far, without a character at the end that is not whole yet."""
        if not ids_N:
            return []
        with self._lock:
            return [text.rstrip(INCOMPLETE) for text in self._decode([list(i) for i in ids_N])]

    def _opinions(
        self, rows: Sequence[tuple[Prompt, str, Sequence[int]]], *, until_open: bool = False
    ) -> list[list[_Opinion]]:
        """Of each (prompt, text, ids) and function; with `until_open` none that cannot change `over`.

        All rows are asked about in one timed call, as a watch over each would cost more than most
        answers. The row at which the time runs out fails and the others are asked about in further
        calls; after `MOST_OVERDUE` such rows the rest fails too.
        """
        found: list[list[_Opinion]] = []
        num_overdue = 0
        with self._lock:
            while len(found) < len(rows):
                asking = _Asking()
                run = partial(self._ask, rows[len(found) :], asking, until_open=until_open)
                outcome = outcome_of(run, self._timeout, name="decided of the reward functions")
                asking.is_given_up = True
                found += list(asking.found)[: len(rows) - len(found)]
                if outcome is None or len(found) == len(rows):
                    continue
                if not isinstance(outcome, Overdue):
                    raise outcome
                num_overdue += 1
                found.append(self._failed(asking.place, f"took longer than {self._timeout:g} s"))
                if num_overdue == MOST_OVERDUE:
                    rest = f"was not reached: {num_overdue} rollouts took {self._timeout:g} s each"
                    found += [self._failed(0, rest)] * (len(rows) - len(found))
        return found

    def _ask(
        self,
        rows: Sequence[tuple[Prompt, str, Sequence[int]]],
        asking: _Asking,
        *,
        until_open: bool,
    ) -> None:
        """Add the opinions on one row after the other to `asking.found`."""
        functions = list(zip(self._weights, self._names, self._decided, self._takes, strict=True))
        for prompt, text, ids in rows:
            opinions: list[_Opinion] = []
            is_open = False
            for asking.place, (weight, name, decided, takes) in enumerate(functions):
                if decided is None or (until_open and (is_open or weight == 0)):
                    opinions.append(_Opinion())
                    continue
                given = _given(prompt, ids, takes)
                shown = own_copy(prompt.prompt, "prompt")
                opinions.append(_asked(name, decided, shown, text, given))
                is_open |= opinions[-1].value is None and not opinions[-1].failure
            if asking.is_given_up:
                return
            asking.found.append(opinions)

    def _failed(self, place: int, failure: str) -> list[_Opinion]:
        """Opinions of a row on which the function at `place` failed."""
        return [_Opinion(failure=failure if p == place else "") for p in range(len(self._names))]

    def _is_over(self, opinions: list[_Opinion]) -> bool:
        pairs = [(w, o) for w, o in zip(self._weights, opinions, strict=True) if w != 0]
        failed = any(opinion.failure for _, opinion in pairs)
        return failed or (bool(pairs) and all(opinion.value is not None for _, opinion in pairs))

    def _failure(self, prompt: Prompt, opinions: list[_Opinion]) -> str:
        """Why a row that was ended has no reward; empty if it has one."""
        for name, weight, opinion in zip(self._names, self._weights, opinions, strict=True):
            if opinion.failure:
                return f"{name}: decided {opinion.failure}"
            if weight != 0 and opinion.value is None:
                return f"{name}: decided gave a number while the rollout was made, and None after"
        total = self._total(opinions)
        return "" if math.isfinite(total) else f"{'/'.join(self._names)}: the sum is too large"

    def _total(self, opinions: list[_Opinion]) -> float:
        """The reward: the weighted sum, rounded as `score` rounds it."""
        pairs = zip(self._weights, opinions, strict=True)
        try:
            return math.fsum(w * o.value for w, o in pairs if w != 0 and o.value is not None)
        except (OverflowError, ValueError):
            return math.inf

    def _merged(
        self,
        result: RewardResult,
        rest: list[int],
        opinions: Mapping[int, list[_Opinion]],
        failed: dict[int, str],
    ) -> RewardResult:
        """The result of the rows that were finished, and the verdicts on the others."""
        num = len(rest) + len(opinions)
        reward_N = torch.zeros(num, dtype=torch.float64)
        scored_N = torch.zeros(num, dtype=torch.bool)
        reward_N[rest], scored_N[rest] = result.reward_N, result.scored
        for row, of_row in opinions.items():
            if row not in failed:
                reward_N[row], scored_N[row] = self._total(of_row), True

        def whole(values: list[Any]) -> list[Any]:
            column: list[Any] = [None] * num
            for row, value in zip(rest, values, strict=True):
                column[row] = value
            return column

        per_function = {name: whole(values) for name, values in result.per_function.items()}
        for place, name in enumerate(self._names):
            for row, of_row in opinions.items():
                per_function[name][row] = None if row in failed else of_row[place].value
        failures = failed | {rest[row]: reason for row, reason in result.failed.items()}
        return replace(
            result,
            reward_N=reward_N,
            scored=scored_N,
            per_function=per_function,
            failed=dict(sorted(failures.items())),
            unrewarded=[rest[row] for row in result.unrewarded],
            columns={name: whole(values) for name, values in result.columns.items()},
        )


def check_verdicts(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    tokenizer: Any = None,
    **columns: Sequence[Any],
) -> None:
    """Test that a reward's verdicts equal its rewards, at every cut of finished completions.

    Take completions that a policy wrote, right and wrong ones. A verdict must be the reward of the whole
    completion, wherever it is given; None is always right.

    Example::

        check_verdicts(ends_with_answer, ["2+3="] * 2, ["5", "6 or 7"], answer=["5", "5"])

    Args:
        reward: a reward function with `decided`.
        prompts: N texts or lists of messages, or N `Prompt`s, whose columns are then used.
        completions: N texts.
        tokenizer: cuts after each of its tokens. None: after each character, which is stricter; a
            reward that reads `completion_ids` needs it.
        columns: columns of the data set, N values each.

    Raises:
        AssertionError: if a verdict differs from the reward, or raises, naming prompt, cut and values.
        RewardError: if the reward itself fails, or has no `decided`.
    """
    given = [
        prompt
        if isinstance(prompt, Prompt)
        else Prompt(
            key=start_of(prompt),
            prompt=prompt,
            token_ids=(0,),
            columns={name: values[row] for name, values in columns.items()},
        )
        for row, prompt in enumerate(prompts)
    ]
    if tokenizer is None:
        ids_N, decode = [list(map(ord, text)) for text in completions], _characters
        if "completion_ids" in (_parameters(decided_of(reward)) or ()):
            raise RewardError(
                f"the verdicts of reward {name_of(reward)} read completion_ids: give check_verdicts "
                "the tokenizer"
            )
    else:
        ids_N = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in completions]

        def decode(ids: list[list[int]]) -> list[str]:
            return tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    names = sorted({name for prompt in given for name in prompt.columns})
    verdicts = Verdicts([reward], decode, columns=names)
    result = score([reward], given, completions, ids_N)
    (values,) = result.per_function.values()
    for row, ids in enumerate(ids_N):
        cuts = [ids[:end] for end in range(len(ids) + 1)]
        for text, name, said in verdicts._contradictions(given[row], cuts, [values[row]]):
            raise AssertionError(
                f"for prompt {given[row].key} and the completion {start_of(completions[row])}, "
                f"`decided` of reward {name} {said}, after {start_of(text)}"
            )


def _characters(ids: list[list[int]]) -> list[str]:
    return ["".join(map(chr, row)) for row in ids]


def _contradiction(opinion: _Opinion, final: float | None) -> str:
    """How an opinion differs from the reward of the whole completion; empty if it does not."""
    if opinion.failure:
        return opinion.failure
    if opinion.value is None:
        return ""
    if final is None:
        return (
            f"gave {opinion.value:g}, but the reward does not apply to the finished rollout (None)"
        )
    if math.isclose(opinion.value, final, rel_tol=1e-9, abs_tol=1e-12):
        return ""
    return f"gave {opinion.value:g}, but the finished rollout gets {final:g}"


def _asked(name: str, decided: Decided, prompt: Any, text: str, given: dict[str, Any]) -> _Opinion:
    """What `decided` says, or what went wrong with it."""
    try:
        value = decided(prompt, text, **given)
    except (Exception, SystemExit) as error:
        return _Opinion(failure=reason_of(error), error=error)
    (number,), failed = numbers_of([value], f"{name}.decided", [0])
    return _Opinion(value=number, failure=failed.get(0, ""))


def _given(prompt: Prompt, ids: Sequence[int], takes: frozenset[str] | None) -> dict[str, Any]:
    """Columns, and the tokens so far, for the parameters of these names; None: all of them."""
    names = {name for name in prompt.columns if name not in RESERVED_COLUMNS}
    names = names if takes is None else names & takes
    given = {name: own_copy(prompt.columns[name], name) for name in sorted(names)}
    if takes is None or "completion_ids" in takes:
        given["completion_ids"] = list(ids)
    return given


def _parameters(decided: Decided | None) -> frozenset[str] | None:
    """Names of the parameters after the first two; None: `decided` takes any."""
    if decided is None:
        return frozenset()
    parameters = list(inspect.signature(decided).parameters.values())
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters[2:])


def _check_decided(name: str, decided: Decided | None, columns: Sequence[str] | None) -> None:
    if decided is None:
        return
    if not callable(decided) or is_async(decided):
        raise RewardError(
            f"`decided` of reward {name} must be an ordinary function of (prompt, completion_so_far), "
            f"got {start_of(decided)}"
        )
    if columns is None:
        return
    takes = _parameters(decided)
    known = {*columns, "completion_ids"} - ({*RESERVED_COLUMNS} - {"completion_ids"})
    given = known if takes is None else known & takes
    try:
        inspect.signature(decided).bind("", "", **dict.fromkeys(given))
    except TypeError as error:
        missing = sorted((takes or frozenset()) - known)
        hint = f"; there is no column {missing[0]!r}{nearest(missing[0], known)}" if missing else ""
        raise RewardError(
            f"`decided` of reward {name} must take (prompt, completion_so_far) and may take columns of "
            f"the data set by name ({error}){hint}"
        ) from error
