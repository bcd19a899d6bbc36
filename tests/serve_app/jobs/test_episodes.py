"""Every layout gives the same arrays, and a broken episode says why without costing the others."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from deployments.video import Encoder, join_chunks
from serve_app.jobs.episodes import BadDataset, BadEpisode, EpisodeRef, list_episodes, load_episode

T = 4


def episode(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat frames of one grey each, which survive a video codec, and actions."""
    greys = 20 + 40 * np.arange(T + 1) + seed
    frames = np.broadcast_to(greys[:, None, None, None], (T + 1, 32, 48, 3)).astype(np.uint8)
    return frames, np.full((T, 8), seed, np.float32)


def mp4(frames: np.ndarray) -> bytes:
    return join_chunks([Encoder(frames.shape[1:3], 10).encode(frames)], 10, len(frames))


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def write_npz(root: Path) -> str:
    for seed in range(2):
        frames, actions = episode(seed)
        np.savez(root / f"e{seed}.npz", frames=frames, actions=actions)
    return str(root)


def write_mp4(root: Path) -> str:
    for seed in range(2):
        frames, actions = episode(seed)
        (root / f"e{seed}.mp4").write_bytes(mp4(frames))
        np.save(root / f"e{seed}.actions.npy", actions)
    return str(root)


def write_jsonl(root: Path) -> str:
    rows = []
    for seed in range(2):
        frames, actions = episode(seed)
        np.save(root / f"f{seed}.npy", frames)
        rows.append({"id": f"e{seed}", "frames": f"f{seed}.npy", "actions": actions.tolist()})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"file://{root}/rows.jsonl"


def write_parquet(root: Path) -> str:
    made = [episode(seed) for seed in range(2)]
    table = pyarrow.table(
        {
            "id": ["e0", "e1"],
            "frames": [[png(frame) for frame in frames] for frames, _ in made],
            "actions": [actions.tolist() for _, actions in made],
        }
    )
    parquet.write_table(table, root / "rows.parquet", row_group_size=1)
    return str(root / "rows.parquet")


def write_lerobot(root: Path) -> str:
    """Two episodes of T + 1 steps in one data file and one video, as LeRobot's writer joins them."""
    steps, made = T + 1, [episode(seed) for seed in range(2)]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "videos/camera.front/chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {"action": {"dtype": "float32"}, "camera.front": {"dtype": "video"}},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    rows = [
        {
            "episode_index": index,
            "length": steps,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "videos/camera.front/chunk_index": 0,
            "videos/camera.front/file_index": 0,
            "videos/camera.front/from_timestamp": index * steps / 10,
            "videos/camera.front/to_timestamp": (index + 1) * steps / 10,
        }
        for index in range(2)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    actions = [np.concatenate([actions, actions[-1:]]) for _, actions in made]
    data = {
        "episode_index": np.repeat([0, 1], steps),
        "frame_index": np.tile(np.arange(steps), 2),
        "action": np.concatenate(actions).tolist(),
    }
    parquet.write_table(pyarrow.table(data), root / "data/chunk-000/file-000.parquet")
    video = mp4(np.concatenate([frames for frames, _ in made]))
    (root / "videos/camera.front/chunk-000/file-000.mp4").write_bytes(video)
    return str(root)


@pytest.mark.parametrize("write", [write_npz, write_mp4, write_jsonl, write_parquet, write_lerobot])
def test_every_layout_gives_the_recorded_frames_and_actions(write: object, tmp_path: Path) -> None:
    refs = list_episodes(write(tmp_path))  # type: ignore[operator]
    assert len(refs) == 2
    for seed, ref in enumerate(refs):
        frames, actions = episode(seed)
        loaded = load_episode(ref)
        np.testing.assert_allclose(loaded.frames.astype(int), frames.astype(int), atol=3)
        np.testing.assert_array_equal(loaded.actions, actions)
        assert loaded.actions.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"frames": np.zeros((5, 8, 8, 3), np.uint8), "actions": np.zeros((9, 2), np.float32)}, "5 frames do not go"),
        ({"frames": np.zeros((5, 8, 8), np.uint8), "actions": np.zeros((4, 2), np.float32)}, "uint8 \\(1 \\+ T"),
        ({"frames": np.zeros((5, 8, 8, 3)), "actions": np.zeros((4, 2), np.float32)}, "float64"),
        ({"frames": np.zeros((5, 8, 8, 3), np.uint8), "actions": np.full((4, 2), np.nan, np.float32)}, "NaN"),
        ({"frames": np.zeros((5, 8, 8, 3), np.uint8)}, "actions"),
        ({"frames": np.array([{}]), "actions": np.zeros((4, 2), np.float32)}, "pickle"),
    ],
)
def test_an_unusable_episode_says_why(arrays: dict[str, np.ndarray], why: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(BadEpisode, match=why):
        load_episode(list_episodes(str(tmp_path))[0])


def test_broken_rows_and_files_cost_their_episode_only(tmp_path: Path) -> None:
    url = write_jsonl(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('\nnot json\n[1]\n{"id": "lost", "frames": "lost.npy", "actions": []}\n')
    refs = list_episodes(url)
    assert [ref.episode_id for ref in refs] == ["e0", "e1", "2", "3", "lost"]
    for ref in refs[2:]:
        with pytest.raises(BadEpisode):
            load_episode(ref)


def test_a_video_of_a_data_set_that_is_cut_short_is_a_bad_episode(tmp_path: Path) -> None:
    write_lerobot(tmp_path)
    video = tmp_path / "videos/camera.front/chunk-000/file-000.mp4"
    video.write_bytes(mp4(episode(0)[0]))
    with pytest.raises(BadEpisode, match=r"has no frame at 0\.500 s"):
        load_episode(EpisodeRef("000001", "lerobot", str(tmp_path), 1, "camera.front"))


@pytest.mark.parametrize("name", ["nothing", "notes.txt"])
def test_what_holds_no_data_set_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadDataset):
        list_episodes(str(tmp_path / name))


def test_a_camera_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"camera\.front"):
        list_episodes(write_lerobot(tmp_path), camera="wrist")


def test_two_episodes_of_one_name_are_both_there(tmp_path: Path) -> None:
    write_npz(tmp_path)
    write_mp4(tmp_path)
    refs = list_episodes(str(tmp_path))
    assert sorted(ref.episode_id for ref in refs) == ["e0", "e0~2", "e1", "e1~2"]
    assert len({(ref.url, ref.row) for ref in refs}) == 4


def test_a_broken_part_of_a_parquet_file_costs_its_episodes_and_a_cut_off_file_the_data_set(tmp_path: Path) -> None:
    url = write_parquet(tmp_path)
    file = tmp_path / "rows.parquet"
    chunk = parquet.ParquetFile(file).metadata.row_group(1).column(1)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 40] = bytes(40)
    file.write_bytes(content)
    first, second = list_episodes(url)
    assert len(load_episode(first).actions) == T
    with pytest.raises(BadEpisode):
        load_episode(second)
    file.write_bytes(content[:-20])
    with pytest.raises(BadDataset, match="cannot be read"):
        list_episodes(url)
