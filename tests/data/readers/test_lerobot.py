"""LeRobotDataset v3.0: several files, images in Parquet and video, and what is named when they are bad.

The layout's vectors are tested with their writer, in tests/interop/test_datasets.py.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmc_hub.data import convert, load_episodes, open_source
from dmc_hub.data.readers import lerobot
from tests.data.readers.files import steps

LENGTHS, FPS = [5, 4, 6], 10
ENDS = np.cumsum(LENGTHS)


def images() -> np.ndarray:
    """Frames of one colour each, so that a video's compression cannot confuse them."""
    levels = (np.arange(15) * 16).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (15, 32, 48, 3)).copy()


def write(folder: Path, *, video: bool = False, with_reward: bool = True) -> Path:
    """As LeRobot writes it: two files of frames, episodes whole in each, images as PNG bytes or one video per file."""
    columns: dict[str, Any] = {
        "observation.state": list(steps(15, 3)),
        "action": list(steps(15, 2)),
        "next.reward": steps(15),
        "next.done": np.isin(np.arange(15), ENDS[:2] - 1),
        "episode_index": np.repeat(np.arange(3), LENGTHS),
        "frame_index": np.concatenate([np.arange(length) for length in LENGTHS]),
        "index": np.arange(15),
        "task_index": np.zeros(15, np.int64),
    }
    if not with_reward:
        del columns["next.reward"]
    if not video:
        columns["observation.image"] = [{"bytes": png(frame), "path": None} for frame in images()]
    for number, rows in enumerate((slice(0, 9), slice(9, 15))):
        path = folder / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({name: values[rows] for name, values in columns.items()}), path)
    features = {"observation.state": ([3], "float32"), "action": ([2], "float32"), "next.reward": ([1], "float32")}
    described = {name: {"dtype": kind, "shape": shape, "names": None} for name, (shape, kind) in features.items()}
    described["observation.image"] = {"dtype": "video" if video else "image", "shape": [32, 48, 3]}
    info = {"codebase_version": "v3.0", "fps": FPS, "total_frames": 15, "total_episodes": 3, "features": described}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    episodes = {
        "episode_index": [0, 1, 2],
        "videos/observation.image/chunk_index": [0, 0, 0],
        "videos/observation.image/file_index": [0, 0, 1],
        "videos/observation.image/from_timestamp": [0.0, LENGTHS[0] / FPS, 0.0],
    }
    pd.DataFrame(episodes).to_parquet(folder / "meta/episodes/chunk-000/file-000.parquet")
    if video:
        for number, rows in enumerate((slice(0, 9), slice(9, 15))):
            write_video(folder / f"videos/observation.image/chunk-000/file-{number:03d}.mp4", images()[rows])
    return folder


def png(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def write_video(path: Path, frames: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("block_bytes", [16 << 20, 1])
def test_rows_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    pytest.importorskip("PIL", reason="images are decoded by pillow")
    monkeypatch.setattr(lerobot, "BLOCK_BYTES", block_bytes)
    episodes = load_episodes(write(tmp_path / "pen"), image_keys=("observation.image",))
    np.testing.assert_array_equal(episodes.observations, steps(15, 3))
    np.testing.assert_array_equal(episodes.actions, steps(15, 2))
    np.testing.assert_array_equal(episodes.rewards, steps(15))
    np.testing.assert_array_equal(episodes.episode_ends, ENDS)
    following = np.roll(steps(15, 3), -1, axis=0)
    following[ENDS - 1] = steps(15, 3)[ENDS - 1]
    np.testing.assert_array_equal(episodes.next_observations, following)
    assert np.flatnonzero(episodes.terminations).tolist() == [4, 8]
    assert np.flatnonzero(episodes.truncations).tolist() == [14]
    np.testing.assert_array_equal(episodes.images["observation.image"], images())


def test_video_frames_are_those_of_the_episodes(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="videos are decoded by PyAV")
    episodes = load_episodes(write(tmp_path / "pen", video=True), image_keys=("observation.image",))
    frames = episodes.images["observation.image"]
    assert frames.shape == (15, 32, 48, 3)
    assert np.abs(frames.astype(int) - images()).max() <= 6


def refuse(folder: Path, message: str, **options: Any) -> None:
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        convert(open_source(folder, "lerobot", **options), output / "data")
    assert folder.name in str(error.value)
    assert list(output.iterdir()) == [], "conversion left something behind"


def test_rewards_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="images are written by pillow")
    folder = write(tmp_path / "pen", with_reward=False)
    refuse(folder, r"lacks next.reward; it has .* Give `reward`, 'zero' or a function")
    assert not load_episodes(folder, reward="zero").rewards.any()


def test_bad_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="images are written by pillow")
    folder = write(tmp_path / "pen")
    refuse(folder, r"lacks observation.effort", observation_keys=("observation.effort",))
    refuse(folder, r"'action' is no image or video", image_keys=("action",))
    second = folder / "data/chunk-000/file-001.parquet"
    table, whole = pq.read_table(second), second.read_bytes()

    def with_column(name: str, values: Any) -> None:
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), second)

    with_column("next.reward", [0.0, np.nan, 0.0, 0.0, 0.0, 0.0])
    refuse(folder, "'next.reward' .*has NaN or infinite values .* episode 2, step 1")
    with_column("next.reward", [0.0, None, 0.0, 0.0, 0.0, 0.0])
    refuse(folder, "'next.reward' has 1 missing values")
    with_column("action", [["a", "b"]] * 6)
    refuse(folder, "the files in data/ differ in their types: .*action")
    with_column("action", [[1.0]] + [[1.0, 2.0]] * 5)
    refuse(folder, "'action' has lists of different lengths")
    with_column("action", [[1.0, 2.0, 3.0]] * 6)
    refuse(folder, r"'action' .*has the shape \(6, 3\) in episode 2")
    pq.write_table(table.drop_columns(["action"]), second)
    refuse(folder, "file-001.parquet` cannot be read: it lacks action")
    second.write_bytes(whole[: len(whole) // 2])
    refuse(folder, "file-001.parquet` is not a whole Parquet file")
    second.unlink()
    refuse(folder, "has 9 frames, its info.json says 15")
    (folder / "meta/info.json").write_text("{")
    refuse(folder, "info.json` is not JSON")
