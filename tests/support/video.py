"""mp4 back to frames, as a player would see them."""

import io

import av

from deployments.messages import Frame


def decode(video: bytes) -> list[Frame]:
    """uint8 (H, W, 3) per frame, in display order."""
    with av.open(io.BytesIO(video), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
