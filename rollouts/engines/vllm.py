"""Generate with vLLM, through TRL: on a server, or beside the trainer on the same GPU.

A rollout is one request for one completion with a seed of its own, so budgets may be as uneven as they
like; vLLM's scheduler batches them, and its prefix cache (on by default) makes the prompt's prefill
be computed once. Starting vLLM and handing weights on are TRL's `VLLMGeneration`.
Axes: P prompts, N rollouts, T tokens.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from trl.generation import vllm_client, vllm_generation

from rollouts.batch import TokenRollouts
from rollouts.engines.contract import (
    SamplingParams,
    asked_at,
    end_of_sequence_ids,
    requested_rows,
    room_of,
)
from rollouts.engines.drawing import mix64
from rollouts.prompts import Prompt

LAUNCH = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)
"""How a server is started whose weights and log-probabilities are the ones needed."""

COLDEST = 0.01
"""vLLM raises a temperature below this, and above 0, to it."""

CLAMPED = -9999.0
"""A server writes this for log-probabilities that are lower, minus infinity included."""


@dataclass
class _Drawn:
    """A completion while it grows, piece by piece where verdicts are asked for between pieces."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    is_decided: bool = False


class VLLMEngine:
    """Generates with vLLM; trains nothing itself, so `load_weights` hands weights on.

    Prompt, seed, weights and `params` determine a rollout up to float error, which in vLLM depends on
    what is batched together: `check_engine` needs tolerances for it. A request has one seed, so each
    rollout is a request; and vLLM draws the noise of seeded requests one after the other, which costs
    a small kernel per rollout and token that unseeded ones would share.

    `logprob_NT` is what vLLM calls processed log-probabilities: at the sampling temperature, and
    *after* the repetition penalty, top_k, top_p and min_p, which renormalise. With one of them they
    are not what a trainer recomputes, so they are refused unless `filtered_logprobs` says that the
    trainer computes its own. Greedy decoding reports those at temperature 1.

    Every process generates its own share. In server mode each talks to the one server and the main
    process hands the weights on; colocated, each has a vLLM of its own on its GPU. Prefixes in vLLM's
    cache are marked by the weights they belong to (`cache_salt`), because clearing the cache, which
    TRL asks for, does nothing while a request still holds a part of it. So processes share none, but
    for those that share a vLLM (tensor parallelism): these generate the rows of all of them, and each
    keeps its own, so all of them call `generate`, also for no rows (`generates_together`).

    Where verdicts end rollouts (`SamplingParams.over`), a rollout is asked for in pieces, each a request
    that continues what was drawn, whose prefix vLLM has cached. vLLM begins the noise of every request
    anew, so each piece after the first has a seed made of the rollout's and its number: with verdicts,
    or at another `verdict_every`, other tokens are drawn than without, with the same probabilities.

    Args:
        generation: TRL's `VLLMGeneration`, in either mode. `vllm_engine` makes one.
        tokenizer: for end-of-sequence ids, and to find stop strings.
        concurrency: requests a process has open at a server at once. Fewer than the server's
            --max-num-seqs, over all processes, leave it idle.
        timeout: seconds a server may be silent on a request, which it is until the rollout ends,
            before TRL's client asks again, 5 times at most; None waits for ever.
        filtered_logprobs: accept top_k, top_p and min_p although log-probabilities come after them.

    Raises:
        ValueError: for settings that do not fit, or a server that reports other log-probabilities.
    """

    takes_starts = True
    takes_verdicts = True

    def __init__(
        self,
        generation: Any,
        tokenizer: Any,
        *,
        concurrency: int = 256,
        timeout: float | None = 3600.0,
        filtered_logprobs: bool = False,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        self.tokenizer = tokenizer
        self.filtered_logprobs = filtered_logprobs
        self._generation = generation
        self._concurrency = concurrency
        self._num_together = generation.tensor_parallel_size if generation.mode == "colocate" else 1
        self._salt = uuid.uuid4().hex
        self._asleep = generation.mode == "colocate" and generation.enable_sleep_mode
        if generation.mode == "server":
            self._client = _client_of(generation)
            session, url = self._client.session, self._client.base_url
            session.request = partial(session.request, timeout=timeout)
            # TRL's retries, with a connection for every open request.
            retries = session.get_adapter(url).max_retries
            session.mount(url, HTTPAdapter(max_retries=retries, pool_maxsize=concurrency))
            _require_processed(self._client)

    @property
    def generates_together(self) -> bool:
        """Whether a process without rows has to call `generate` all the same."""
        return self._num_together > 1

    def load_weights(self, model: Any) -> None:
        """Hand the weights of `model` on to vLLM, and forget prefixes computed with older ones.

        Every process enters: sharded weights are gathered by all, LoRA is merged on the way, and no
        process goes on before the server has them, nor are they sent while another still generates.
        A vLLM that rests is woken.
        """
        generation = self._generation
        generation.accelerator.wait_for_everyone()
        if model is not generation.model:
            generation._weight_metadata = None  # TRL notes names, types and shapes once
        generation.model = model
        generation.sync_weights()
        self._salt = uuid.uuid4().hex
        if self._asleep:
            generation.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        generation.accelerator.wait_for_everyone()

    def rest(self) -> None:
        """Give the GPU memory of weights and cache to the trainer, where sleep mode is on.

        The weights are gone: the next use begins with `load_weights`.
        """
        generation = self._generation
        if generation.mode == "colocate" and generation.enable_sleep_mode and not self._asleep:
            generation.llm.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        """Leave the server's weight-update group and its connections; nothing else is left to do."""
        if self._generation.mode == "server":
            self._client.close_communicator()
            self._client.session.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        budget_P: Any,
        *,
        seeds_N: Any,
        params: SamplingParams,
        version: int = 0,
    ) -> TokenRollouts:
        """`budget_P[p]` rollouts of prompt p; see `Engine.generate`.

        Raises:
            ValueError: if the request is malformed, or `params` ask for what vLLM does not do.
            RuntimeError: if vLLM rests, a server does not answer or answers something else than was
                asked; the prompt's key is named.
            FloatingPointError: if a log-probability is missing, infinite or above 0. NaN stays NaN.
        """
        prompt_N, seed_N = requested_rows(prompts, budget_P, seeds_N)
        self._refuse(params)
        if params.stop and any(prompt.start_ids for prompt in prompts):
            raise ValueError(
                f"vLLM looks for stop={list(params.stop)} in what it draws and not across the end of a "
                "start: use the transformers engine, or no stop strings"
            )
        room_P = room_of(prompts, params)
        if self._asleep:
            raise RuntimeError("vLLM rests and has no weights; call load_weights before generate")
        eos = end_of_sequence_ids(self._generation.model, self.tokenizer)
        rows = [prompts[p] for p in prompt_N.tolist()]
        settings = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "logprobs": 0,
        }
        more = {
            "stop": list(params.stop),
            "stop_token_ids": list(eos),
            "skip_special_tokens": False,  # stop strings may be special tokens
        }
        answer = self._from_server if self._generation.mode == "server" else self._from_colocated
        asks = bool(rows) or self.generates_together
        room_N = [room_P[p] for p in prompt_N.tolist()]
        pieces = _Pieces(self.tokenizer, params, eos)
        drawn = answer(rows, seed_N.tolist(), room_N, settings, more, pieces) if asks else []
        return self._batch(prompts, prompt_N, seed_N, drawn, eos, params, version, room_N)

    def _refuse(self, params: SamplingParams) -> None:
        if params.adaptive_temperature is not None:
            raise ValueError("adaptive_temperature needs the transformers engine, not vLLM")
        if params.record_entropy:
            raise ValueError(
                "record_entropy needs the transformers engine: vLLM gives no entropies"
            )
        if 0 < params.temperature < COLDEST:
            raise ValueError(
                f"vLLM raises temperature={params.temperature} to {COLDEST}; write 0, or {COLDEST} "
                "or more"
            )
        filtered = params.top_k or params.top_p < 1 or params.min_p
        if not self.filtered_logprobs and (filtered or params.repetition_penalty != 1):
            raise ValueError(
                f"vLLM's log-probabilities come after top_k={params.top_k}, top_p={params.top_p}, "
                f"min_p={params.min_p} and repetition_penalty={params.repetition_penalty}, so the "
                "trainer's ratio would start away from 1; turn the filters off, or let the trainer "
                "compute its own (old_logprobs: trainer)"
            )

    def _from_server(
        self,
        rows: list[Prompt],
        seeds: list[int],
        rooms: list[int],
        settings: dict,
        more: dict,
        pieces: _Pieces,
    ) -> list[_Drawn]:
        """Tokens and log-probabilities of each row, asked for one by one, many at a time."""

        def piece(row: int, ids: list[int], seed: int, size: int) -> dict:
            extra = more | {"seed": _usable(seed), "cache_salt": self._salt}
            try:
                answer = self._client.generate(
                    [ids], n=1, max_tokens=size, **settings, generation_kwargs=extra
                )
            except Exception as error:
                raise RuntimeError(
                    f"the vLLM server at {self._client.base_url} failed on prompt {rows[row].key}: "
                    f"{error}"
                ) from error
            if answer["prompt_ids"] != [ids] or len(answer["completion_ids"]) != 1:
                raise RuntimeError(
                    f"the vLLM server at {self._client.base_url} answered another prompt than "
                    f"{rows[row].key}, or {len(answer['completion_ids'])} completions instead of 1"
                )
            return answer

        def ask(row: int) -> _Drawn:
            drawn, prompt, number, goes_on = _Drawn(), rows[row], 0, True
            while goes_on:
                size = pieces.size(drawn, rooms[row])
                ids = [*prompt.token_ids, *drawn.ids]
                answer = piece(row, ids, _piece_seed(seeds[row], number), size)
                goes_on = pieces.add(drawn, *_sampled(answer, 0, prompt), size, rooms[row])
                goes_on = goes_on and not pieces.decide([drawn], [prompt])[0]
                number += 1
            return drawn

        with ThreadPoolExecutor(min(self._concurrency, len(rows))) as pool:
            return list(pool.map(ask, range(len(rows))))

    def _from_colocated(
        self,
        rows: list[Prompt],
        seeds: list[int],
        rooms: list[int],
        settings: dict,
        more: dict,
        pieces: _Pieces,
    ) -> list[_Drawn]:
        """The same from the vLLM of this process, or of its group, in one call for each piece.

        The processes of a group make the same calls: the last is that in which none has a row left.
        """
        drawn_N = [_Drawn() for _ in rows]
        running = list(range(len(rows)))
        number = 0
        while True:
            sizes = [pieces.size(drawn_N[row], rooms[row]) for row in running]
            mine = [
                (
                    [*rows[row].token_ids, *drawn_N[row].ids],
                    _usable(_piece_seed(seeds[row], number)),
                    size,
                )
                for row, size in zip(running, sizes, strict=True)
            ]
            asked, salt, first = self._of_group(mine)
            if not asked:
                return drawn_N
            answer = self._colocated_answer(asked, salt, settings, more, first, len(mine))
            left = []
            for place, (row, size) in enumerate(zip(running, sizes, strict=True)):
                found = _sampled(answer, place, rows[row])
                if pieces.add(drawn_N[row], *found, size, rooms[row]):
                    left.append(row)
            over = pieces.decide([drawn_N[row] for row in left], [rows[row] for row in left])
            running = [row for row, is_over in zip(left, over, strict=True) if not is_over]
            number += 1
            if pieces.over is None:
                return drawn_N

    def _colocated_answer(
        self,
        asked: list[tuple[list[int], int, int]],
        salt: str,
        settings: dict,
        more: dict,
        first: int,
        count: int,
    ) -> dict:
        """What vLLM draws for `count` of these requests, from the `first` on."""
        from vllm import SamplingParams as RequestParams

        outputs = self._generation.llm.generate(
            [{"prompt_token_ids": ids, "cache_salt": salt} for ids, _, _ in asked],
            sampling_params=[
                RequestParams(n=1, seed=seed, max_tokens=size, **settings, **more)
                for _, seed, size in asked
            ],
            use_tqdm=False,
        )
        if len(outputs) != len(asked):
            raise RuntimeError(f"vLLM was asked for {len(asked)} rollouts and gave {len(outputs)}")
        outputs = outputs[first : first + count]
        logprobs, ids = vllm_generation.extract_logprobs(outputs)
        return {
            "completion_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": logprobs,
            "logprob_token_ids": ids,
        }

    def _of_group(self, mine: list[tuple[list[int], int, int]]) -> tuple[list, str, int]:
        """Requests of all processes that share this vLLM, their salt, and where this one's begin."""
        if self._num_together == 1:
            return mine, self._salt, 0
        group = self._generation.tp_group
        given: list[Any] = [None] * self._num_together
        torch.distributed.all_gather_object(given, (mine, self._salt), group=group)
        before = given[: torch.distributed.get_rank(group=group)]
        asked = [request for requests, _ in given for request in requests]
        return asked, given[0][1], sum(len(requests) for requests, _ in before)

    def _batch(
        self,
        prompts: Sequence[Prompt],
        prompt_N: Tensor,
        seed_N: Tensor,
        drawn: list[_Drawn],
        eos: tuple[int, ...],
        params: SamplingParams,
        version: int,
        room_N: list[int],
    ) -> TokenRollouts:
        vocabulary = self._generation.model.config.get_text_config().vocab_size
        length_N = torch.tensor([len(one.ids) for one in drawn], dtype=torch.int64)
        longest = int(length_N.max()) if drawn else 0
        pad = self.tokenizer.pad_token_id
        token_NT = torch.full((len(drawn), longest), 0 if pad is None else pad, dtype=torch.int64)
        logprob_NT = torch.zeros(token_NT.shape)
        truncated_N = torch.zeros(len(drawn), dtype=torch.bool)
        for row, one in enumerate(drawn):
            ids, logprobs = one.ids, one.logprobs
            key, limit = prompts[int(prompt_N[row])].key, room_N[row]
            _check(ids, logprobs, key, limit=limit, vocabulary=vocabulary)
            token_NT[row, : len(ids)] = torch.tensor(ids)
            logprob_NT[row, : len(ids)] = torch.tensor(
                [math.nan if x is None else x for x in logprobs]
            )
            ended = one.is_decided or ids[-1] in eos or has_stop(self.tokenizer, ids, params)
            if len(ids) < limit and not ended:
                raise RuntimeError(
                    f"vLLM ended a completion of prompt {key} after {len(ids)} of {limit} tokens, at "
                    f"token {ids[-1]}, which is no end of sequence ({list(eos)}), and without a stop "
                    "string: raise --max-model-len (vllm_max_model_length, colocated), or give the "
                    "model's generation config the end-of-sequence ids that vLLM uses"
                )
            truncated_N[row] = not ended
        return TokenRollouts(
            prompt_N=prompt_N,
            mask_NT=torch.arange(longest) < length_N[:, None],
            logprob_NT=logprob_NT,
            version=version,
            token_NT=token_NT,
            truncated_N=truncated_N,
            seed_N=seed_N,
            prompt_ids=tuple(tuple(prompt.token_ids) for prompt in prompts),
            decided_N=None
            if params.over is None
            else torch.tensor([one.is_decided for one in drawn], dtype=torch.bool),
        )


def has_stop(tokenizer: Any, ids: list[int], params: SamplingParams) -> bool:
    """Whether the text of a completion has one of the stop strings."""
    if not params.stop:
        return False
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(s in text for s in params.stop)


class _Pieces:
    """Asks for completions piece by piece, for verdicts in between; in one piece without verdicts."""

    def __init__(self, tokenizer: Any, params: SamplingParams, eos: tuple[int, ...]) -> None:
        self.over = params.over
        self._tokenizer, self._params, self._eos = tokenizer, params, eos
        self._asked_at = asked_at(params.max_completion_length, params.verdict_every)

    def size(self, drawn: _Drawn, room: int) -> int:
        """Tokens of the next piece: to the next question, or to the end."""
        ends = [] if self.over is None else self._asked_at
        later = (end for end in ends if end > len(drawn.ids))
        return min(next(later, room), room) - len(drawn.ids)

    def add(
        self,
        drawn: _Drawn,
        ids: list[int],
        logprobs: list[float | None],
        size: int,
        room: int,
    ) -> bool:
        """Add a piece to `drawn`; whether the completion may go on after it.

        vLLM looks for stop strings in each piece. One that lies across two is found here, and what was
        drawn after it is cut off.
        """
        before = len(drawn.ids)
        drawn.ids += ids
        drawn.logprobs += logprobs
        if self.over is None or not ids:
            return False
        if has_stop(self._tokenizer, drawn.ids, self._params):
            end = before + 1
            while not has_stop(self._tokenizer, drawn.ids[:end], self._params):
                end += 1
            del drawn.ids[end:], drawn.logprobs[end:]
            return False
        return len(ids) == size and len(drawn.ids) < room and ids[-1] not in self._eos

    def decide(self, drawn: list[_Drawn], prompts: list[Prompt]) -> list[bool]:
        """Which of these completions a verdict ends; they are marked."""
        if self.over is None or not drawn:
            return [False] * len(drawn)
        ids = [[*p.start_ids, *one.ids] for p, one in zip(prompts, drawn, strict=True)]
        over = [bool(is_over) for is_over in self.over(prompts, ids)]
        for one, is_over in zip(drawn, over, strict=True):
            one.is_decided = is_over
        return over


def _piece_seed(seed: int, number: int) -> int:
    """The seed of one piece of a rollout: its own for the first, so that it is as one without pieces."""
    return seed if number == 0 else int(mix64(mix64(torch.tensor(seed)) + number))


def vllm_engine(
    model: Any,
    tokenizer: Any,
    accelerator: Any,
    *,
    mode: str,
    base_url: str = "http://localhost:8000",
    server_timeout: float = 240.0,
    group_port: int = 51216,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.3,
    max_model_length: int | None = None,
    enable_sleep_mode: bool = False,
    concurrency: int = 256,
    timeout: float | None = 3600.0,
    filtered_logprobs: bool = False,
) -> VLLMEngine:
    """A `VLLMEngine` on a vLLM that TRL starts ("colocate") or connects to ("server").

    Args:
        model: the model being trained; colocated, vLLM loads its folder or hub id first.
        tokenizer: its tokenizer.
        accelerator: of the processes.
        mode: "server" or "colocate".
        base_url: of the server.
        server_timeout: seconds to wait for the server to come up.
        group_port: free port of the machine that trains, over which weights go to a server.
        tensor_parallel_size: processes, and GPUs, that share one colocated vLLM; divides their number.
            A server is started with its own --tensor-parallel-size.
        gpu_memory_utilization: share of the GPU that a colocated vLLM takes.
        max_model_length: positions of a colocated vLLM. Default: the model's.
        enable_sleep_mode: a colocated vLLM gives its memory back while the trainer updates.
        concurrency, timeout, filtered_logprobs: see `VLLMEngine`.

    Raises:
        ImportError: if vLLM is not installed.
        ConnectionError: if no server answers in time.
    """
    if mode not in ("server", "colocate"):
        raise ValueError(f"vllm_mode must be 'server' or 'colocate', got {mode!r}")
    if not vllm_generation.is_vllm_available():
        raise ImportError(
            "engine: vllm needs the package vllm, which is not installed: pip install 'apportion[vllm]'"
        )
    try:
        generation = vllm_generation.VLLMGeneration(
            model,
            accelerator,
            tokenizer,
            mode=mode,
            server_base_url=base_url.rstrip("/"),  # else TRL asks for //health, for ever
            server_timeout=server_timeout,
            group_port=group_port,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_length=max_model_length,
            enable_sleep_mode=enable_sleep_mode,
        )
    except requests.ConnectionError as error:
        raise ConnectionError(
            f"no vLLM server answers at {base_url} within {server_timeout} s; start one with\n"
            f"    {LAUNCH}"
        ) from error
    return VLLMEngine(
        generation,
        tokenizer,
        concurrency=concurrency,
        timeout=timeout,
        filtered_logprobs=filtered_logprobs,
    )


def _client_of(generation: Any) -> Any:
    """The client of this process: the one that hands weights on, or one for requests alone."""
    if generation.accelerator.is_main_process:
        return generation.vllm_client
    return vllm_client.VLLMClient(
        base_url=generation.server_base_url, connection_timeout=generation.server_timeout
    )


def _require_processed(client: Any) -> None:
    """Raise if the server's log-probabilities are not at the sampling temperature."""
    mode = client.get_server_info().get("model_config", {}).get("logprobs_mode")
    if mode != "processed_logprobs":
        raise ValueError(
            f"the vLLM server at {client.base_url} reports {mode}, which are not those that tokens "
            f"are drawn by; start it with --logprobs-mode processed_logprobs:\n    {LAUNCH}"
        )


def _usable(seed: int) -> int:
    """The seed without its sign: to vLLM, -1 means none."""
    return seed % 2**63


def _sampled(answer: dict, row: int, prompt: Prompt) -> tuple[list[int], list[float | None]]:
    """Tokens of a row and the log-probability of each, from those listed at its position."""
    ids = answer["completion_ids"][row]
    if answer["logprobs"] is None:
        raise FloatingPointError(f"vLLM gave prompt {prompt.key} no log-probabilities")
    listed = zip(answer["logprob_token_ids"][row], answer["logprobs"][row], strict=True)
    tables = [dict(zip(tokens, values, strict=True)) for tokens, values in listed]
    if len(tables) != len(ids):
        raise RuntimeError(
            f"vLLM gave prompt {prompt.key} {len(ids)} tokens and {len(tables)} log-probabilities"
        )
    for token, table in zip(ids, tables, strict=True):
        if token not in table:
            raise FloatingPointError(
                f"vLLM gave prompt {prompt.key} no log-probability of token {token}, which it drew"
            )
    return list(ids), [table[token] for token, table in zip(ids, tables, strict=True)]


def _check(
    ids: list[int], logprobs: list[float | None], key: str, *, limit: int, vocabulary: int
) -> None:
    """Raise if this cannot be a completion of at most `limit` tokens by the model being trained."""
    if not 1 <= len(ids) <= limit:
        raise RuntimeError(
            f"vLLM gave prompt {key} a completion of {len(ids)} tokens, asked for 1 to {limit}"
        )
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise RuntimeError(
            f"vLLM gave prompt {key} tokens from {min(ids)} to {max(ids)}, but the model being trained "
            f"has {vocabulary}: is it another model that is served?"
        )
    # A certain token has log-probability 0, up to rounding; TRL's None is vLLM's NaN.
    known = [x for x in logprobs if x is not None and not math.isnan(x)]
    bad = [x for x in known if not CLAMPED < x <= 1e-3]
    if bad:
        raise FloatingPointError(
            f"vLLM gave prompt {key} a log-probability that is infinite or above 0: {bad[0]}"
        )
