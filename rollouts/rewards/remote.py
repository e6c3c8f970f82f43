"""Image rewards in another process or on another machine, over HTTP.

    # where the weights are
    serve(ClipScore.load(), 8500)

    # where the training is
    reward = RemoteReward("http://127.0.0.1:8500", timeout=60, retries=2)

Released training code exchanges pickles for this, and unpickling an answer runs whatever code it
contains. Here a request is an npz file (images as they are, prompts and metadata as JSON in it,
read with `allow_pickle=False`) and an answer is JSON, so neither side can run anything.

There is no encryption and no password: keep the port inside one's own network.

Axes: N images.
"""

from __future__ import annotations

import http.client
import http.server
import io
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy as np

from rollouts.rewards.contract import RewardError, start_of
from rollouts.rewards.image import ImageReward, Metadata, check_images

MOST_BYTES = 2**31
"""Longest request that a server reads."""

_RETRIED = (
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
)


class RemoteReward:
    """An image reward that another process computes; called like any other.

    Connections that fail, time out or are refused for the moment (HTTP 429, 502, 503, 504) are
    tried again, after 1, 2, 4, ... seconds. What the reward itself raises is not: it would raise
    again. It retries by itself, so it does not set `remote`, which would have `score` do so too.
    Proxies in the environment are not used.

    Raises, when called:
        RewardError: nobody answered, or the answer is not one finite number per image. That is no
            fault of a row, so no row is searched for. Names the URL and the first prompt.
        ValueError: the reward raised; names the URL, the first prompt, and what was raised there.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 2,
        retry_wait: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: "http://host:port".
            timeout: seconds that a silent connection is waited for.
            retries: repetitions of a request that failed.
            retry_wait: seconds before the first repetition, doubled before each further one.
            name: key in results; None takes the URL.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if not (timeout > 0 and retries >= 0 and retry_wait >= 0):
            raise ValueError(
                f"timeout must be positive, retries and retry_wait not negative; got {timeout}, "
                f"{retries} and {retry_wait}"
            )
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.retry_wait = retry_wait
        self.__name__ = name or url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(
        self, image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards (N,) float64 and details, as the other side computed them."""
        check_images(image_NHWC, videos=True)
        if not len(prompts):
            return np.zeros(0), {}
        body = pack(image_NHWC, prompts, metadata)
        where = f"reward server {self.url} (first prompt {start_of(prompts[0])})"
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, data=body, method="POST")
            request.add_header("Content-Type", "application/octet-stream")
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return _unpack_answer(answer.read(), len(prompts), where)
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", errors="replace")
                if error.code not in _RETRIED:
                    raise ValueError(f"{where} answered {error.code}: {said}") from None
                reason = f"{error.code}: {said}"
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(self.retry_wait * 2**attempt)
        raise RewardError(f"{where} did not answer in {self.retries + 1} attempts: {reason}")


def serve(reward: ImageReward, port: int, *, host: str = "127.0.0.1") -> None:
    """Answer requests for rewards until interrupted.

    Args:
        reward: any image reward, or several of them behind one function.
        port: TCP port; 0 takes a free one.
        host: address to listen at; the default is reached from this machine only.
    """
    with make_server(reward, port, host=host) as server:
        server.serve_forever()


def make_server(
    reward: ImageReward, port: int, *, host: str = "127.0.0.1"
) -> http.server.ThreadingHTTPServer:
    """What `serve` runs: `server_address` tells the port, `serve_forever` and `shutdown` run it.

    Requests are received at the same time but the reward is called for one after the other, because
    rewards with weights are not safe to call from several threads.
    """
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 < length <= MOST_BYTES:
                    raise ValueError(f"length {length} is not in (0, {MOST_BYTES}]")
                batch = unpack(self.rfile.read(length))
            except Exception as error:
                self._answer(HTTPStatus.BAD_REQUEST, f"unreadable request: {error}".encode())
                return
            try:
                with lock:
                    answer = _pack_answer(reward(*batch), len(batch[1]))
            except BaseException as error:  # exit() in a reward ends its request alone
                self._answer(
                    HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}".encode()
                )
                return
            self._answer(HTTPStatus.OK, answer)

        def _answer(self, status: HTTPStatus, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """One line per request would bury everything else."""

    server = http.server.ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


# What goes over the wire.


def pack(image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> bytes:
    """A request: an npz file with the images and, as bytes of JSON, prompts and metadata.

    Raises:
        ValueError: not equally many of each, or metadata that JSON cannot say.
    """
    if not len(image_NHWC) == len(prompts) == len(metadata):
        raise ValueError(
            f"images, prompts and metadata must be equally many, got {len(image_NHWC)}, "
            f"{len(prompts)} and {len(metadata)}"
        )
    rows = {"prompts": list(prompts), "metadata": [dict(row) for row in metadata]}
    try:
        text = json.dumps(rows)
    except TypeError as error:
        raise ValueError(f"metadata for a remote reward must be JSON: {error}") from error
    buffer = io.BytesIO()
    np.savez(buffer, image=image_NHWC, rows=np.frombuffer(text.encode(), dtype=np.uint8))
    return buffer.getvalue()


def unpack(body: bytes) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    """Images, prompts and metadata of a request.

    Raises:
        ValueError, KeyError, OSError: if it is not one; objects in it are refused, not unpickled.
    """
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        image_NHWC = file["image"]
        rows = json.loads(file["rows"].tobytes())
    check_images(image_NHWC, videos=True)
    prompts, metadata = rows["prompts"], rows["metadata"]
    if not len(image_NHWC) == len(prompts) == len(metadata):
        raise ValueError(f"{len(image_NHWC)} images, {len(prompts)} prompts, {len(metadata)} rows")
    return image_NHWC, prompts, metadata


def _pack_answer(given: Any, num_rows: int) -> bytes:
    reward_N, details = given if isinstance(given, tuple) else (given, {})
    columns = {"rewards": reward_N, **{f"details/{key}": value for key, value in details.items()}}
    for key, value in columns.items():
        columns[key] = value = np.asarray(value, dtype=np.float64)
        if value.shape != (num_rows,):
            raise RewardError(
                f"{key} have shape {value.shape} for {num_rows} images; expected one number each"
            )
    if not np.isfinite(columns["rewards"]).all():
        row = int(np.flatnonzero(~np.isfinite(columns["rewards"]))[0])
        raise RewardError(f"the reward of row {row} is {columns['rewards'][row]}")
    # Python writes a float64 so that reading it gives the same bits.
    return json.dumps({key: value.tolist() for key, value in columns.items()}).encode()


def _unpack_answer(
    body: bytes, num_rows: int, where: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    try:
        columns = {
            key: np.array([float(x) for x in value], dtype=np.float64)
            for key, value in json.loads(body).items()
        }
        reward_N = columns.pop("rewards")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RewardError(
            f"{where} gave an answer that is no list of rewards: {start_of(body)}"
        ) from error
    for key, value in {"rewards": reward_N, **columns}.items():
        if value.shape != (num_rows,):
            raise RewardError(f"{where} gave {len(value)} {key} for {num_rows} images")
    for row, value in enumerate(reward_N):
        if not math.isfinite(value):
            raise RewardError(f"{where} gave {value} as the reward of row {row}")
    return reward_N, {key.removeprefix("details/"): value for key, value in columns.items()}
