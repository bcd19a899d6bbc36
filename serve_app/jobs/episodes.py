"""Recorded episodes to compare a world model with: which there are, and one at a time as arrays.

Four layouts, each on a local path or any URL that fsspec reads:

- a directory of `NAME.npz` with `frames` and `actions`, or of `NAME.mp4` with `NAME.actions.npy`;
- a `.jsonl` file whose rows have `id`, `video` (an mp4) or `frames` (a .npy), and `actions` (numbers, or a .npy); paths
  are relative to the file;
- a `.parquet` file with columns `id`, `frames` (lists of PNG or JPEG) and `actions` (lists of lists);
- a LeRobot v3 data set: `meta/info.json`, `meta/episodes/**.parquet`, `data/**.parquet`, `videos/**.mp4`.

T actions go with 1 + T frames. A recording with as many frames as actions, as LeRobot's are, has seen no frame after
its last action; that action is left out.

Shapes: T actions, A action features, H and W pixels.
"""

import io
import json
import posixpath
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import av
import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]
Actions = NDArray[np.float32]
Layout = Literal["npz", "mp4", "jsonl", "parquet", "lerobot"]

MAX_FRAMES = 100_000
"""Of one episode: a wrong file must not fill the memory."""


class BadEpisode(Exception):
    """This episode cannot be used; the message says why. The others can."""


class BadDataset(Exception):
    """Nothing can be read there; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class EpisodeRef:
    """Where one episode is, small enough to send anywhere."""

    episode_id: str
    layout: Layout
    url: str
    """Its file, or the root of a LeRobot data set."""
    row: int = 0
    """Of a parquet file or a LeRobot data set; of a .jsonl file the byte at which its line begins."""
    camera: str = ""
    """Of a LeRobot data set; empty takes its first."""


@dataclass(frozen=True, slots=True)
class Episode:
    episode_id: str
    frames: Frames
    """(1 + T, H, W, 3), RGB."""
    actions: Actions
    """(T, A)."""


def list_episodes(url: str, camera: str = "") -> list[EpisodeRef]:
    """All episodes at `url`, in a fixed order; of two with the same id the second is `ID~2`. Raises BadDataset."""
    try:
        return _distinct(_list_episodes(url, camera))
    except BadDataset:
        raise
    except Exception as error:  # each kind of store raises its own
        raise BadDataset(f"{url} cannot be read: {type(error).__name__}: {error}") from error


def _list_episodes(url: str, camera: str) -> list[EpisodeRef]:
    fs, path = fsspec.core.url_to_fs(url)
    path = path.rstrip("/")
    if path.endswith(".jsonl"):
        return list(_list_jsonl(fs, path, url))
    if path.endswith(".parquet"):
        return list(_list_parquet(fs, path, url))
    if fs.exists(f"{path}/meta/info.json"):
        return list(_list_lerobot(fs, path, url, camera))
    if fs.isdir(path):
        return list(_list_directory(fs, path, url))
    raise BadDataset(f"{url} is neither a directory of episodes, nor .jsonl, nor .parquet, nor a LeRobot v3 data set")


def _distinct(refs: Sequence[EpisodeRef]) -> list[EpisodeRef]:
    counts: Counter[str] = Counter()
    names: set[str] = set()
    distinct = []
    for ref in refs:
        name = ref.episode_id
        while name in names:
            counts[ref.episode_id] += 1
            name = f"{ref.episode_id}~{1 + counts[ref.episode_id]}"
        names.add(name)
        distinct.append(replace(ref, episode_id=name))
    return distinct


def load_episode(ref: EpisodeRef) -> Episode:
    """Raises BadEpisode."""
    try:
        frames, actions = _LOADERS[ref.layout](ref)
    except BadEpisode:
        raise
    except Exception as error:  # decoders raise many kinds on broken files; each costs its episode
        raise BadEpisode(f"{type(error).__name__}: {error}") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise BadEpisode(f"frames are {frames.dtype} {frames.shape}; uint8 (1 + T, H, W, 3) is expected")
    if actions.ndim != 2 or not np.issubdtype(actions.dtype, np.floating):
        raise BadEpisode(f"actions are {actions.dtype} {actions.shape}; float (T, A) is expected")
    if not np.isfinite(actions).all():
        raise BadEpisode("actions hold NaN or infinity")
    if len(frames) == len(actions):
        actions = actions[:-1]
    if len(frames) != len(actions) + 1 or len(actions) == 0:
        raise BadEpisode(f"{len(frames)} frames do not go with {len(actions)} actions; one frame more is expected")
    return Episode(ref.episode_id, np.ascontiguousarray(frames), np.ascontiguousarray(actions, np.float32))


def _list_directory(fs: Any, path: str, url: str) -> Iterator[EpisodeRef]:
    root = url.rstrip("/")
    names = sorted(posixpath.basename(each["name"]) for each in fs.ls(path, detail=True) if each["type"] == "file")
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix == ".npz":
            yield EpisodeRef(stem, "npz", f"{root}/{name}")
        elif suffix == ".mp4":
            yield EpisodeRef(stem, "mp4", f"{root}/{name}")


def _list_jsonl(fs: Any, path: str, url: str) -> Iterator[EpisodeRef]:
    offset = 0
    with fs.open(path, "rb") as file:
        for index, line in enumerate(file):
            if line.strip():
                try:
                    row = json.loads(line)
                    name = str(row.get("id", index)) if isinstance(row, dict) else str(index)
                except ValueError:
                    name = str(index)  # listed as bad when it is loaded, with the reason
                yield EpisodeRef(name, "jsonl", url, offset)
            offset += len(line)


def _list_parquet(fs: Any, path: str, url: str) -> Iterator[EpisodeRef]:
    from pyarrow import parquet

    with fs.open(path, "rb") as file:
        table = parquet.ParquetFile(file)
        names = table.read(columns=["id"]).column("id").to_pylist() if "id" in table.schema_arrow.names else None
        for index in range(table.metadata.num_rows):
            yield EpisodeRef(str(names[index]) if names else str(index), "parquet", url, index)


def _list_lerobot(fs: Any, path: str, url: str, camera: str) -> Iterator[EpisodeRef]:
    with fs.open(f"{path}/meta/info.json") as file:
        info = json.load(file)
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    chosen = camera or (cameras[0] if cameras else "")
    if chosen not in cameras:
        raise BadDataset(f"{url} has no camera {camera!r}; it has {', '.join(cameras) or 'none'}")
    for row in _lerobot_episodes(fs, path):
        yield EpisodeRef(f"{row['episode_index']:06d}", "lerobot", url.rstrip("/"), int(row["episode_index"]), chosen)


def _lerobot_episodes(fs: Any, path: str, index: int | None = None) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for file_path in sorted(fs.glob(f"{path}/meta/episodes/**/*.parquet")):
        with fs.open(file_path, "rb") as file:
            filters = None if index is None else [("episode_index", "=", index)]
            rows += parquet.read_table(file, filters=filters).to_pylist()
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _load_npz(ref: EpisodeRef) -> tuple[Frames, Actions]:
    with fsspec.open(ref.url, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise BadEpisode("it is no .npz archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            for name in ("frames", "actions"):
                if name not in arrays.files:
                    raise BadEpisode(f"it has no `{name}`; it has {', '.join(arrays.files) or 'nothing'}")
            return arrays["frames"], arrays["actions"]


def _load_mp4(ref: EpisodeRef) -> tuple[Frames, Actions]:
    return _read_video(ref.url), _read_npy(ref.url.removesuffix(".mp4") + ".actions.npy")


def _load_jsonl(ref: EpisodeRef) -> tuple[Frames, Actions]:
    with fsspec.open(ref.url, "rb") as file:
        file.seek(ref.row)
        line = file.readline()
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadEpisode(f"its line is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadEpisode("its line is no JSON object")
    root = ref.url.rsplit("/", 1)[0]
    if "video" in row:
        frames = _read_video(f"{root}/{row['video']}")
    elif "frames" in row:
        frames = _read_npy(f"{root}/{row['frames']}")
    else:
        raise BadEpisode("its line has neither `video` nor `frames`")
    actions = row.get("actions")
    if isinstance(actions, str):
        return frames, _read_npy(f"{root}/{actions}")
    return frames, np.asarray(actions, np.float32)


def _load_parquet(ref: EpisodeRef) -> tuple[Frames, Actions]:
    from pyarrow import parquet

    with fsspec.open(ref.url, "rb") as file:
        table = parquet.ParquetFile(file)
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if ref.row < first + rows:
                row = table.read_row_group(group).slice(ref.row - first, 1).to_pylist()[0]
                break
            first += rows
    frames = np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in row["frames"]])
    return frames, np.asarray(row["actions"], np.float32)


def _load_lerobot(ref: EpisodeRef) -> tuple[Frames, Actions]:
    from pyarrow import parquet

    fs, path = fsspec.core.url_to_fs(ref.url)
    path = path.rstrip("/")
    with fs.open(f"{path}/meta/info.json") as file:
        info = json.load(file)
    (episode,) = _lerobot_episodes(fs, path, ref.row)
    data = info["data_path"].format(chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"])
    with fs.open(f"{path}/{data}", "rb") as file:
        table = parquet.read_table(file, columns=["action"], filters=[("episode_index", "=", ref.row)])
    actions = np.asarray(table.column("action").to_pylist(), np.float32)
    of_video = f"videos/{ref.camera}"
    video = info["video_path"].format(
        video_key=ref.camera,
        chunk_index=episode[f"{of_video}/chunk_index"],
        file_index=episode[f"{of_video}/file_index"],
    )
    from_s = float(episode[f"{of_video}/from_timestamp"])
    return _read_video(f"{ref.url}/{video}", from_s, len(actions), 0.5 / info["fps"]), actions


def _read_npy(url: str) -> NDArray[Any]:
    with fsspec.open(url, "rb") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_video(url: str, from_s: float = 0.0, count: int = MAX_FRAMES, early_s: float = 0.0) -> Frames:
    """The frames from `from_s` less `early_s` on, at most `count`. What is before the last key frame is not decoded."""
    frames: list[Frames] = []
    with fsspec.open(url, "rb") as file, av.open(file) as container:
        stream = container.streams.video[0]
        if from_s and stream.time_base is not None:
            container.seek(int(from_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if from_s and (frame.time is None or frame.time < from_s - early_s):
                continue
            if len(frames) == count:
                break
            frames.append(frame.to_ndarray(format="rgb24"))
    if not frames:
        raise BadEpisode(f"{url} has no frame at {from_s:.3f} s")
    return np.stack(frames)


_LOADERS = {
    "npz": _load_npz,
    "mp4": _load_mp4,
    "jsonl": _load_jsonl,
    "parquet": _load_parquet,
    "lerobot": _load_lerobot,
}
