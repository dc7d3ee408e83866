"""Rewards over HTTP, from a real server on the loopback."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from dmc_hub.remote_rewards import HTTPReward, RemoteRewardError
from dmc_hub.text_to_image import TextToImagePolicy
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers with what `answer` makes of a request; keeps what it was sent."""

    answer: Answer
    requests: list[dict[str, Any]]
    url: str


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here.requests.append({**body, "authorization": self.headers["Authorization"]})
            status, content = here.answer(body)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())
            except OSError:
                pass  # the client has given up

        def log_message(self, *_: Any) -> None:
            pass

    here = Server(("127.0.0.1", 0), Handler)
    here.requests, here.answer = [], redness
    here.url = f"http://127.0.0.1:{here.server_port}/score"
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    here.shutdown()
    thread.join()
    here.server_close()


def redness(body: dict[str, Any]) -> tuple[int, Any]:
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in body["images"]]
    return 200, {"rewards": [float(image[:, :, 0].mean()) for image in images]}


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def ask(server: Server, count: int = 5, **options: Any) -> Tensor:
    reward = HTTPReward(server.url, **{"backoff": 0.0, **options})
    return reward(pictures(count), [str(index) for index in range(count)], [{"index": i} for i in range(count)])


def test_rewards_come_back_in_order_whatever_the_batches(server: Server) -> None:
    rewards = ask(server, batch_size=2, headers={"Authorization": "Bearer x"})
    expected = (pictures(5)[:, 0] * 255).round().mean((1, 2))
    torch.testing.assert_close(rewards, expected)
    assert sorted(request["prompts"] for request in server.requests) == [["0", "1"], ["2", "3"], ["4"]]
    assert all(request["authorization"] == "Bearer x" for request in server.requests)
    assert {facts["index"] for request in server.requests for facts in request["metadata"]} == {*range(5)}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_for_a_while_is_asked_again(server: Server, status: int) -> None:
    server.answer = lambda body: (status, {}) if len(server.requests) < 3 else redness(body)
    ask(server, retries=2)
    assert len(server.requests) == 3


def test_a_server_that_keeps_failing_or_refuses_is_given_up(server: Server) -> None:
    server.answer = lambda body: (502, {})
    with pytest.raises(RemoteRewardError, match="failed 3 times, the last time because: it answered 502"):
        ask(server, retries=2)
    server.requests.clear()
    server.answer = lambda body: (401, {})
    with pytest.raises(RemoteRewardError, match="refused a request: it answered 401"):
        ask(server)
    assert len(server.requests) == 1


def test_a_server_that_hangs_runs_into_the_time_out(server: Server) -> None:
    release = threading.Event()

    def hang(body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(30)
        return redness(body)

    server.answer = hang
    with pytest.raises(RemoteRewardError, match=r"failed 2 times, .*timed out.* raise `timeout` \(0.2 s\)"):
        ask(server, timeout=0.2, retries=1)
    release.set()


def test_no_server_is_an_error_with_the_address() -> None:
    with pytest.raises(RemoteRewardError, match=r"http://127\.0\.0\.1:9/ failed 1 times"):
        HTTPReward("http://127.0.0.1:9/", retries=0)(pictures(1), ["a"], [{}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", r"must answer {\"rewards\": \[...\]}, got b'<html>'"),
        ({"scores": [1]}, "must answer {"),
        ({"rewards": [1.0]}, r"must answer 5 finite rewards, got 1"),
        (b'{"rewards": [1, 2, 3, 4, NaN]}', "must answer 5 finite rewards, got 5"),
    ],
)
def test_useless_answers_are_refused(server: Server, content: Any, message: str) -> None:
    server.answer = lambda body: (200, content)
    with pytest.raises(RemoteRewardError, match=message):
        ask(server)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="`url` must start with http"):
        HTTPReward("ftp://example.org")
    with pytest.raises(ValueError, match="`timeout` must be positive"):
        HTTPReward("http://example.org", timeout=0)


def test_sampling_goes_on_while_rewards_are_computed(make_pipeline: Callable[[str], Any], server: Server) -> None:
    """The server answers the first micro-batch of a rollout only when the second has arrived."""
    both = threading.Barrier(2, timeout=30)
    trial_is_over = threading.Event()

    def wait_for_the_other(body: dict[str, Any]) -> tuple[int, Any]:
        if trial_is_over.is_set():
            both.wait()
        return redness(body)

    server.answer = wait_for_the_other
    policy = TextToImagePolicy(make_pipeline("sd_v"))
    config = DDPOConfig(
        max_steps=2,
        num_inference_steps=2,
        per_device_train_batch_size=4,
        group_size=2,
        batches_per_rollout=2,
        logging_steps=1,
        disable_tqdm=True,
    )

    def run(reward: Any) -> list[float]:
        policy.unload_lora()
        trainer = DDPOTrainer(
            policy, config, train_dataset=["a", "b"], reward_function=reward, peft_config=LoraConfig(r=2)
        )
        trial_is_over.set()
        trainer.train()
        return [row["grad_norm"] for row in trainer.history[:2]]

    remote = run(HTTPReward(server.url))
    local = run(lambda images, *_: (images[:, 0] * 255).round().mean((1, 2)))
    assert remote == pytest.approx(local, rel=1e-3)
