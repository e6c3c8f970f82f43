"""Rewards over HTTP: the same numbers as here, the failures, and that nothing is unpickled."""

import http.server
import io
import json
import pickle
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from rollouts.rewards import image as image_rewards
from rollouts.rewards import image_shapes
from rollouts.rewards.contract import RewardError
from rollouts.rewards.image import score_images
from rollouts.rewards.remote import RemoteReward, make_server, pack, serve, unpack

PROMPTS = ["one ball", "two balls", "\N{BLACK STAR} zero"]


def images(number=3, channels=3):
    return np.random.default_rng(0).integers(0, 256, (number, 16, 16, channels), dtype=np.uint8)


@pytest.fixture
def running():
    """A function that runs a server and gives its URL; all are stopped at the end."""
    servers = []

    def start(server):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield lambda reward: start(make_server(reward, 0)) if callable(reward) else start(reward)
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(*replies):
    """A server that gives these replies, (status, body), one after the other; then the last."""
    left = list(replies)
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = seen
    return server


# The same as here


@pytest.mark.parametrize("reward", [image_rewards.colourfulness, image_rewards.sharpness])
def test_rewards_are_bitwise_those_of_the_function(running, reward):
    remote_N, details = RemoteReward(running(reward))(images(), PROMPTS, [{}] * 3)
    expected = reward(images(), PROMPTS, [{}] * 3)
    assert remote_N.dtype == np.float64 and details == {}
    np.testing.assert_array_equal(remote_N, expected)


def test_details_come_along(running):
    remote_N, details = RemoteReward(running(image_shapes.count))(images(), PROMPTS, [{}] * 3)
    expected_N, expected = image_shapes.count(images(), PROMPTS, [{}] * 3)
    np.testing.assert_array_equal(remote_N, expected_N)
    np.testing.assert_array_equal(details["found"], expected["found"])
    assert list(details) == ["found"]


def test_the_server_sees_what_the_client_had(running):
    seen = []

    def spy(*batch):
        seen.extend(batch)
        return np.arange(3.0)

    metadata = [{"a": 1}, {"b": [0.1, None]}, {}]
    RemoteReward(running(spy))(images(channels=1), PROMPTS, metadata)
    np.testing.assert_array_equal(seen[0], images(channels=1))
    assert seen[0].dtype == np.uint8 and seen[1] == PROMPTS and seen[2] == metadata


def test_no_images_ask_nobody():
    reward_N, details = RemoteReward("http://127.0.0.1:1", retries=0)(images(0), [], [])
    assert reward_N.shape == (0,) and details == {}


def test_a_proxy_in_the_environment_is_not_used(running, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    remote = RemoteReward(running(image_rewards.brightness), retries=0)
    assert remote(images(1), ["a"], [{}])[0].shape == (1,)


def test_one_call_at_a_time_reaches_the_reward(running):
    inside, most = [], []

    def slow(image_NHWC, prompts, metadata):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return np.zeros(len(prompts))

    remote = RemoteReward(running(slow))
    threads = [threading.Thread(target=remote, args=(images(1), ["a"], [{}])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


@pytest.mark.slow
def test_serve_answers_until_it_is_stopped(monkeypatch):
    # `serve` blocks, so it runs in a thread; its port is read from the server it makes.
    made = []

    def making(*args, **settings):
        made.append(make_server(*args, **settings))
        return made[0]

    monkeypatch.setattr("rollouts.rewards.remote.make_server", making)
    thread = threading.Thread(target=serve, args=(image_rewards.brightness, 0), daemon=True)
    thread.start()
    while not made:
        time.sleep(0.01)
    host, port = made[0].server_address
    assert host == "127.0.0.1"
    reward_N, _ = RemoteReward(f"http://{host}:{port}")(images(1), ["a"], [{}])
    assert reward_N[0] == image_rewards.brightness(images(1), ["a"], [{}])[0]
    made[0].shutdown()
    thread.join(5)
    assert not thread.is_alive()


# Failures


@pytest.mark.parametrize("error", [KeyError("no face"), SystemExit("'no face'")])
def test_a_reward_that_raises_names_url_prompt_and_reason_and_is_not_repeated(running, error):
    calls = []

    def raises(*_):
        calls.append(1)
        raise error

    url = running(raises)
    message = rf"reward server {url} \(first prompt 'one ball'\) answered 500: \w+: 'no face'"
    with pytest.raises(ValueError, match=message):
        RemoteReward(url, retry_wait=0)(images(), PROMPTS, [{}] * 3)
    assert len(calls) == 1


def test_scoring_finds_the_prompt_that_the_remote_reward_fails_on(running):
    prompts = ["one ball", "no number", "two balls"]
    remote = RemoteReward(running(image_shapes.count), name="count")
    with pytest.raises(RewardError, match="prompt 'no number', reward function count: raised"):
        score_images([remote], images(), prompts)
    result, _ = score_images([remote], images(), prompts, max_failed_share=0.5)
    assert result.scored.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.array([0.0, np.nan, 1.0]), "the reward of row 1 is nan"),
        (np.array([0.0, 1.0, -np.inf]), "the reward of row 2 is -inf"),
        (np.zeros(2), r"rewards have shape \(2,\) for 3 images"),
        ((np.zeros(3), {"d": np.zeros((3, 1))}), r"details/d have shape \(3, 1\) for 3 images"),
        ("abc", "could not convert"),
    ],
)
def test_the_server_refuses_to_send_what_is_no_reward(running, returned, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(running(lambda *_: returned))(images(), PROMPTS, [{}] * 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"rewards": [1, NaN, 2]}', "gave nan as the reward of row 1"),
        (b'{"rewards": [1, 2, 1e999]}', "gave inf as the reward of row 2"),
        (b'{"rewards": [1, 2]}', "gave 2 rewards for 3 images"),
        (b'{"rewards": [1, 2, 3], "details/x": [1]}', "gave 1 details/x for 3 images"),
        (b'{"reward": [1, 2, 3]}', "no list of rewards"),
        (b'{"rewards": [1, null, 3]}', "no list of rewards"),
        (b"[1, 2, 3]", "no list of rewards"),
        (b"<html>", r"no list of rewards: b'<html>'"),
        (pickle.dumps([1.0, 2.0, 3.0]), "no list of rewards"),
    ],
)
def test_the_client_refuses_answers_that_are_no_rewards(running, body, message):
    url = running(answering((200, body)))
    with pytest.raises(RewardError, match=f"{url}.*'one ball'.*{message}"):
        RemoteReward(url)(images(), PROMPTS, [{}] * 3)


def test_a_server_that_is_busy_is_asked_again(running):
    server = answering((503, b"loading"), (429, b"slowly"), (200, b'{"rewards": [1, 2, 3]}'))
    remote = RemoteReward(running(server), retries=2, retry_wait=0)
    assert remote(images(), PROMPTS, [{}] * 3)[0].tolist() == [1, 2, 3]
    assert len(server.seen) == 3 and len(set(server.seen)) == 1  # the same request each time


def test_a_server_that_stays_busy_is_given_up(running):
    server = answering((503, b"loading"))
    url = running(server)
    with pytest.raises(RewardError, match=f"{url}.*did not answer in 3 attempts: 503: loading"):
        RemoteReward(url, retries=2, retry_wait=0)(images(), PROMPTS, [{}] * 3)
    assert len(server.seen) == 3


def test_nobody_there_names_url_and_prompt():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    port = server.server_address[1]
    server.server_close()  # now the port is free
    with pytest.raises(
        RewardError, match=rf"127.0.0.1:{port} \(first prompt 'one ball'\) did not answer in 2"
    ):
        RemoteReward(f"http://127.0.0.1:{port}", retries=1, retry_wait=0)(
            images(), PROMPTS, [{}] * 3
        )


def test_a_silent_server_is_waited_for_no_longer_than_the_timeout(running):
    release = threading.Event()

    def silent(*_):
        release.wait(10)
        return np.zeros(3)

    remote = RemoteReward(running(silent), timeout=0.1, retries=0)
    started = time.monotonic()
    with pytest.raises(RewardError, match="did not answer in 1 attempts: TimeoutError"):
        remote(images(), PROMPTS, [{}] * 3)
    assert time.monotonic() - started < 5
    release.set()


def test_waits_double(running, monkeypatch):
    waits = []
    monkeypatch.setattr("rollouts.rewards.remote.time.sleep", waits.append)
    remote = RemoteReward(running(answering((503, b""))), retries=3, retry_wait=0.5)
    with pytest.raises(RewardError):
        remote(images(), PROMPTS, [{}] * 3)
    assert waits == [0.5, 1.0, 2.0]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'localhost"):
        RemoteReward("localhost:80")
    with pytest.raises(ValueError, match="timeout must be positive"):
        RemoteReward("http://a", timeout=0)
    with pytest.raises(ValueError, match="not negative; got 60.0, -1"):
        RemoteReward("http://a", retries=-1)


# The wire


def posted(url, body):
    """Status and text of the answer to these bytes."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(url, data=body, method="POST"), timeout=5
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Bomb:
    """Unpickling it sets `exploded`."""

    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_neither_pickles_nor_object_arrays_are_opened(running):
    url = running(image_rewards.brightness)
    buffer = io.BytesIO()
    np.savez(buffer, image=np.array([Bomb()], dtype=object), rows=np.zeros(2, np.uint8))
    for body in (pickle.dumps(Bomb()), buffer.getvalue(), b"nonsense", b""):
        status, text = posted(url, body)
        assert status == 400 and "unreadable request" in text
    assert not Bomb.exploded
    # The server lives on.
    assert RemoteReward(url)(images(1), ["a"], [{}])[0].shape == (1,)


def test_a_request_survives_packing():
    image, prompts, metadata = unpack(pack(images(), PROMPTS, [{"x": 1}, {}, {"y": "é"}]))
    np.testing.assert_array_equal(image, images())
    assert prompts == PROMPTS and metadata == [{"x": 1}, {}, {"y": "é"}]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="equally many, got 3, 2 and 3"):
        pack(images(), PROMPTS[:2], [{}] * 3)
    with pytest.raises(ValueError, match="metadata for a remote reward must be JSON"):
        pack(images(), PROMPTS, [{"x": object()}] * 3)


def test_a_request_whose_parts_do_not_fit_is_refused(running):
    rows = json.dumps({"prompts": ["a"], "metadata": [{}]}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, image=images(), rows=np.frombuffer(rows, np.uint8))
    assert posted(running(image_rewards.brightness), buffer.getvalue()) == (
        400,
        "unreadable request: 3 images, 1 prompts, 1 rows",
    )


def test_a_request_with_other_images_is_refused(running):
    body = pack(images(1).astype(np.float32), ["a"], [{}])
    status, text = posted(running(lambda *_: np.zeros(1)), body)
    assert status == 400 and "images must be a NumPy array of uint8" in text


def test_a_request_that_is_too_long_is_not_read(running, monkeypatch):
    monkeypatch.setattr("rollouts.rewards.remote.MOST_BYTES", 10)
    status, text = posted(running(image_rewards.brightness), b"x" * 11)
    assert status == 400 and r"length 11 is not in (0, 10]" in text
