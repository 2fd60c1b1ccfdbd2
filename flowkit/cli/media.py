"""Samples as files: pictures, moving pictures and sound, as bytes that are the same for the same samples."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import wave
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowkit.eval.pictures import picture
from flowkit.pipelines.sampling import as_uint8, parameters

Kind = Literal["image", "video", "sound"]
# What a kind can be written as; the first is the default.
FORMATS: dict[Kind, tuple[str, ...]] = {
    "image": ("png", "npz"),
    "video": ("webp", "gif", "mp4", "npz"),
    "sound": ("wav",),
}
_FIELDS: dict[Kind, str] = {"image": "images", "video": "frames", "sound": "audios"}


def kind(pipe: Any) -> Kind:  # noqa: ANN401
    """Returns what a pipeline makes, by the parameters of its call."""
    known = parameters(pipe).keys()
    if known & {"num_frames", "video_length", "num_videos_per_prompt", "video"}:
        return "video"
    return "sound" if any(name.startswith("audio") for name in known) else "image"


def choose_format(name: str, kind: Kind, asked: str | None) -> str:
    """Returns the file format of a run.

    Args:
        name: of the pipeline's class.
        kind: what it makes.
        asked: by the user; None means the kind's default.

    Raises:
        ValueError: for a format of another kind.
        ImportError: for mp4 without its encoder.
    """
    found = asked or FORMATS[kind][0]
    if found not in FORMATS[kind]:
        raise ValueError(f"{name} makes {kind}, which --format {found} cannot hold; choose {', '.join(FORMATS[kind])}")
    if found == "mp4" and not all(importlib.util.find_spec(module) for module in ("imageio", "imageio_ffmpeg")):
        raise ImportError(
            "--format mp4 needs imageio and its ffmpeg: pip install imageio imageio-ffmpeg; or choose --format webp"
        )
    return found


def content(output: Any, kind: Kind, indices: Sequence[int]) -> Tensor:  # noqa: ANN401
    """Returns the samples in what a pipeline returned.

    Args:
        output: of the pipeline.
        kind: what it should hold.
        indices: number of each sample, for messages.

    Returns:
        Images, uint8 (B, C, H, W); videos, uint8 (B, F, C, H, W); or sound, int16 (B, S, channels).

    Raises:
        ValueError: for another kind, and for samples that are not finite.
    """
    others = [other for other, field in _FIELDS.items() if hasattr(output, field)]
    if others and kind not in others:
        raise ValueError(f"expected {kind} from the pipeline by its parameters, got {others[0]}; call it in Python")
    values = getattr(output, _FIELDS[kind]) if others else output[0]
    if kind != "sound":
        return as_uint8(values, indices, video=kind == "video")
    x = (values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.stack(values))).float()
    broken = [i for i, sound in zip(indices, x, strict=True) if not sound.isfinite().all()]
    if broken:
        raise ValueError(f"NaN or infinity in samples {', '.join(map(str, broken[:8]))}; try --dtype float32")
    x = x[:, None] if x.ndim == 2 else x
    return (x.clamp(-1, 1) * 32767).round().to(torch.int16).transpose(1, 2)


def sampling_rate(pipe: Any) -> int:  # noqa: ANN401
    """Returns the sampling rate of a pipeline's sound in Hz.

    Raises:
        ValueError: where no component says.
    """
    for name in ("vocoder", "vae"):
        part = getattr(pipe, name, None)
        rate = getattr(part, "sampling_rate", None) or getattr(getattr(part, "config", None), "sampling_rate", None)
        if rate:
            return int(rate)
    raise ValueError(f"{type(pipe).__name__} does not say the sampling rate of its sound; call it in Python")


def encode(sample: Tensor, file_format: str, rate: int, note: Mapping[str, Any]) -> bytes:
    """Returns one sample as a file.

    Args:
        sample: from `content`, without the batch.
        file_format: "png", "webp", "gif", "mp4" or "wav".
        rate: frames a second, or Hz of sound.
        note: how it was made; PNG keeps it as JSON in a text chunk called "flowkit".
    """
    buffer = BytesIO()
    if file_format == "png":
        info = PngInfo()
        info.add_itxt("flowkit", json.dumps(note, ensure_ascii=False))
        picture(sample).save(buffer, "PNG", pnginfo=info)
    elif file_format == "wav":
        with wave.open(buffer, "wb") as sound:
            sound.setnchannels(sample.shape[1])
            sound.setsampwidth(2)
            sound.setframerate(rate)
            sound.writeframes(sample.contiguous().numpy().astype("<i2").tobytes())
    elif file_format == "mp4":
        return _mp4([picture(frame).convert("RGB") for frame in sample], rate)
    else:
        first, *rest = (picture(frame).convert("RGB") for frame in sample)
        options = {"quality": 90} if file_format == "webp" else {}
        duration = round(1000 / rate)
        first.save(buffer, file_format.upper(), save_all=True, append_images=rest, duration=duration, loop=0, **options)
    return buffer.getvalue()


def _mp4(frames: list[Image.Image], rate: int) -> bytes:
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        export_to_video(frames, str(path), fps=rate, macro_block_size=2)  # H.264 needs even sides, no more
        return path.read_bytes()


def still(path: Path) -> Image.Image:
    """Returns the picture in an image file, or the middle one of a video (of an mp4 the first)."""
    if path.suffix == ".mp4":
        import imageio  # type: ignore[import-not-found, unused-ignore]

        with imageio.get_reader(path) as reader:
            return Image.fromarray(reader.get_data(0))
    with Image.open(path) as opened:
        opened.seek(getattr(opened, "n_frames", 1) // 2)
        return opened.convert("RGB")


def whole(path: Path) -> bool:
    """Whether a file is there and looks complete from its ends: cheap, and finds what a crash or a full disk cut short."""
    if not path.is_file():
        return False
    if path.suffix == ".npz":
        return zipfile.is_zipfile(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(max(0, size - 12))
        tail = file.read()
    if path.suffix == ".png":
        return head.startswith(b"\x89PNG\r\n\x1a\n") and tail == b"\0\0\0\0IEND\xaeB`\x82"
    if path.suffix == ".gif":
        return head.startswith(b"GIF8") and tail.endswith(b";")
    if path.suffix == ".mp4":
        return head[4:8] == b"ftyp" and _whole_mp4(path, size)
    return head.startswith(b"RIFF") and size == 8 + int.from_bytes(head[4:8], "little")


def _whole_mp4(path: Path, size: int) -> bool:
    """Whether the boxes of an mp4 add up to its size, the index (moov) among them."""
    end, kinds = 0, set()
    with open(path, "rb") as file:
        while len(head := file.read(16)) >= 8:
            length = int.from_bytes(head[:4], "big")  # 1: 64 bits follow; 0: to the end of the file
            length = int.from_bytes(head[8:], "big") if length == 1 else length or size - end
            end += max(8, length)
            kinds.add(head[4:8])
            file.seek(end)
    return end == size and b"moov" in kinds
