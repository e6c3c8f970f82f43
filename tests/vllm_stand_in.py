"""A server that speaks what TRL's client says to `vllm serve`, with a tiny model behind it.

Rollouts are drawn by `TransformersEngine` under the seed of the request, log-probabilities are
processed ones (after the filters, as vLLM's are), and what was asked is recorded. Weights, which vLLM
receives over NCCL, arrive through `Client`, a folder of safetensors in their place.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from trl.generation import vllm_client, vllm_generation

from rollouts.engines.contract import SamplingParams
from rollouts.engines.drawing import at_temperature, truncate
from rollouts.engines.transformers import TransformersEngine
from rollouts.prompts import Prompt


def complete(engine, ids, settings):
    """Tokens, processed log-probabilities and whether the limit ended it, as `settings` ask."""
    params = SamplingParams(
        max_completion_length=settings["max_tokens"],
        stop=tuple(settings["stop"]),
        **{name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p")},
    )
    assert sorted(settings["stop_token_ids"]) == list(engine.eos_token_ids)
    assert settings["repetition_penalty"] == 1.0 and settings["logprobs"] == 0
    assert settings["skip_special_tokens"] is False  # or stop strings of special tokens are missed
    prompt = Prompt(key="", prompt="", token_ids=tuple(ids), columns={})
    drawn = engine.generate([prompt], [1], seeds_N=[settings["seed"]], params=params)
    token_T = drawn.token_NT[0][drawn.mask_NT[0]]
    with torch.no_grad():
        logits_TV = engine.model(torch.cat([torch.tensor(ids), token_T])[None]).logits[0]
    score_TV = at_temperature(logits_TV[len(ids) - 1 : -1], params)
    if params.temperature > 0:
        score_TV = truncate(score_TV.log_softmax(-1), params)
    logprob_T = score_TV.log_softmax(-1).gather(1, token_T[:, None])[:, 0]
    return token_T.tolist(), logprob_T.tolist(), bool(drawn.truncated_N[0])


class Server(ThreadingHTTPServer):
    """Serves a copy of `model`; `asked` holds (path, body) of every request, `spoil` changes answers."""

    daemon_threads = True

    def __init__(self, model, tokenizer, *, logprobs_mode="processed_logprobs"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = copy.deepcopy(model)
        self.engine = TransformersEngine(self.model, tokenizer)
        self.logprobs_mode = logprobs_mode
        self.asked = []
        self.inbox = None  # folder that weights arrive in
        self.spoil = lambda choice: choice
        self.lock = threading.Lock()
        self.delay = 0.0  # seconds before a completion is begun
        self.open = self.most_open = 0  # completions asked for and not yet answered

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _ in self.asked]

    def completions(self):
        return [body for path, body in self.asked if path == "/v1/completions"]

    def answer(self, path, body):
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path.startswith("/server_info"):
            return {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": self.logprobs_mode},
                }
            }
        if path == "/update_weights":
            received = load_file(self.inbox / "weights.safetensors")
            assert list(received) == sorted(body["update_info"]["names"])
            self.model.load_state_dict(received, strict=False)
            return {}
        if path in ("/start_weight_update", "/finish_weight_update", "/reset_prefix_cache"):
            return {}
        if path == "/v1/completions":
            return {"choices": [self.spoil(self.choice(ids, body)) for ids in body["prompt"]]}
        raise KeyError(path)

    def choice(self, ids, body):
        with self.lock:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        time.sleep(self.delay)
        with self.lock:
            try:
                tokens, logprobs, truncated = complete(self.engine, ids, body)
            finally:
                self.open -= 1
        names = [f"token_id:{token}" for token in tokens]
        return {
            "prompt_token_ids": ids,
            "token_ids": tokens,
            "finish_reason": "length" if truncated else "stop",
            "logprobs": {
                "tokens": names,
                "token_logprobs": logprobs,
                "top_logprobs": [{n: x} for n, x in zip(names, logprobs, strict=True)],
            },
        }


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._reply(None)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        self._reply(json.loads(self.rfile.read(size) or b"{}"))

    def _reply(self, body):
        self.server.asked.append((self.path, body))
        try:
            status, answer = 200, self.server.answer(self.path, body)
        except (ValueError, AssertionError, KeyError) as error:
            status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait

    def log_message(self, *_):
        pass


class Client(vllm_client.VLLMClient):
    """TRL's client, but for the transport of tensors, which needs a GPU."""

    inbox = None

    def init_communicator(self, device=0):
        assert self.get_server_info()["weight_transfer_config"] is not None

    def update_named_params(self, metadata, named_params):
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in named_params}
        # What is announced is what vLLM makes room for.
        announced = [(name, dtype, list(shape)) for name, dtype, shape in metadata]
        assert announced == [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in tensors.items()
        ]
        save_file(tensors, self.inbox / "weights.safetensors")
        self._start_weight_update()
        info = {"names": [n for n, _, _ in metadata]}
        self._post(f"{self.base_url}/update_weights", json={"update_info": info})
        self._finish_weight_update()


@contextmanager
def serving(model, tokenizer, folder, monkeypatch, **settings):
    """A server of a copy of `model`, and TRL made to believe that vLLM is installed."""
    server = Server(model, tokenizer, **settings)
    server.inbox = Client.inbox = folder
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
        monkeypatch.setattr(module, "VLLMClient", Client)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class LLM:
    """vLLM's `LLM` as far as it is used colocated; remembers whether it sleeps."""

    def __init__(self, model, tokenizer):
        self.model = copy.deepcopy(model)
        self.engine = TransformersEngine(self.model, tokenizer)
        self.awake = {"weights": True, "kv_cache": True}
        self.calls = []
        self.asked = []  # (prompt, settings) of every rollout
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def _load(self, pairs):
        assert self.awake["weights"], "weights written into memory that is not mapped"
        self.model.load_state_dict(dict(pairs), strict=False)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level):
        assert level == 2
        self.calls.append("sleep")
        self.awake = dict.fromkeys(self.awake, False)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(float("nan"))

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")
        self.awake |= dict.fromkeys(tags, True)

    def generate(self, prompts, *, sampling_params, use_tqdm):
        assert all(self.awake.values())
        outputs = []
        for prompt, settings in zip(prompts, sampling_params, strict=True):
            self.asked.append((prompt, vars(settings)))
            ids = prompt["prompt_token_ids"]
            tokens, values, _ = complete(self.engine, ids, vars(settings))
            logprobs = [
                {token: SimpleNamespace(logprob=value, rank=1)}
                for token, value in zip(tokens, values, strict=True)
            ]
            one = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=list(ids), outputs=[one]))
        return outputs
