"""Rewards computed by another process or machine, over HTTP, while sampling goes on."""

from __future__ import annotations

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dmc_hub.errors import RunError


class RemoteRewardError(RunError):
    """A reward server did not answer, or not with one finite number per image."""


class HTTPReward:
    """A text-to-image reward by an HTTP server: called like a function, or with `submit` without waiting.

    Each request is a POST of JSON `{"images": [PNG in base64], "prompts": [...], "metadata": [...]}`, of at most
    `batch_size` images; the answer is `{"rewards": [...]}`, one finite number per image. Several requests are under way
    at a time, and `DDPOTrainer` samples its next micro-batch meanwhile. Time-outs, lost connections, the answers 408,
    429 and 5xx, and answers without one finite number per image are tried again after 1, 2, 4, ... times `backoff`. If
    that is in vain, trainers write a checkpoint and stop.

    Args:
        url: of the server, `http://` or `https://`.
        timeout: seconds that a request may take.
        retries: after the first try.
        batch_size: images in one request.
        max_in_flight: requests at a time.
        headers: more headers, say for authorisation.
        backoff: seconds before the first retry.

    Raises:
        ValueError: the URL is none of HTTP, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        batch_size: int = 16,
        max_in_flight: int = 4,
        headers: Mapping[str, str] | None = None,
        backoff: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must start with http:// or https://, got {url!r}.")
        if not (timeout > 0 and retries >= 0 and batch_size >= 1 and max_in_flight >= 1 and backoff >= 0):
            raise ValueError(
                "`timeout` must be positive, `retries` and `backoff` at least 0, `batch_size` and `max_in_flight` at "
                f"least 1; got {timeout}, {retries}, {backoff}, {batch_size} and {max_in_flight}."
            )
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.batch_size = batch_size
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.backoff = backoff
        self._workers = ThreadPoolExecutor(max_in_flight, thread_name_prefix="reward")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.submit(images, prompts, metadata)()

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Callable[[], Tensor]:
        """Send the requests off; the function returned waits for the rewards, `(B,)`.

        It raises `RemoteRewardError` if a request failed for good.
        """
        pixels = (images.detach() * 255).round().to("cpu", torch.uint8)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(pixels), self.batch_size)]
        pending: list[Future[list[float]]] = [
            self._workers.submit(self._request, pixels[part], list(prompts[part]), list(metadata[part]))
            for part in parts
        ]
        return lambda: torch.tensor([reward for future in pending for reward in future.result()])

    def _request(self, pixels: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> list[float]:
        encoded = [_png(image) for image in pixels]
        body = json.dumps({"images": encoded, "prompts": prompts, "metadata": metadata}).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            answer, problem = self._post(body)
            if answer is not None:
                rewards, problem = _read(answer, len(prompts))
                if rewards is not None:
                    return rewards
        raise RemoteRewardError(
            f"The reward server {self.url} failed {self.retries + 1} times, the last time because: {problem}. Check "
            f"that it runs, or raise `timeout` ({self.timeout} s)."
        )

    def _post(self, body: bytes) -> tuple[bytes | None, str]:
        """The answer, or None and what was wrong, which may be over at the next try."""
        try:
            request = urllib.request.Request(self.url, body, self.headers, method="POST")
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read(), ""
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"it answered {error.code} {error.reason}"
            if error.code not in (408, 429) and error.code < 500:
                raise RemoteRewardError(f"The reward server {self.url} refused a request: {problem}.") from error
            return None, problem
        except (OSError, HTTPException) as error:  # no connection, a lost one, or a time-out
            return None, str(error) or type(error).__name__


def _png(image: Tensor) -> str:
    pixels = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _read(answer: bytes, count: int) -> tuple[list[float] | None, str]:
    """The rewards in an answer, or None and what is wrong with it."""
    try:
        rewards = [float(value) for value in json.loads(answer)["rewards"]]
    except (ValueError, TypeError, KeyError):
        return None, f'it must answer {{"rewards": [...]}}, and answered {answer[:80]!r}'
    if len(rewards) != count or not all(math.isfinite(reward) for reward in rewards):
        return None, f"it must answer {count} finite rewards, and answered {len(rewards)}: {rewards[:4]}"
    return rewards, ""
