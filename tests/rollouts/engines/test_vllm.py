"""VLLMEngine against a server that speaks vLLM's protocol, and against a colocated stand-in."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from requests.adapters import HTTPAdapter
from trl.generation import vllm_generation

from rl.logprobs.from_logits import completion_logprobs
from rollouts.engines.adaptive_temperature import AdaptiveTemperature
from rollouts.engines.check import check_engine
from rollouts.engines.contract import SamplingParams, asked_at
from rollouts.engines.transformers import TransformersEngine
from rollouts.engines.vllm import VLLMEngine, vllm_engine
from tests.tiny_lm import EOS, PAD, VOCABULARY, tiny_model, tiny_prompts, tiny_tokenizer
from tests.vllm_stand_in import LLM, serving

pytestmark = pytest.mark.slow  # whole runs

PARAMS = SamplingParams(max_completion_length=6)
PROMPTS = tiny_prompts(3, 5, 4)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def served(model, tmp_path, monkeypatch):
    with serving(model, tiny_tokenizer(), tmp_path, monkeypatch) as server:
        yield server


def on_server(server, model, **settings):
    made = vllm_engine(
        model,
        tiny_tokenizer(),
        Accelerator(cpu=True),
        mode="server",
        base_url=server.url,
        **settings,
    )
    server.asked.clear()
    return made


def colocated(model, monkeypatch, *, sleep=False):
    """An engine whose LLM is a stand-in; TRL's own synchronization and sleeping."""
    vllm = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    generation = object.__new__(vllm_generation.VLLMGeneration)
    vars(generation).update(
        model=model,
        mode="colocate",
        accelerator=Accelerator(cpu=True),
        _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda _: torch.no_grad()),
        tensor_parallel_size=1,
        enable_sleep_mode=sleep,
        llm=LLM(model, tiny_tokenizer()),
    )
    if sleep:  # as TRL leaves it
        generation.llm.sleep(level=2)
    return VLLMEngine(generation, tiny_tokenizer()), generation.llm


@pytest.mark.slow
def test_it_keeps_the_contract_of_engines(served, model):
    check_engine(on_server(served, model, concurrency=8), PROMPTS, PARAMS)


@pytest.mark.slow
def test_colocated_it_keeps_the_contract_of_engines(model, monkeypatch):
    check_engine(colocated(model, monkeypatch)[0], PROMPTS, PARAMS)


def test_every_rollout_is_a_request_with_its_seed(served, model):
    rollouts = on_server(served, model).generate(
        PROMPTS, [2, 0, 1], seeds_N=[7, 2**62, 9], params=PARAMS, version=4
    )
    bodies = served.completions()
    assert sorted(body["seed"] for body in bodies) == [7, 9, 2**62]
    by_seed = {body["seed"]: body for body in bodies}
    assert by_seed[7]["prompt"] == by_seed[2**62]["prompt"] == [list(PROMPTS[0].token_ids)]
    assert by_seed[9]["prompt"] == [list(PROMPTS[2].token_ids)]
    for body in bodies:
        assert body["n"] == 1 and body["logprobs"] == 0 and body["max_tokens"] == 6
        assert body["stop_token_ids"] == [EOS]
    assert rollouts.prompt_N.tolist() == [0, 0, 2] and rollouts.version == 4
    assert served.paths().count("/v1/completions") == len(served.asked)  # no weights were sent


def test_rollouts_are_those_of_the_model_and_logprobs_those_of_the_trainer(served, model):
    engine = on_server(served, model)
    params = SamplingParams(max_completion_length=6, temperature=0.7)
    asked = {"seeds_N": [1, 2, 3, 4, 5, 6], "params": params}
    ours = engine.generate(PROMPTS, [3, 1, 2], **asked)
    theirs = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS, [3, 1, 2], **asked)
    assert torch.equal(ours.mask_NT, theirs.mask_NT)
    assert torch.equal(ours.token_NT[ours.mask_NT], theirs.token_NT[theirs.mask_NT])
    assert torch.equal(ours.truncated_N, theirs.truncated_N)
    assert ours.truncated_N.any() and not ours.truncated_N.all()
    again = completion_logprobs(model, ours, temperature=0.7, pad_id=PAD)
    torch.testing.assert_close(again, ours.logprob_NT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stop", ["a", "e"])
def test_a_stop_string_at_the_limit_is_no_truncation(served, model, stop):
    params = SamplingParams(max_completion_length=3, stop=(stop,))
    asked = {"seeds_N": range(40), "params": params}
    ours = on_server(served, model).generate(PROMPTS[:1], [40], **asked)
    theirs = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS[:1], [40], **asked)
    full_N = ours.length_N == 3
    assert torch.equal(ours.truncated_N, theirs.truncated_N)
    assert (full_N & ~ours.truncated_N).any() and ours.truncated_N.any()


def test_a_stop_string_may_be_a_special_token_and_ends_a_rollout_early(served, model):
    # The special token is decoded, and vLLM asked to decode it.
    params = SamplingParams(max_completion_length=5, stop=("<pad>", "ab"))
    asked = {"seeds_N": range(60), "params": params}
    ours = on_server(served, model).generate(PROMPTS[:1], [60], **asked)
    last_N = ours.token_NT[torch.arange(60), ours.length_N - 1]
    early_N = ours.length_N < 5
    assert (early_N & (last_N == PAD)).any() and not ours.truncated_N[early_N].any()
    assert (ours.truncated_N == ~((last_N == PAD) | (last_N == EOS) | has(ours, "ab"))).all()


def has(rollouts, stop):
    texts = [
        tiny_tokenizer().decode(row[mask])
        for row, mask in zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
    ]
    return torch.tensor([stop in text for text in texts])


def test_greedy_rollouts_are_those_of_the_model(served, model):
    params = SamplingParams(max_completion_length=6, temperature=0.0)
    asked = {"seeds_N": [1, 2, 3], "params": params}
    ours = on_server(served, model).generate(PROMPTS, [1, 1, 1], **asked)
    theirs = TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS, [1, 1, 1], **asked)
    assert torch.equal(ours.token_NT[ours.mask_NT], theirs.token_NT[theirs.mask_NT])
    torch.testing.assert_close(ours.logprob_NT, theirs.logprob_NT, rtol=0, atol=1e-4)


def test_every_seed_is_one_to_vllm(served, model, monkeypatch):
    # To vLLM -1 is no seed, so it must not be sent, and what is sent stays apart.
    asked = {"seeds_N": [-1, -2, 0, 2**63 - 2], "params": PARAMS}
    on_server(served, model).generate(PROMPTS[:1], [4], **asked)
    sent = {body["seed"] for body in served.completions()}
    assert sent == {2**63 - 1, 2**63 - 2, 0}
    engine, llm = colocated(model, monkeypatch)
    engine.generate(PROMPTS[:1], [4], **asked)
    assert {settings["seed"] for _, settings in llm.asked} == sent


def test_prefixes_of_older_weights_are_never_met(served, model, monkeypatch):
    """vLLM does not clear its cache while a request holds a part of it, and does not say so."""

    engine, other = on_server(served, model), on_server(served, model)
    first = salts_of(served, engine)
    assert len(first) == 1 and first == salts_of(served, engine)
    assert first != salts_of(served, other)
    engine.load_weights(model)
    second = salts_of(served, engine)
    assert len(second) == 1 and second != first
    near, llm = colocated(model, monkeypatch)
    before = salts_near(llm, near)
    near.load_weights(model)
    assert len(before) == 1 and before.isdisjoint(salts_near(llm, near))


def salts_of(server, engine):
    server.asked.clear()
    engine.generate(PROMPTS, [2, 1, 1], seeds_N=range(4), params=PARAMS)
    return {body["cache_salt"] for body in server.completions()}


def salts_near(llm, engine):
    llm.asked.clear()
    engine.generate(PROMPTS, [2, 1, 1], seeds_N=range(4), params=PARAMS)
    return {prompt["cache_salt"] for prompt, _ in llm.asked}


def changed(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))


def logprobs(engine, model):
    """Recorded, and those of `model`: of the same rollouts."""
    rollouts = engine.generate(PROMPTS, [2, 2, 2], seeds_N=range(6), params=PARAMS)
    with torch.no_grad():
        return rollouts.logprob_NT, completion_logprobs(
            model, rollouts, temperature=1.0, pad_id=PAD
        )


def test_weights_are_handed_on_when_they_are_loaded(served, model):
    engine = on_server(served, model)
    changed(model)
    stale, fresh = logprobs(engine, model)
    assert (stale - fresh).abs().max() > 0.1
    engine.load_weights(model)
    sent = [path for path in served.paths() if path != "/v1/completions"]
    assert sent == [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]
    recorded, fresh = logprobs(engine, model)
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)


def test_another_model_may_be_loaded(served, model):
    engine, other = on_server(served, model), tiny_model(seed=1)
    engine.load_weights(other)
    recorded, fresh = logprobs(engine, other)
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)
    # One in another type: what is announced to vLLM follows.
    engine.load_weights(tiny_model(seed=2).double())
    recorded, fresh = logprobs(engine, tiny_model(seed=2))
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)


def test_weights_wait_for_every_process_and_every_process_for_the_weights(served, model):
    engine = on_server(served, model)
    accelerator = engine._generation.accelerator
    engine._generation.accelerator = SimpleNamespace(
        is_main_process=accelerator.is_main_process,
        wait_for_everyone=lambda: served.asked.append(("wait", None)),
    )
    engine.load_weights(model)
    assert served.paths() == [
        "wait",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "wait",
    ]


def test_an_adapter_is_merged_on_the_way_and_stays_an_adapter(served, model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    engine = on_server(served, adapted)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    engine.load_weights(adapted)
    recorded, fresh = logprobs(engine, adapted)
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_colocated_it_sleeps_between_uses_and_wakes_with_new_weights(model, monkeypatch):
    engine, llm = colocated(model, monkeypatch, sleep=True)
    with pytest.raises(RuntimeError, match="call load_weights before generate"):
        engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)
    changed(model)
    engine.load_weights(model)
    recorded, fresh = logprobs(engine, model)
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)
    engine.rest()
    engine.rest()
    assert llm.calls == ["sleep", "wake weights", "reset_prefix_cache", "wake kv_cache", "sleep"]
    with pytest.raises(RuntimeError, match="rests"):
        logprobs(engine, model)
    engine.load_weights(model)
    recorded, fresh = logprobs(engine, model)
    torch.testing.assert_close(recorded, fresh, rtol=0, atol=1e-4)


def test_without_sleep_mode_rest_does_nothing(model, monkeypatch):
    engine, llm = colocated(model, monkeypatch)
    engine.rest()
    assert llm.calls == []
    engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda c: c | {"token_ids": c["token_ids"][:-1]}, RuntimeError, "tokens and"),
        (lambda c: c | {"prompt_token_ids": [1]}, RuntimeError, "another prompt than prompt-0"),
        (lambda c: c | {"logprobs": None}, FloatingPointError, "prompt-0 no log-probabilities"),
        (
            lambda c: c | {"token_ids": [3] * 9, "logprobs": listed([3] * 9)},
            RuntimeError,
            "a completion of 9 tokens, asked for 1 to 6",
        ),
        (lambda c: c | {"token_ids": [], "logprobs": listed([])}, RuntimeError, "of 0 tokens"),
        (
            lambda c: c | {"token_ids": [3], "logprobs": listed([4])},
            FloatingPointError,
            "prompt-0 no log-probability of token 3, which it drew",
        ),
        (  # as a server writes minus infinity
            lambda c: c | {"token_ids": [EOS], "logprobs": listed([EOS], -9999.0)},
            FloatingPointError,
            "infinite or above 0: -9999.0",
        ),
        (  # as logits would be
            lambda c: c | {"token_ids": [EOS], "logprobs": listed([EOS], 2.5)},
            FloatingPointError,
            "above 0: 2.5",
        ),
        (
            lambda c: c | {"token_ids": [3, VOCABULARY], "logprobs": listed([3, VOCABULARY])},
            RuntimeError,
            f"tokens from 3 to {VOCABULARY}, but the model being trained has {VOCABULARY}: .*served",
        ),
        (lambda c: c | {"token_ids": [-1], "logprobs": listed([-1])}, RuntimeError, "from -1 to"),
        (  # as where the prompt leaves a colocated vLLM less room than was asked for
            lambda c: c | {"token_ids": [3, 4], "logprobs": listed([3, 4])},
            RuntimeError,
            r"after 2 of 6 tokens, at token 4, .*\(\[1\]\).*--max-model-len",
        ),
    ],
)
def test_an_answer_that_cannot_be_is_refused(served, model, spoil, error, message):
    engine = on_server(served, model)
    served.spoil = spoil
    with pytest.raises(error, match=message):
        engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=PARAMS)


def test_a_log_probability_that_vllm_could_not_say_is_nan(served, model):
    engine = on_server(served, model)
    known = engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)

    def spoil(choice):
        ids, values = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        return choice | {"logprobs": listed(ids, [float("nan"), *values[1:]])}

    served.spoil = spoil
    rollouts = engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)
    assert torch.equal(rollouts.token_NT, known.token_NT)
    assert rollouts.logprob_NT[:, 0].isnan().all()
    torch.testing.assert_close(rollouts.logprob_NT[:, 1:], known.logprob_NT[:, 1:])


def test_processes_that_share_a_vllm_generate_the_rows_of_all_and_keep_their_own(
    model, monkeypatch
):
    budgets = {0: [2, 1, 0], 1: [0, 0, 0], 2: [0, 0, 2]}
    engines = {rank: colocated(model, monkeypatch) for rank in budgets}
    alone = [
        engines[rank][0].generate(PROMPTS, budget_P, seeds_N=range(sum(budget_P)), params=PARAMS)
        for rank, budget_P in budgets.items()
    ]
    # What each of the three would send; the real one waits for the others.
    given, here = {}, SimpleNamespace(rank=0)

    def gather(into, mine, group):
        given[here.rank] = mine
        into[:] = [given[rank] for rank in budgets]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: here.rank)
    for engine, llm in engines.values():
        engine._generation.tp_group, engine._num_together = "group", 3
        assert engine.generates_together
        llm.asked.clear()
    for rank, budget_P in budgets.items():  # first to learn what each asks for
        here.rank = rank
        given |= {r: ([], "") for r in budgets if r not in given}
        engines[rank][0].generate(PROMPTS, budget_P, seeds_N=range(sum(budget_P)), params=PARAMS)
    for _, llm in engines.values():
        llm.asked.clear()
    for rank, budget_P in budgets.items():
        here.rank = rank
        engine, llm = engines[rank]
        found = engine.generate(PROMPTS, budget_P, seeds_N=range(sum(budget_P)), params=PARAMS)
        assert len(llm.asked) == 5  # the rows of all
        assert torch.equal(found.token_NT, alone[rank].token_NT)
    asked = [[(p["prompt_token_ids"], s["seed"]) for p, s in m.asked] for _, m in engines.values()]
    assert asked[0] == asked[1] == asked[2]
    assert len({p["cache_salt"] for _, llm in engines.values() for p, _ in llm.asked}) == 1


def test_an_answer_of_two_completions_is_refused(served, model):
    engine = on_server(served, model)
    answer = served.answer
    served.answer = lambda path, body: {"choices": answer(path, body)["choices"] * 2}
    with pytest.raises(RuntimeError, match="or 2 completions instead of 1"):
        engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=PARAMS)


def test_colocated_a_missing_answer_is_refused(model, monkeypatch):
    engine, llm = colocated(model, monkeypatch)
    generate = llm.generate
    llm.generate = lambda *arguments, **settings: generate(*arguments, **settings)[1:]
    with pytest.raises(RuntimeError, match="asked for 3 rollouts and gave 2"):
        engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)


def test_as_many_requests_are_open_as_it_may_have(served, model):
    engine = on_server(served, model, concurrency=3)
    served.delay = 0.02
    engine.generate(PROMPTS[:1], [12], seeds_N=range(12), params=PARAMS)
    assert served.most_open == 3
    assert engine._client.session.get_adapter(served.url).max_retries.total == 5  # TRL's


def test_a_server_that_does_not_answer_is_told_after_the_timeout(served, model):
    engine = on_server(served, model, timeout=0.1)
    engine._client.session.mount(served.url, HTTPAdapter(max_retries=0))  # else a minute of them
    served.delay = 0.5
    with pytest.raises(RuntimeError, match=r"failed on prompt prompt-0: .*timed out"):
        engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=PARAMS)
    served.delay = 0.0
    assert len(engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=PARAMS)) == 1


def test_a_server_that_has_gone_is_told(served, model):
    engine = on_server(served, model)
    engine._client.session.mount(served.url, HTTPAdapter(max_retries=0))
    served.shutdown()
    served.server_close()
    with pytest.raises(RuntimeError, match=rf"{served.url} failed on prompt prompt-0.*refused"):
        engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=PARAMS)


def test_close_leaves_the_group_of_the_weights(served, model, monkeypatch):
    engine = on_server(served, model)
    group = SimpleNamespace(store="a store", socket="a socket")
    engine._client.communicator = SimpleNamespace(group=group)
    engine.close()
    assert engine._client.communicator is None and group.store is None
    engine.close()
    colocated(model, monkeypatch)[0].close()


def listed(tokens, value=-1.0):
    names = [f"token_id:{token}" for token in tokens]
    values = value if isinstance(value, list) else [value] * len(names)
    tops = [{name: one} for name, one in zip(names, values, strict=True)]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops}


def test_an_error_of_the_server_is_told_with_the_prompt(served, model):
    engine = on_server(served, model)
    with pytest.raises(
        RuntimeError, match=r"failed on prompt prompt-0: Request failed: 400, .*130"
    ):
        engine.generate(
            PROMPTS[:1],
            [1],
            seeds_N=[0],
            params=SamplingParams(max_completion_length=130),
        )


def test_what_vllm_does_not_do_is_refused(served, model):
    engine = on_server(served, model)

    def ask(**settings):
        params = SamplingParams(max_completion_length=2, **settings)
        return engine.generate(PROMPTS[:1], [1], seeds_N=[0], params=params)

    with pytest.raises(ValueError, match="adaptive_temperature needs the transformers engine"):
        ask(
            adaptive_temperature=AdaptiveTemperature(
                tau=0.1, log_quantile=0.0, above=1.0, below=1.0
            )
        )
    with pytest.raises(ValueError, match="record_entropy needs the transformers engine"):
        ask(record_entropy=True)
    for setting in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="come after .*old_logprobs: trainer"):
            ask(**setting)
    with pytest.raises(ValueError, match=r"raises temperature=0.001 to 0.01; write 0, or 0.01"):
        ask(temperature=0.001)
    assert served.asked == []
    assert len(ask(temperature=0.01)) == 1


def test_filtered_logprobs_are_taken_by_request_and_come_after_the_filter(served, model):
    """Why they are refused otherwise: they are not what the trainer computes."""
    engine = on_server(served, model, filtered_logprobs=True)
    params = SamplingParams(max_completion_length=6, top_k=1)
    rollouts = engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=params)
    assert rollouts.logprob_NT.abs().max() < 1e-5
    fresh = completion_logprobs(model, rollouts, temperature=1.0, pad_id=PAD)
    assert fresh.min() < -0.1


def test_settings_that_cannot_be_are_refused(served, model, monkeypatch):
    with pytest.raises(ValueError, match="vllm_mode must be 'server' or 'colocate', got 'near'"):
        vllm_engine(model, tiny_tokenizer(), None, mode="near")
    engine = on_server(served, model)
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        VLLMEngine(engine._generation, tiny_tokenizer(), concurrency=0)
    for mode in ("raw_logprobs", None):
        served.logprobs_mode = mode
        with pytest.raises(ValueError, match=f"reports {mode}.*\n.*vllm serve"):
            on_server(served, model)


def test_other_processes_have_clients_for_requests_alone(served, model):
    first = on_server(served, model)
    assert first._client is first._generation.vllm_client
    other = SimpleNamespace(
        mode="server",
        accelerator=SimpleNamespace(is_main_process=False),
        server_base_url=served.url,
        server_timeout=0,
        model=model,
    )
    engine = VLLMEngine(other, tiny_tokenizer())
    assert engine._client is not first._client and engine._client.communicator is None
    assert len(engine.generate(PROMPTS, [1, 0, 2], seeds_N=[1, 2, 3], params=PARAMS)) == 3


def test_a_server_that_is_not_there_is_told_with_how_to_start_it(model, served):
    with pytest.raises(
        ConnectionError, match=r"127.0.0.1:9 within 0 s; start one with\n.*vllm serve"
    ):
        vllm_engine(
            model,
            tiny_tokenizer(),
            Accelerator(cpu=True),
            mode="server",
            base_url="http://127.0.0.1:9",
            server_timeout=0,
        )


def test_an_address_may_end_in_a_slash(served, model):
    engine = vllm_engine(
        model, tiny_tokenizer(), Accelerator(cpu=True), mode="server", base_url=served.url + "/"
    )
    assert len(engine.generate(PROMPTS, [1, 1, 1], seeds_N=range(3), params=PARAMS)) == 3
    assert not [path for path in served.paths() if path.startswith("//")]


def test_without_vllm_it_says_what_to_install(model):
    with pytest.raises(ImportError, match=r"pip install 'apportion\[vllm\]'"):
        vllm_engine(model, tiny_tokenizer(), Accelerator(cpu=True), mode="colocate")


# -- verdicts, asked for between pieces of a completion


def ended_by(over, every=2, **settings):
    limits = {"max_completion_length": 7, **settings}
    return SamplingParams(over=over, verdict_every=every, **limits)


def even(prompts, ids_N):
    return [sum(ids) % 2 == 0 for ids in ids_N]


def never(prompts, ids_N):
    return [False] * len(ids_N)


@pytest.mark.parametrize("kind", ["server", "colocated"])
def test_a_rollout_is_drawn_in_pieces_and_ends_where_it_is_decided(
    served, model, monkeypatch, kind
):
    made = on_server(served, model) if kind == "server" else colocated(model, monkeypatch)[0]
    asked = {"seeds_N": range(12)}
    whole = made.generate(PROMPTS, [5, 0, 7], params=ended_by(never), **asked)
    ended = made.generate(PROMPTS, [5, 0, 7], params=ended_by(even), **asked)
    assert not whole.decided_N.any() and 2 < ended.decided_N.sum() < 12
    for row in range(12):
        tokens = whole.token_NT[row][whole.mask_NT[row]].tolist()
        ends = [at for at in asked_at(len(tokens), 2) if sum(tokens[:at]) % 2 == 0]
        length = ends[0] if ends else len(tokens)
        assert ended.token_NT[row][ended.mask_NT[row]].tolist() == tokens[:length]
        assert bool(ended.decided_N[row]) == bool(ends)
        assert bool(ended.truncated_N[row]) == (bool(whole.truncated_N[row]) and not ends)
    # The first piece is drawn as a rollout without verdicts, later ones under seeds of their own.
    plain = made.generate(PROMPTS, [5, 0, 7], params=replace(ended_by(never), over=None), **asked)
    assert plain.decided_N is None
    assert torch.equal(plain.token_NT[:, :2], whole.token_NT[:, :2])
    again = completion_logprobs(model, whole, temperature=1.0, pad_id=PAD)
    torch.testing.assert_close(again, whole.logprob_NT, rtol=0, atol=1e-4)


def test_pieces_continue_what_was_drawn_and_no_two_have_one_seed(served, model):
    made = on_server(served, model)
    rollouts = made.generate(PROMPTS[:1], [6], seeds_N=range(6), params=ended_by(never))
    bodies = served.completions()
    prompt = list(PROMPTS[0].token_ids)
    assert {body["max_tokens"] for body in bodies} == {1, 2}  # 2, 2, 2 and the last of 7
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds) > 6 and {*range(6)} <= {*seeds}
    drawn = [
        row[mask].tolist() for row, mask in zip(rollouts.token_NT, rollouts.mask_NT, strict=True)
    ]
    for body in bodies:
        (ids,) = body["prompt"]
        begun = ids[len(prompt) :]
        assert ids[: len(prompt)] == prompt and len(begun) % 2 == 0
        assert any(row[: len(begun)] == begun for row in drawn)


def test_a_stop_string_across_two_pieces_ends_the_rollout_there(served, model):
    made, tokenizer = on_server(served, model), tiny_tokenizer()
    limits = {"every": 1, "max_completion_length": 4}
    asked = {"seeds_N": range(8)}
    plain = made.generate(PROMPTS[:1], [8], params=ended_by(never, **limits), **asked)
    row = int((plain.length_N == 4).nonzero()[0])
    stop = tokenizer.decode(plain.token_NT[row, 1:3])  # the second and the third piece
    found = made.generate(PROMPTS[:1], [8], params=ended_by(never, stop=(stop,), **limits), **asked)
    assert found.length_N[row] == 3 and not found.truncated_N[row] and not found.decided_N[row]
    assert torch.equal(found.token_NT[row, :3], plain.token_NT[row, :3])
    # One within a piece ends it as it does without verdicts.
    limits["every"] = 2
    plain = made.generate(PROMPTS[:1], [8], params=ended_by(never, **limits), **asked)
    row = int((plain.length_N == 4).nonzero()[0])
    stop = tokenizer.decode(plain.token_NT[row, :1])
    found = made.generate(PROMPTS[:1], [8], params=ended_by(never, stop=(stop,), **limits), **asked)
    assert found.length_N[row] == 1 and not found.truncated_N[row]


@pytest.mark.slow
def test_processes_that_share_a_vllm_ask_until_no_row_of_any_is_left(model, monkeypatch):
    # Of two processes one has no rows: it calls as often as the other.
    engine, llm = colocated(model, monkeypatch)
    alone = engine.generate(PROMPTS, [4, 0, 0], seeds_N=range(4), params=ended_by(even))
    other, other_llm = colocated(model, monkeypatch)
    sent = []

    def first(into, mine, group):
        sent.append(mine)
        into[:] = [mine, ([], "")]

    def second(into, mine, group):
        assert mine[0] == []
        into[:] = [sent.pop(0), mine]

    for made in (engine, other):
        made._generation.tp_group, made._num_together = "group", 2
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", first)
    llm.asked.clear()
    found = engine.generate(PROMPTS, [4, 0, 0], seeds_N=range(4), params=ended_by(even))
    assert torch.equal(found.token_NT, alone.token_NT)
    asked = len(llm.asked)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", second)
    nothing = other.generate(PROMPTS, [0, 0, 0], seeds_N=[], params=ended_by(even))
    assert len(nothing) == 0 and not sent and len(other_llm.asked) == asked
