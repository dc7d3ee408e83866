"""Rewards over HTTP, from a real server on the loopback."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from dmc_hub.joint_reward import JointReward
from dmc_hub.remote_rewards import HTTPReward, RemoteRewardError
from dmc_hub.text_to_image import TextToImagePolicy
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

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
        (b"<html>", r"must answer {\"rewards\": \[...\]}, and answered b'<html>'"),
        ({"scores": [1]}, "must answer {"),
        ({"rewards": [1.0]}, r"must answer 5 finite rewards, and answered 1"),
        (b'{"rewards": [1, 2, 3, 4, NaN]}', "must answer 5 finite rewards, and answered 5"),
    ],
)
def test_useless_answers_are_asked_for_again_and_then_refused(server: Server, content: Any, message: str) -> None:
    server.answer = lambda body: (200, content) if len(server.requests) < 3 else redness(body)
    assert ask(server, retries=2).shape == (5,)
    assert len(server.requests) == 3
    server.answer = lambda body: (200, content)
    with pytest.raises(RemoteRewardError, match=f"failed 2 times, the last time because: it {message}"):
        ask(server, retries=1)


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


def test_a_joint_reward_asks_its_server_before_it_computes_the_others(server: Server) -> None:
    """The local reward returns only when the server has the images."""
    asked = threading.Event()

    def note(body: dict[str, Any]) -> tuple[int, Any]:
        asked.set()
        return redness(body)

    def local(images: Tensor, *_: Any) -> Tensor:
        assert asked.wait(30)
        return images[:, 1].mean((1, 2))

    server.answer = note
    reward = JointReward({"local": local, "remote": HTTPReward(server.url)}, normalization="none")
    images = pictures(4)
    total = reward(images, ["a"] * 4, [{}] * 4)
    expected = (images[:, 0] * 255).round().mean((1, 2)) + images[:, 1].mean((1, 2))
    torch.testing.assert_close(total, expected)


FAULTS: dict[str, Callable[[dict[str, Any]], tuple[int, Any]]] = {
    "exception": lambda body: (500, {}),
    "NaN": lambda body: (200, b'{"rewards": [1, NaN, 2, 3]}'),
    "wrong length": lambda body: (200, {"rewards": [1.0]}),
}
METHODS: dict[str, Any] = {
    "ddpo": (DDPOTrainer, DDPOConfig, {"batches_per_rollout": 2, "epochs_per_rollout": 1}),
    "nft": (NFTTrainer, NFTConfig, {"num_conditions": 2, "steps_per_buffer": 2, "old_policy_decay_rate": 0.2}),
}


def train_with_faults(
    make_pipeline: Callable[[str], Any], server: Server, method: str, folder: str, fault: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Six steps, three rollouts, on a stream; with a fault the third fails, and the run is then resumed."""
    trainer_type, config_type, settings = METHODS[method]
    rollout_requests = {"ddpo": 2, "nft": 1}[method]

    def run(resume: bool) -> dict[str, Tensor]:
        reward = JointReward(
            {"red": HTTPReward(server.url, backoff=0.0, retries=1, **options)}, normalization="running"
        )
        config = config_type(
            max_steps=6,
            num_inference_steps=2,
            per_device_train_batch_size=4,
            group_size=2,
            lr_scheduler_type="constant",
            output_dir=folder,
            save_strategy="steps",
            save_steps=1000,
            disable_tqdm=True,
            **settings,
        )
        prompts = IterableDataset.from_generator(lambda: ({"prompt": str(number)} for number in range(50)))
        policy = TextToImagePolicy(make_pipeline("sd_v"))
        server.requests.clear()
        trainer = trainer_type(
            policy, config, train_dataset=prompts, reward_function=reward, peft_config=LoraConfig(r=2)
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in policy.denoiser.named_parameters() if "lora" in name}

    if fault is None:
        return run(resume=False)
    healthy = 1 + 2 * rollout_requests  # with the trial
    server.answer = lambda body: fault(body) if len(server.requests) > healthy else redness(body)
    with pytest.raises(RemoteRewardError, match="failed 2 times") as caught:
        run(resume=False)
    assert "checkpoint-4: go on with `resume_from_checkpoint=True`" in caught.value.__notes__[0]
    server.answer = redness
    return run(resume=True)


@pytest.mark.parametrize(
    ("method", "kind"), [("ddpo", "exception"), ("ddpo", "NaN"), ("nft", "wrong length"), ("nft", "time-out")]
)
def test_a_run_that_its_server_stops_is_kept_and_goes_on_exactly(
    make_pipeline: Callable[[str], Any], server: Server, method: str, kind: str, tmp_path: Path
) -> None:
    release = threading.Event()

    def hang(body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(30)
        return redness(body)

    whole = train_with_faults(make_pipeline, server, method, str(tmp_path / "whole"))
    fault, options = (hang, {"timeout": 0.5}) if kind == "time-out" else (FAULTS[kind], {})
    resumed = train_with_faults(make_pipeline, server, method, str(tmp_path / "parts"), fault, **options)
    release.set()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
