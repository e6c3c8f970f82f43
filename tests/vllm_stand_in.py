"""A server that speaks what TRL's client says to `vllm serve`, with a tiny model behind it.

Rollouts are drawn by `TransformersEngine` under the seed of the request, log-probabilities are
processed ones (after the filters, as vLLM's are), and what was asked is recorded. Weights, which vLLM
receives over NCCL, arrive through `Client`, a folder of safetensors in their place.
"""

from __future__ import annotations

import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from trl.generation import vllm_client, vllm_generation

from rollouts.engine import SamplingParams
from rollouts.prompts import Prompt
from rollouts.transformers_engine import TransformersEngine


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

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _ in self.asked]

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
            return {"choices": [self.spoil(self.complete(ids, body)) for ids in body["prompt"]]}
        raise KeyError(path)

    def complete(self, ids, body):
        params = SamplingParams(
            max_completion_length=body["max_tokens"],
            temperature=body["temperature"],
            top_k=body["top_k"],
            top_p=body["top_p"],
            min_p=body["min_p"],
            stop=tuple(body["stop"]),
        )
        prompt = Prompt(key="", prompt="", token_ids=tuple(ids), columns={})
        with self.lock:
            rollouts = self.engine.generate([prompt], [1], seeds_N=[body["seed"]], params=params)
        tokens = rollouts.token_NT[0][rollouts.mask_NT[0]].tolist()
        logprobs = rollouts.logprob_NT[0][rollouts.mask_NT[0]].tolist()
        names = [f"token_id:{token}" for token in tokens]
        return {
            "prompt_token_ids": ids,
            "token_ids": tokens,
            "finish_reason": "length" if rollouts.truncated_N[0] else "stop",
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
        except ValueError as error:
            status, answer = 400, {"error": str(error)}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Client(vllm_client.VLLMClient):
    """TRL's client, but for the transport of tensors, which needs a GPU."""

    inbox = None

    def init_communicator(self, device=0):
        assert self.get_server_info()["weight_transfer_config"] is not None

    def update_named_params(self, metadata, named_params):
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in named_params}
        assert [name for name, _, _ in metadata] == list(tensors)
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
            s = vars(settings)
            params = SamplingParams(
                max_completion_length=s["max_tokens"],
                stop=tuple(s["stop"]),
                **{name: s[name] for name in ("temperature", "top_k", "top_p", "min_p")},
            )
            ids = tuple(prompt["prompt_token_ids"])
            asked = Prompt(key="", prompt="", token_ids=ids, columns={})
            drawn = self.engine.generate([asked], [1], seeds_N=[s["seed"]], params=params)
            tokens = drawn.token_NT[0][drawn.mask_NT[0]].tolist()
            logprobs = [
                {token: SimpleNamespace(logprob=value, rank=1)}
                for token, value in zip(tokens, drawn.logprob_NT[0].tolist(), strict=False)
            ]
            one = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=list(ids), outputs=[one]))
        return outputs
