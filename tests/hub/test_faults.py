"""What goes wrong on the way: each fault ends in one commit, or in one message and an untouched repo."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub import DiffuserPlannerPipeline, checkpoint, transfer
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.cli import main
from dmc_hub.transfer import Bundle, HubError


def flip(content: bytes) -> bytes:
    """The same size, one bit changed."""
    return bytes([*content[:-1], content[-1] ^ 1])


def bundle(seed: int = 0) -> Bundle:
    """Two small files, one of which goes through LFS."""
    weights = random.Random(seed).randbytes(2000)
    return Bundle({"config.json": b'{"seed": %d}' % seed, "sub/weights.safetensors": weights}, {"seed": seed})


def assert_holds(hub: Any, repo_id: str, expected: Bundle) -> None:
    """The head is exactly this bundle."""
    got = {name: content for name, content in hub.files(repo_id).items() if name != ".gitattributes"}
    assert got == expected.with_manifest()


def commits(hub: Any, repo_id: str, message: str) -> int:
    return sum(commit.message == message for commit in hub.repos[repo_id].commits)


PASSING: dict[str, tuple[str, dict[str, Any]]] = {
    "create 500": ("create", {"status": 500}),
    "info 503": ("info", {"status": 503}),
    "tree 500": ("tree", {"status": 500}),
    "preupload 502": ("preupload", {"status": 502}),
    "batch 504": ("batch", {"status": 504}),
    "upload 500": ("upload", {"status": 500}),
    "upload dropped": ("upload", {"drop": True}),
    "upload changed on the way": ("upload", {"content": flip}),
    "upload stalled": ("upload", {"stall": True}),
    "verify 500": ("verify", {"status": 500}),
    "commit 500": ("commit", {"status": 500}),
    "commit 429": ("commit", {"status": 429}),
    "commit 409": ("commit", {"status": 409}),
    "commit dropped": ("commit", {"drop": True}),
    "commit stalled": ("commit", {"stall": True}),
    "committed, then dropped": ("commit", {"drop": True, "after": True}),
    "committed, then 504": ("commit", {"status": 504, "after": True}),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_ends_in_one_commit(
    name: str, hub: Any, hasty: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "REQUEST_SECONDS", 0.3)
    kind, what = PASSING[name]
    hub.fail(kind, **what)
    landed = transfer.push(bundle(), "alice/x", message="ours")
    assert not hub.faults  # it did happen
    assert_holds(hub, "alice/x", bundle())
    assert commits(hub, "alice/x", "ours") == 1
    assert landed == hub.repos["alice/x"].branches["main"]


def test_a_commit_of_someone_else_in_between_is_noticed(hub: Any, hasty: list[float]) -> None:
    """They change a file that ours had not meant to touch: nothing lands that mixes the two."""
    transfer.push(bundle(0), "alice/x", message="first")
    theirs = {"notes.md": b"mine", "sub/weights.safetensors": b"other"}
    hub.fail("commit", meanwhile=lambda: hub.replace("alice/x", **theirs))
    ours = Bundle({**bundle(0).files, "config.json": b"{}"})
    transfer.push(ours, "alice/x", message="ours")
    files = hub.files("alice/x")
    assert files.pop("notes.md") == b"mine"
    assert_holds(hub, "alice/x", ours)
    assert [commit.message for commit in hub.repos["alice/x"].commits[-2:]] == ["someone else", "ours"]


def test_what_an_earlier_bundle_had_and_this_one_lacks_is_deleted(hub: Any) -> None:
    more = Bundle({**bundle().files, "old.json": b"{}"})
    transfer.push(more, "alice/x", message="more")
    hub.replace("alice/x", **{"mine.md": b"by hand"})
    transfer.push(bundle(), "alice/x", message="ours")
    assert "old.json" not in hub.files("alice/x")
    assert hub.files("alice/x")["mine.md"] == b"by hand"


def test_fifty_random_sequences_of_faults(hub: Any, hasty: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit twice, no file lost; stalls are left out, which cost time and are tested above."""
    source = random.Random(0)
    kinds = [(kind, what) for name, (kind, what) in PASSING.items() if "stalled" not in name]
    for seed in range(50):
        message = f"push {seed}"
        for kind, what in source.sample(kinds, source.randint(1, 3)):
            hub.fail(kind, **what)
        transfer.push(bundle(seed), "alice/x", message=message)
        hub.faults.clear()
        assert_holds(hub, "alice/x", bundle(seed))
        assert commits(hub, "alice/x", message) == 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [("commit", {"status": 500}), ("upload", {"drop": True}), ("upload", {"content": flip}), ("tree", {"status": 503})],
)
def test_a_lasting_fault_leaves_repo_and_folder_alone_and_says_how_to_go_on(
    kind: str,
    what: dict[str, Any],
    hub: Any,
    hasty: list[float],
    make_planner: Callable[..., Any],
    act: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fail(kind, times=10_000, **what)
    with pytest.raises(HubError, match=r"did not take the commit in 5 tries: .* repeat the push with: ") as error:
        make_planner().push_to_hub("alice/planner", private=True)
    assert list(hub.files("alice/planner")) == [".gitattributes"]
    command = shlex.split(str(error.value).partition("repeat the push with: ")[2])
    assert command[:2] == ["dmc-hub", "push"]
    kept = Path(command[command.index("--folder") + 1])
    np.testing.assert_array_equal(act(DiffuserPlannerPipeline.from_pretrained(kept)), act(make_planner()))
    hub.faults.clear()
    assert main(command[1:]) == 0
    assert hub.repos["alice/planner"].private
    np.testing.assert_array_equal(act(DiffuserPlannerPipeline.from_pretrained("alice/planner")), act(make_planner()))


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "alice/x", r"no such repo, or this token \(401\) may not use it.*hf auth login"),
        ("hf_read", "alice/x", r"this token \(403\) may not use it"),
        ("hf_write", "bob/x", r"this token \(403\) may not use it"),
    ],
)
def test_without_the_right_nothing_is_tried_twice(
    token: str, repo_id: str, message: str, hub: Any, hasty: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        transfer.push(bundle(), repo_id, message="ours")
    assert hub.requests["create"] == 1
    assert hasty == []


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "alice/x", "`alice/x` cannot be pushed to: .*hf auth login"),
        ("hf_read", "alice/x", "needs a token with the role write; this one can only read"),
        ("hf_write", "bob/x", "`bob/x` is not yours to write: this token is for alice"),
        ("hf_write", "lab/x", "`lab/x` is not yours to write"),
        ("hf_write", "planner", "lacks the user or organisation: it must be `user/name`"),
        ("hf_write", "alice/a b", "`repo_id` 'alice/a b' is not the name of a repo"),
    ],
)
def test_align_finds_out_before_it_trains(
    token: str,
    repo_id: str,
    message: str,
    hub: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    run = tmp_path / "run"
    assert main(["align", "--task", "nav1d-full", "--output-dir", str(run), "--push-to-hub", repo_id]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not run.exists()
    assert hub.repos == {}


def test_the_check_passes_for_ones_own_name_and_creates_nothing(hub: Any) -> None:
    transfer.check_access("alice/new")
    assert hub.repos == {}


def test_offline_a_push_says_so(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for attempt in (lambda: transfer.check_access("alice/x"), lambda: transfer.push(bundle(), "alice/x", message="m")):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            attempt()


# Downloads


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("info", {"status": 500}),
        ("head", {"status": 500}),
        ("download", {"status": 503}),
        ("download", {"drop": True}),
        ("download", {"content": flip}),
    ],
)
def test_a_passing_fault_of_a_download_is_overcome(
    kind: str, what: dict[str, Any], hub: Any, hasty: list[float]
) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    if "content" in what:  # of weights: a changed manifest is another test's
        transfer.fetch("alice/x", wanted=lambda name: False)
    hub.fail(kind, **what)
    snapshot = transfer.fetch("alice/x")
    assert not hub.faults
    for name, content in bundle().files.items():
        assert (snapshot.folder / name).read_bytes() == content


def test_a_file_that_stays_wrong_is_refused_by_name(hub: Any, hasty: list[float]) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    hub.files("alice/x")["sub/weights.safetensors"] = flip(hub.files("alice/x")["sub/weights.safetensors"])
    with pytest.raises(CheckpointError, match=r"sub/weights\.safetensors is not the file that the manifest lists"):
        transfer.fetch("alice/x")


def test_a_damaged_copy_on_this_machine_is_replaced(hub: Any) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    path = transfer.fetch("alice/x").folder / "sub" / "weights.safetensors"
    path.resolve().write_bytes(flip(path.read_bytes()))
    fetched = transfer.fetch("alice/x").folder / "sub" / "weights.safetensors"
    assert fetched.read_bytes() == bundle().files["sub/weights.safetensors"]


def test_a_manifest_that_was_changed_is_refused(hub: Any) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    changed = hub.files("alice/x")["manifest.json"].replace(b'"seed": 0', b'"seed": 1')
    hub.replace("alice/x", **{"manifest.json": changed})
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        transfer.fetch("alice/x")


def test_a_repo_without_a_manifest_is_not_used(hub: Any) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    hub.replace("alice/x", **{"manifest.json": None})
    with pytest.raises(HubError, match=r"`alice/x` has no manifest\.json: it was not pushed by dmc_hub"):
        transfer.fetch("alice/x")


def test_all_files_are_of_one_commit(hub: Any) -> None:
    """A push in the middle of a download changes nothing of it."""
    transfer.push(bundle(0), "alice/x", message="first")
    second = {"config.json": b"{}", "sub/weights.safetensors": b"other"}

    def wanted(name: str) -> bool:
        if name == "config.json":
            hub.replace("alice/x", **second)
        return True

    snapshot = transfer.fetch("alice/x", wanted=wanted)
    assert (snapshot.folder / "sub/weights.safetensors").read_bytes() == bundle(0).files["sub/weights.safetensors"]


def test_missing_repos_and_what_was_never_downloaded_are_told_apart(hub: Any) -> None:
    with pytest.raises(HubError, match=r"`alice/nothing` cannot be read: there is no such repo"):
        transfer.fetch("alice/nothing")
    transfer.push(bundle(), "alice/x", message="ours")
    with pytest.raises(HubError, match="`alice/x` was not downloaded before"):
        transfer.fetch("alice/x", local_files_only=True)


def test_a_pull_that_fails_leaves_no_folder(hub: Any, hasty: list[float], tmp_path: Path) -> None:
    transfer.push(bundle(), "alice/x", message="ours")
    hub.files("alice/x")["sub/weights.safetensors"] += b"more"
    assert main(["pull", "--repo-id", "alice/x", "--output-dir", str(tmp_path / "pulled")]) == 2
    assert not list(tmp_path.glob("*pulled*"))
    assert checkpoint.MANIFEST_NAME in hub.files("alice/x")
