"""What a hostile or damaged repo holds is refused with a message, and nothing of it runs or leaves its folder."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from dmc_hub import DiffuserPlannerPipeline, checkpoint, portable, transfer
from dmc_hub.cli import main
from dmc_hub.control_pipeline import ControlPipeline
from dmc_hub.hub import load_pipeline
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.publish import kind_of, publish
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.transfer import Bundle

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


@pytest.fixture
def planner_repo(hub: Any, make_planner: Callable[..., Any]) -> dict[str, bytes]:
    """Files of the repo alice/planner, to be changed."""
    make_planner().push_to_hub("alice/planner")
    return hub.files("alice/planner")


def sign(files: dict[str, bytes]) -> None:
    """Make the manifest list what is there now, as a hostile owner can."""
    records = {n: transfer._record(c) for n, c in sorted(files.items()) if n not in (".gitattributes", "manifest.json")}
    files["manifest.json"] = checkpoint.manifest_text(checkpoint.Manifest("0.1.0", records, {})).encode()


def edit_json(files: dict[str, bytes], name: str, **changed: Any) -> None:
    files[name] = json.dumps({**json.loads(files[name]), **changed}).encode()


def index_facts(files: dict[str, bytes], **changed: Any) -> None:
    facts = json.loads(files["model_index.json"])["_dmc_hub"]
    edit_json(files, "model_index.json", _dmc_hub={**facts, **changed})


def own_component(files: dict[str, bytes]) -> None:
    files["denoiser/evil.py"] = b"1 / 0"
    edit_json(files, "model_index.json", denoiser=["evil", "X"])


def component_above(files: dict[str, bytes]) -> None:
    index = json.loads(files["model_index.json"])
    files["model_index.json"] = json.dumps({**index, "../denoiser": ["diffusers", "UNet1DModel"]}).encode()


def oversized_header() -> bytes:
    """A file that says its header has 17 MB, and has it."""
    length = 17 << 20
    return struct.pack("<Q", length) + b"{" + b" " * (length - 2) + b"}"


def without_tensor(content: bytes) -> bytes:
    tensors = load(content)
    tensors.pop(sorted(tensors)[0])
    return save(tensors)


def with_nan(content: bytes) -> bytes:
    tensors = load(content)
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    return save(tensors)


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "a pickle": (
        lambda f: f.update({"denoiser/diffusion_pytorch_model.bin": f.pop(WEIGHTS)}),
        "'denoiser/diffusion_pytorch_model.bin' is not a file that a repo of dmc_hub holds",
    ),
    "a pickled training state": (lambda f: f.update({"training_args.bin": b""}), "'training_args.bin' is not a file"),
    "a hidden file": (lambda f: f.update({".env.json": b"{}"}), "'.env.json' is not a file"),
    "a name above": (lambda f: f.update({"../evil.json": b"{}"}), "names a file outside its folder: '../evil.json'"),
    "a name above, below": (lambda f: f.update({"a/../../evil.json": b"{}"}), "names a file outside its folder"),
    "an absolute name": (lambda f: f.update({"/evil.json": b"{}"}), "names a file outside its folder: '/evil.json'"),
    "a name with backslashes": (lambda f: f.update({"..\\evil.json": b"{}"}), "names a file outside its folder"),
    "a name with a drive": (lambda f: f.update({"C:evil.json": b"{}"}), "names a file outside its folder"),
    "a long header": (lambda f: f.update({WEIGHTS: oversized_header()}), "has a header of 17825792 bytes"),
    "a truncated header": (lambda f: f.update({WEIGHTS: f[WEIGHTS][:50]}), "is damaged: it ends within its header"),
    "too few weights": (lambda f: f.update({WEIGHTS: without_tensor(f[WEIGHTS])}), "it lacks"),
    "too many weights": (
        lambda f: f.update({WEIGHTS: save({**load(f[WEIGHTS]), "x": torch.ones(1)})}),
        r"has the unknown \['x'\]",
    ),
    "NaN weights": (lambda f: f.update({WEIGHTS: with_nan(f[WEIGHTS])}), "holds NaN or infinite weights"),
    "no weights": (lambda f: f.pop(WEIGHTS), "no file named|does not|not find"),
    "an unknown setting": (
        lambda f: edit_json(f, "denoiser/config.json", attention="linear"),
        "has settings that TemporalUnet of dmc_hub .* does not know: attention",
    ),
    "an enormous network": (
        lambda f: edit_json(f, "denoiser/config.json", dim=10**9),
        "has dim=1000000000, more than a network of dmc_hub has",
    ),
    "a setting of the wrong kind": (
        lambda f: edit_json(f, "denoiser/config.json", dim="eight"),
        "'dim' must be int, got 'eight'",
    ),
    "a long configuration": (
        lambda f: edit_json(f, "denoiser/config.json", dim_mults=[1] * 600_000),
        "more than a configuration has",
    ),
    "a deep index": (lambda f: f.update({"model_index.json": b"[" * 100_000}), "is not JSON"),
    "no object": (lambda f: f.update({"model_index.json": b"[]"}), "holds a list instead of an object"),
    "code of its own as the pipeline": (
        lambda f: edit_json(f, "model_index.json", _class_name=["evil", "DiffuserPlannerPipeline"]),
        r"holds a DiffuserPlannerPipeline of the repo's own evil\.py",
    ),
    "code of its own as a component": (
        own_component,
        "the component denoiser is a X of evil, which is neither of dmc_hub nor",
    ),
    "a module of Python as a component": (
        lambda f: edit_json(f, "model_index.json", denoiser=["subprocess", "Popen"]),
        "the component denoiser is a Popen of subprocess, which is neither",
    ),
    "another module of ours": (
        lambda f: edit_json(f, "model_index.json", denoiser=["dmc_hub.cli", "Command"]),
        "needs Command of dmc_hub.cli, which dmc_hub .* does not have",
    ),
    "what a module of ours imports": (
        lambda f: edit_json(f, "model_index.json", denoiser=["dmc_hub.models.dit", "ModelMixin"]),
        "needs ModelMixin of dmc_hub.models.dit",
    ),
    "a component above the folder": (component_above, "is not a pipeline's index: '../denoiser'"),
    "a newer format": (
        lambda f: index_facts(f, format=2, version="9.9"),
        r"has format 2, written by dmc_hub 9\.9; this is dmc_hub .*, which reads format 1: upgrade dmc_hub",
    ),
    "an older format": (
        lambda f: index_facts(f, format=0, version="0.0.1"),
        r"has format 0, written by dmc_hub 0\.0\.1; .*: load it with that version, and save it again",
    ),
    "no format": (lambda f: index_facts(f, format="one"), "does not say which format of dmc_hub it has"),
    "a class that is not there": (
        lambda f: edit_json(f, "model_index.json", denoiser=["dmc_hub_new_net_01234567", "NewNet"]),
        r"needs NewNet of dmc_hub\.models\.new_net, which dmc_hub .* does not have; it was written by dmc_hub",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pipeline_is_refused(
    case: str, planner_repo: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, message = HOSTILE[case]
    change(planner_repo)
    sign(planner_repo)
    with pytest.raises((ValueError, OSError), match=message):
        load_pipeline("alice/planner")
    assert not list(tmp_path.rglob("*evil*"))
    assert main(["pull", "--repo-id", "alice/planner", "--output-dir", str(tmp_path / "a" / "pulled")]) in (0, 2)
    assert not [path for path in tmp_path.rglob("*evil.json") if (tmp_path / "a" / "pulled") not in path.parents]


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_pickle_in_a_folder_never_runs(
    name: str, listed: bool, make_planner: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    with checkpoint.write_folder_atomically(folder) as stage:
        make_planner().save_pretrained(stage)
        if listed:
            (stage / WEIGHTS).unlink()
            (stage / "denoiser" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    if not listed:
        (folder / "denoiser" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    message = "no file named" if listed else f"files that its manifest does not list: denoiser/{name}"
    with pytest.raises((ValueError, OSError), match=message):
        load_pipeline(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # so it would have run


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes replaced, inserted or cut."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(result) - 1, 0)))
        result[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(result)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, whose files are rewritten again and again."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    DiffuserPlannerPipeline(
        TemporalUnet(4, dim=8, dim_mults=(1, 2)),
        TransitionScheduler(10),
        Normalizer.from_data(np.repeat(ends, 3, 1), ends),
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["model_index.json", "denoiser/config.json", "scheduler/scheduler_config.json", WEIGHTS]
)
def test_damaged_files_give_our_errors_only(name: str, saved: Path) -> None:
    path = saved / name
    content = path.read_bytes()
    beginning, rest = content[:4000], content[4000:]

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(damaged(beginning))
    def read(changed: bytes) -> None:
        path.write_bytes(changed + rest)
        with suppress(portable.UnreadableRepoError):
            portable.check_loadable(saved, ["DiffuserPlannerPipeline"], trust_remote_code=False)

    try:
        read()
    finally:
        path.write_bytes(content)


def test_a_huge_manifest_is_not_read(planner_repo: dict[str, bytes]) -> None:
    planner_repo["manifest.json"] += b" " * (5 << 20)
    with pytest.raises(ValueError, match=r"`alice/planner` has a manifest\.json of \d+ bytes: it is not read"):
        load_pipeline("alice/planner")


# Adapters


def adapter_state(files: dict[str, bytes], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the adapter and keep its metadata."""
    path = tmp_path / "weights"
    path.write_bytes(files["adapter_model.safetensors"])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load(files["adapter_model.safetensors"])
    change(state)
    save_file(state, path, metadata=metadata)
    files["adapter_model.safetensors"] = path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"evil.lora_A.weight": torch.ones(2, 2)}), "unknown key evil.lora_A.weight"),
        (lambda state: [t.fill_(float("nan")) for t in state.values()], "is not finite"),
        (lambda state: [t.fill_(float("inf")) for t in state.values()], "is not finite"),
    ],
)
def test_a_hostile_adapter_is_refused(
    change: Callable[..., Any],
    message: str,
    hub: Any,
    make_planner: Callable[..., Any],
    adapt: Callable[..., Any],
    tmp_path: Path,
) -> None:
    adapt(make_planner()).push_lora_to_hub("alice/lora")
    files = hub.files("alice/lora")
    adapter_state(files, tmp_path, change)
    sign(files)
    planner = make_planner()
    with pytest.raises(ValueError, match=f"does not fit this denoiser: .*{message}"):
        planner.load_lora_weights("alice/lora")
    assert planner.lora_names == []
    files["adapter_model.safetensors"] = oversized_header()
    sign(files)
    hub.replace("alice/lora")
    with pytest.raises(ValueError, match="has a header of 17825792 bytes"):
        planner.load_lora_weights("alice/lora")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "../x"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    name: str, hub: Any, make_planner: Callable[..., Any]
) -> None:
    for attempt in (load_pipeline, make_planner().load_lora_weights):
        with pytest.raises(FileNotFoundError, match="is neither a folder nor the name of a repo"):
            attempt(name)
    assert hub.requests.total() == 0


# What is pushed


def test_only_what_belongs_to_it_is_pushed(
    hub: Any, make_planner: Callable[..., Any], adapt: Callable[..., Any], tmp_path: Path
) -> None:
    secrets = [".env", "token.txt", "notes.md", "denoiser/.env", "denoiser/.hidden.json", "denoiser/optimizer.bin"]
    secrets += ["wandb/settings.json", "secret.json", "other.py", "weights.safetensors"]
    planner = make_planner()
    planner.save_pretrained(tmp_path / "pipeline")
    adapt(planner).save_lora_weights(tmp_path / "adapter")
    for folder in ("pipeline", "adapter"):
        for name in secrets:
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("hf_secret")
        publish(tmp_path / folder, f"alice/{folder}")
        assert not set(hub.files(f"alice/{folder}")) & set(secrets)
        assert not [name for name, content in hub.files(f"alice/{folder}").items() if b"hf_secret" in content]
        assert not [name for name, content in hub.files(f"alice/{folder}").items() if str(tmp_path).encode() in content]
    load_pipeline("alice/pipeline").load_lora_weights("alice/adapter")


def test_a_path_of_this_machine_does_not_travel(hub: Any, make_planner: Callable[..., Any], tmp_path: Path) -> None:
    make_planner().save_pretrained(tmp_path / "secret-place")
    load_pipeline(tmp_path / "secret-place").push_to_hub("alice/planner")
    assert not [name for name, content in hub.files("alice/planner").items() if b"secret-place" in content]


@pytest.mark.parametrize("name", [WEIGHTS, "denoiser/config.json", "denoiser/link.json"])
def test_a_symlink_is_not_pushed(name: str, hub: Any, make_planner: Callable[..., Any], tmp_path: Path) -> None:
    make_planner().save_pretrained(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / name
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("{}")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"`{path}` is a symlink: what it points to is not pushed"):
        publish(tmp_path / "pipeline", "alice/planner")
    assert hub.requests.total() == 0


def test_what_was_changed_after_it_was_saved_is_not_pushed(
    hub: Any, make_planner: Callable[..., Any], tmp_path: Path
) -> None:
    with checkpoint.write_folder_atomically(tmp_path / "pipeline") as stage:
        make_planner().save_pretrained(stage)
    path = tmp_path / "pipeline" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="was changed: its sha256 is not the one in the manifest"):
        publish(tmp_path / "pipeline", "alice/planner")
    assert hub.requests.total() == 0


class Homemade(ControlPipeline):
    """A user's own pipeline, whose code is not ours to publish."""


def test_code_that_does_not_travel_is_not_pushed(hub: Any, make_planner: Callable[..., Any], tmp_path: Path) -> None:
    make_planner().save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    (tmp_path / "pipeline" / "manifest.json").unlink()
    saved = json.loads(index.read_text())
    for changed, message in (
        ({"_class_name": "Homemade"}, "was saved without its code"),
        ({"denoiser": ["my.module", "Net"]}, r"denoiser is a Net of my\.module, whose code does not travel"),
    ):
        index.write_text(json.dumps({**saved, **changed}))
        with pytest.raises(ValueError, match=message):
            publish(tmp_path / "pipeline", "alice/planner")
    assert hub.requests.total() == 0


def test_what_is_nothing_of_ours_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to push"):
        kind_of(tmp_path)
    with pytest.raises(ValueError, match=r"'a\.bin' is not a file that a repo of dmc_hub holds"):
        Bundle({"a.bin": b""}).with_manifest()
    with pytest.raises(ValueError, match="is missing or no regular file"):
        Bundle({"a.json": tmp_path}).with_manifest()


def test_info_says_what_is_wrong(hub: Any, planner_repo: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    planner_repo["model.pkl"] = b"not listed"
    assert main(["info", "--source", "alice/planner"]) == 0
    assert "not in the manifest, never used: model.pkl" in capsys.readouterr().out
    edit_json(planner_repo, "model_index.json", denoiser=["subprocess", "Popen"])
    planner_repo["README.md"] = b"---\n[broken\n---\n\x1b[2Jhello"
    del planner_repo["model.pkl"]
    sign(planner_repo)
    hub.replace("alice/planner")
    assert main(["info", "--source", "alice/planner"]) == 2
    captured = capsys.readouterr()
    assert "safe to load: no" in captured.out
    assert "the component denoiser is a Popen of subprocess" in captured.err
    assert "\x1b" not in captured.out
