"""Remote scores, against a real server in a thread that fails in every way it can."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from redif_env import ReDiFVectorEnv
from redif_env.errors import InvalidArgumentError, ReDiFError, RemoteRewardError
from redif_env.rewards import Remote
from redif_env.rewards.remote import RemoteAnswerError, RemoteTransportError


class Server:
    """Scores a sample by the mean of its pixels, after `plan` is used up.

    Attributes:
        plan: What to do with the next requests instead: a status, `"sleep"`, `"hang up"`, `"drip"`,
            or bytes to answer.
        seen: Content type, headers and number of samples of each request.
    """

    def __init__(self):
        self.plan, self.seen = [], []
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        images, classes = self.read(body)
        self.owner.seen.append((self.headers, len(images)))
        step = self.owner.plan.pop(0) if self.owner.plan else None
        if step == "hang up":
            return self.connection.close()
        if step == "sleep":
            time.sleep(1.0)
        scores = [float(image.mean()) for image in images]
        if classes is not None:
            scores = [value + int(own) for value, own in zip(scores, classes, strict=True)]
        answer = step if isinstance(step, bytes) else json.dumps({"scores": scores}).encode()
        try:
            self.send_response(step if isinstance(step, int) else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if step == "drip":
                for byte in answer:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
                return None
            self.wfile.write(answer)
        except OSError:  # the other side did not wait
            pass

    def read(self, body):
        if self.headers["Content-Type"] == "application/octet-stream":
            stream = io.BytesIO(body)
            images = np.load(stream)
            return images, np.load(stream) if stream.tell() < len(body) else None
        from PIL import Image

        content = json.loads(body)
        pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in content["images"]]
        assert all(picture.mode == "RGB" and picture.format == "PNG" for picture in pictures)
        return [np.asarray(picture) / 127.5 - 1 for picture in pictures], content["condition"]

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def samples(generator):
    return torch.rand(5, 3, 4, 6, generator=generator) * 2 - 1


def score(reward, x_0, condition=None):
    return reward(x_0, torch.zeros_like(x_0), condition)


def remote(server, **options):
    return Remote(server.url, **{"backoff": 0.01, "timeout": 5.0, **options})


def test_a_server_that_drips_is_given_up(server, samples):
    """No single read waits long; the whole answer would take 2 seconds and more."""
    server.plan = ["drip"]
    started = time.monotonic()
    scores = score(remote(server, timeout=0.3, retries=1), samples)
    assert time.monotonic() - started < 1.5
    assert len(server.seen) == 2  # the second try is answered at once
    assert scores.shape == (5,)


@pytest.mark.parametrize(("inputs", "tolerance"), [("png", 1 / 255), ("npy", 1e-6)])
@pytest.mark.parametrize("classes", [False, True])
def test_scores_arrive(server, samples, inputs, tolerance, classes):
    condition = torch.tensor([4, 3, 2, 1, 0]) if classes else None
    scores = score(remote(server, inputs=inputs, batch_size=2), samples, condition)
    wanted = samples.mean((1, 2, 3)) + (condition if classes else 0)
    torch.testing.assert_close(scores, wanted, atol=tolerance, rtol=0)
    assert [num for _, num in server.seen] == [2, 2, 1]
    assert scores.dtype == torch.float32


def test_pictures_are_clipped_and_arrays_are_not(server, samples):
    wide = 3 * samples
    torch.testing.assert_close(score(remote(server, inputs="npy"), wide), wide.mean((1, 2, 3)))
    png = score(remote(server), wide)
    torch.testing.assert_close(png, wide.clamp(-1, 1).mean((1, 2, 3)), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("first", [500, 503, 429, "hang up"])
def test_a_passing_failure_is_tried_again(server, samples, first):
    server.plan = [first, first]
    reward = remote(server, inputs="npy")
    torch.testing.assert_close(score(reward, samples), samples.mean((1, 2, 3)))
    assert reward.requests == len(server.seen) == 3


def test_it_waits_longer_each_time(server, samples, monkeypatch):
    waits = []
    monkeypatch.setattr("redif_env.rewards.remote.time.sleep", waits.append)
    server.plan = [500] * 3
    score(remote(server, retries=3, backoff=0.5), samples)
    assert waits == [0.5, 1.0, 2.0]


def test_a_server_that_stays_down(server, samples):
    server.plan = [500] * 9
    reward = remote(server, retries=2)
    with pytest.raises(RemoteTransportError, match=r"url=.*3 tries, the last: status 500"):
        score(reward, samples)
    assert reward.requests == 3


def test_what_will_not_change_is_not_tried_again(server, samples):
    server.plan = [404]
    reward = remote(server)
    with pytest.raises(RemoteTransportError, match="1 tries, the last: status 404"):
        score(reward, samples)
    assert reward.requests == 1


def test_a_time_out(server, samples):
    server.plan = ["sleep"]
    reward = remote(server, timeout=0.2)
    torch.testing.assert_close(score(reward, samples), samples.mean((1, 2, 3)), atol=0.01, rtol=0)
    assert reward.requests == 2
    server.plan = ["sleep"]
    with pytest.raises(RemoteTransportError, match="timed out"):
        score(remote(server, timeout=0.2, retries=0), samples)


def test_nobody_there(monkeypatch, samples):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    url = server.url
    server.close()
    with pytest.raises(RemoteTransportError, match="refused"):
        score(Remote(url, retries=1, backoff=0.01), samples)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b'{"scores": [1, 2, 3, 4]}', r"shape \(4,\)"),
        (b'{"scores": [[1], [2], [3], [4], [5]]}', r"shape \(5, 1\)"),
        (b'{"scores": [1, 2, NaN, 4, 5]}', "1 of 5 not finite"),
        (b'{"scores": [1, 2, Infinity, 4, 5]}', "not finite"),
        (b'{"scores": [1, 2, null, 4, 5]}', "not finite|finite numbers"),
        (b'{"scores": [1, 2, "a", 4, 5]}', "answer="),
        (b'{"score": 1}', "answer="),
        (b"[1, 2, 3, 4, 5]", "answer="),
        (b"\xff\xfe no json", "answer="),
        (b"", "answer="),
    ],
)
def test_answers_that_are_no_scores(server, samples, answer, match):
    """Never tried again: a made-up or shifted score would be learned."""
    server.plan = [answer]
    reward = remote(server)
    with pytest.raises(RemoteAnswerError, match=match) as caught:
        score(reward, samples)
    assert "5 finite numbers" in str(caught.value)
    assert reward.requests == 1
    assert isinstance(caught.value, RemoteRewardError)
    assert isinstance(caught.value, ReDiFError)


def test_headers_are_sent_and_not_shown(server, samples):
    reward = remote(server, headers={"Authorization": "Bearer secret"})
    score(reward, samples)
    headers, _ = server.seen[0]
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    server.plan = [404]
    with pytest.raises(RemoteTransportError) as caught:
        score(reward, samples)
    assert "secret" not in str(caught.value)
    assert "secret" not in reward.name


def test_an_environment_pays_what_the_server_says(server, teacher, bank):
    reward = remote(server, inputs="npy")
    env = ReDiFVectorEnv(3, teacher, reward=reward, schedule=[900, 500], bank=bank)
    env.reset(seed=0)
    env.step(torch.zeros(3, 64))
    assert reward.requests == 0  # nothing has ended
    _, rewards, *_ = env.step(torch.full((3, 64), 0.25))
    classes = env.last_state.condition
    torch.testing.assert_close(rewards, 0.25 + classes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "localhost:80"}, "url="),
        ({"url": "file:///etc/hosts"}, "url="),
        ({"url": None}, "url=None"),
        ({"inputs": "jpg"}, "inputs='jpg'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff": -1}, "backoff=-1"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Remote(**{"url": "http://127.0.0.1/", **options})
