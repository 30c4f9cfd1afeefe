"""Scores over HTTP: a model that runs elsewhere, or a person."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException

import numpy as np
import torch
from torch import Tensor

from ..errors import (
    InvalidArgumentError,
    RemoteRewardError,
    check_choice,
    check_integer,
    check_number,
)
from .base import Reward
from .scorers import as_pil

# Worth another try: too many requests, and what a server or gateway may recover from.
TRANSIENT = (429, 500, 502, 503, 504)
CONTENT_TYPES = {"png": "application/json", "npy": "application/octet-stream"}


class RemoteTransportError(RemoteRewardError):
    """No answer: refused, timed out, or a status that is not 200, after all tries."""


class RemoteAnswerError(RemoteRewardError):
    """The server answered with something other than one finite number a sample."""


class Remote(Reward):
    """The scores that a server gives, over HTTP; standard library only.

    A request is a POST with at most `batch_size` samples, in one of two forms:

    * `"png"`: `Content-Type: application/json`,
      `{"images": [base64 of an 8-bit RGB PNG, ...], "condition": [class, ...] or null}`;
    * `"npy"`: `Content-Type: application/octet-stream`, the samples as float32
      `(n, *latent_shape)` in numpy's NPY format and, with classes, behind them int64 `(n,)` in the
      same format. The server calls `numpy.load(stream)` once or twice.

    The answer, to either: status 200 and JSON `{"scores": [n finite numbers]}`, in order.

    Requests follow each other and training waits for them: `batch_size` and a server near by decide
    the speed. Time-outs, refused connections and the statuses 429, 500, 502, 503, 504 are tried
    again after `backoff`, 2, 4, ... times `backoff` seconds; the server should therefore answer the
    same to the same samples. What fails for good raises, and training ends: a made-up score would
    be learned.

    Args:
        url: http or https.
        inputs: `"png"` or `"npy"`.
        batch_size: Samples of a request.
        timeout: Seconds to wait for the server, each time that it is waited for; an answer that is
            not complete after as many is given up, too.
        retries: Further tries after the first.
        backoff: Seconds before the first of them.
        headers: Further headers, such as `Authorization`; they are not logged.

    Attributes:
        requests: Requests sent so far, failed ones too.

    Raises:
        InvalidArgumentError: for an argument that makes no sense.
        RemoteTransportError: if there is no answer.
        RemoteAnswerError: if the answer is not one finite number a sample; it is not tried again.
    """

    def __init__(
        self,
        url: str,
        inputs: str = "png",
        batch_size: int = 64,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
        headers: dict[str, str] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidArgumentError("url", url, "pass one such as 'http://host:8000/score'.")
        self.url = url
        self.inputs = check_choice("inputs", inputs, tuple(CONTENT_TYPES))
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.timeout = check_number("timeout", timeout, minimum=1e-3)
        self.retries = check_integer("retries", retries, 0)
        self.backoff = check_number("backoff", backoff)
        self.headers = {**(headers or {}), "Content-Type": CONTENT_TYPES[self.inputs]}
        self.requests = 0

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        scores: list[float] = []
        for start in range(0, len(x_0), self.batch_size):
            rows = slice(start, start + self.batch_size)
            samples = x_0[rows].detach().float()
            classes = None if condition is None else condition[rows]
            answer = self._ask(encode(samples, classes, self.inputs))
            scores += _parse(answer, len(samples), self.url)
        return torch.tensor(scores, dtype=torch.float32, device=x_0.device)

    def _ask(self, body: bytes) -> bytes:
        """The body of the answer to a request, tried until the tries are used up."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                failure, hopeless = f"status {error.code}", error.code not in TRANSIENT
                error.close()
            except (OSError, HTTPException) as error:
                failure, hopeless = str(error) or type(error).__name__, False
            if hopeless:
                break
        raise RemoteTransportError(
            "url",
            self.url,
            f"no answer in {attempt + 1} tries, the last: {failure}; is the server up? raise "
            "timeout or retries, or lower batch_size, for a slow one.",
        )

    def _send(self, body: bytes) -> bytes:
        self.requests += 1
        request = urllib.request.Request(self.url, body, self.headers, method="POST")
        deadline, parts = time.monotonic() + self.timeout, []
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            while part := response.read1(2**16):
                parts.append(part)
                if time.monotonic() > deadline:  # one that drips never keeps a read waiting
                    raise TimeoutError(f"an answer not complete after {self.timeout:g} s")
        return b"".join(parts)


def encode(samples: Tensor, condition: Tensor | None, inputs: str) -> bytes:
    """The body of a request, see `Remote`."""
    classes = None if condition is None else condition.cpu().numpy().astype(np.int64)
    stream = io.BytesIO()
    if inputs == "npy":
        np.save(stream, samples.cpu().numpy())
        if classes is not None:
            np.save(stream, classes)
        return stream.getvalue()
    images = [base64.b64encode(_png(image)).decode() for image in as_pil(samples)]
    content = {"images": images, "condition": None if classes is None else classes.tolist()}
    return json.dumps(content).encode()


def _png(image: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")  # type: ignore[attr-defined]
    return stream.getvalue()


def _parse(answer: bytes, num: int, url: str) -> list[float]:
    remedy = f'the server at {url} must answer {{"scores": [{num} finite numbers]}}.'
    try:
        scores = np.asarray(json.loads(answer)["scores"], dtype=np.float64)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RemoteAnswerError("answer", answer, remedy) from error
    if scores.shape != (num,):
        raise RemoteAnswerError("scores", f"of shape {scores.shape}", remedy)
    if not np.isfinite(scores).all():
        bad = f"{(~np.isfinite(scores)).sum()} of {num} not finite"
        raise RemoteAnswerError("scores", bad, remedy)
    return scores.tolist()
