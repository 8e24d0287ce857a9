"""Frames <-> video files: H.264 in mp4 with the settings that made it, and GIF, WebP and PNG for documents.

A file appears under its name only when it is whole: it is encoded in memory, written beside its place, synced, renamed.
"""

import contextlib
import fractions
import io
import json
import os
import pathlib
import re
from collections.abc import Generator, Mapping

import av
import av.error
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from x2v_jax import shipped
from x2v_jax.checkpoint.files.atomic import complete_file
from x2v_jax.checkpoint.files.json_file import is_json_object
from x2v_jax.errors import UserError
from x2v_jax.media.frames import NoVideoStream, decoded_frames

Path = str | os.PathLike[str]

# x264's scale: 18 is held to be visually lossless, and 17 leaves a margin for the flat areas and slow gradients that
# generated video is full of. LightX2V's quality 8 is about 10, at three times the size with no visible gain.
CRF = 17
_MIN_LOOKAHEAD_SIZE = 128  # pixels
_METADATA_KEY = "comment"  # one of the few tags that mp4 players and editors keep


def encode_video(
    frames: np.ndarray, fps: float, metadata: Mapping[str, object] | None = None, *, movflags: str = ""
) -> bytes:
    """An mp4 as bytes: H.264, yuv420p, BT.709.

    The same frames and metadata give the same bytes: no time of day is written.

    Args:
        frames: uint8 [F, H, W, 3], height and width even (yuv420p halves the colour planes).
        fps: frames a second.
        metadata: JSON values, stored in the file's `comment` tag.
        movflags: FFmpeg's flags of that name for another layout of the mp4.

    Raises:
        UserError: the frames or fps cannot be made into a video.
    """
    _check(frames, fps)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": movflags} if movflags else {}) as container:
        if metadata is not None:
            container.metadata[_METADATA_KEY] = _json(metadata)
        # A fixed number: by default it follows the machine's cores, and with it the bytes.
        options = {"crf": str(CRF), "preset": "medium", "threads": "4"}
        if min(frames.shape[1:3]) < _MIN_LOOKAHEAD_SIZE:
            # x264's macroblock tree reads memory that it has not written when a frame has only a few blocks a side:
            # the same frames then gave other bytes, with pixels off by up to 30.
            options["x264-params"] = "mbtree=0"
        # PyAV leaves its further keywords and the stream of its packets untyped.
        stream = container.add_stream(  # pyright: ignore[reportUnknownMemberType]
            "libx264", rate=frame_rate(fps), options=options
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Written out, because players guess BT.601 for small untagged video and the colours then shift.
        context = stream.codec_context
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for image in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(_to_yuv(rgb)))  # pyright: ignore[reportUnknownMemberType]
        container.mux(stream.encode(None))  # pyright: ignore[reportUnknownMemberType]
    return buffer.getvalue()


def frame_rate(fps: float) -> fractions.Fraction:
    """Frames a second as the file says it: 23.976 is 24000/1001."""
    return fractions.Fraction(fps).limit_denominator(1001)


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, object] | None = None,
    *,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Writes `encode_video`'s bytes, and with metadata the same JSON beside it (NAME.mp4 -> NAME.json).

    The suffix says what the file is: .mp4 (or .m4v), .gif, .webp, or of a single frame .png; only an mp4 carries
    metadata itself. Missing folders are made; existing files are replaced.

    Args:
        beside: another JSON for the file beside it than what the video itself carries.

    Raises:
        UserError: bad frames, another suffix, or the file cannot be written (nothing is left half-written).
    """
    path = pathlib.Path(path)
    contents = {path: _file(path, frames, fps, metadata)}
    if (settings := metadata if beside is None else beside) is not None:
        contents |= settings_file(path, settings)
    write_files(contents)


def _file(path: pathlib.Path, frames: np.ndarray, fps: float, metadata: Mapping[str, object] | None) -> bytes:
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".m4v"):
        return encode_video(frames, fps, metadata)
    if suffix == ".gif":
        return _gif(frames, fps)
    if suffix == ".webp":
        return _webp(frames, fps)
    if suffix == ".png" and frames.ndim == 4 and len(frames) == 1:
        _check(frames, fps, stride=1)
        return _encoded(frames[0], 1, ".png", optimize=True)
    if suffix == ".png":
        raise UserError(f"{str(path)!r} is one picture, and there are {len(frames)} frames; give a name in .mp4")
    raise UserError(f"{str(path)!r} is no kind of file that can be written; give a name in .mp4, .gif or .webp")


def _gif(frames: np.ndarray, fps: float, scale: int = 1) -> bytes:
    _check(frames, fps, stride=1)
    duration = max(20, round(100 / fps) * 10)
    # 64 colours a frame, without dither, which would flicker.
    return _encoded(frames, scale, ".gif", bits=6, duration=duration, loop=0, optimize=True)


def _webp(frames: np.ndarray, fps: float, scale: int = 1) -> bytes:
    _check(frames, fps, stride=1)
    return _encoded(frames, scale, ".webp", duration=round(1000 / fps), loop=0, lossless=True)


def settings_file(path: Path, metadata: Mapping[str, object]) -> dict[pathlib.Path, bytes]:
    """For `write_files`: the JSON beside a video, NAME.json for NAME.mp4."""
    return {pathlib.Path(path).with_suffix(".json"): (_json(metadata, indent=2) + "\n").encode()}


def read_metadata(path: Path) -> dict[str, object]:
    """The settings that `write_video` stored in the mp4.

    Raises:
        UserError: no such file, no video, or it carries no settings.
    """
    with _said(path), av.open(os.fspath(path)) as container:
        text = container.metadata.get(_METADATA_KEY)
    try:
        metadata = json.loads(text or "")
    except json.JSONDecodeError:
        metadata = None
    if not is_json_object(metadata):
        raise UserError(f"{os.fspath(path)} carries no settings; give an mp4 as `{shipped.command('infer')}` wrote it")
    return metadata


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 [F, H, W, 3].

    Raises:
        UserError: no such file, or it holds no video.
    """
    with _said(path):
        try:
            frames = list(decoded_frames(path))
        except NoVideoStream:
            raise UserError(f"{os.fspath(path)} holds no video stream; give a video file") from None
    if not frames:
        raise UserError(f"{os.fspath(path)} holds no video frames; give a video file")
    return np.stack(frames)


def write_gif(path: Path, frames: np.ndarray, fps: float, scale: int = 1) -> None:
    """A looping GIF for documents; `scale` repeats pixels. GIF counts hundredths of a second, so fps is rounded."""
    write_files({pathlib.Path(path): _gif(frames, fps, scale)})


def write_webp(path: Path, frames: np.ndarray, fps: float, scale: int = 1) -> None:
    """A looping WebP without loss, for documents; `scale` repeats pixels. Frames last whole milliseconds."""
    write_files({pathlib.Path(path): _webp(frames, fps, scale)})


def write_png(path: Path, image: np.ndarray, scale: int = 1) -> None:
    """One picture, uint8 [H, W, 3]."""
    write_files({pathlib.Path(path): _encoded(image, scale, ".png", optimize=True)})


def contact_sheet(frames: np.ndarray, count: int = 5, gap: int = 2) -> np.ndarray:
    """`count` frames spread over the video, side by side on white: uint8 [H, W', 3]."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    space = np.full((frames.shape[1], gap, 3), 255, np.uint8)
    parts = [part for image in chosen for part in (image, space)]
    return np.concatenate(parts[:-1], axis=1)


def write_files(contents: Mapping[pathlib.Path, bytes]) -> None:
    """Writes files so that each appears whole, and none appears unless all could be written. Makes missing folders.

    Raises:
        UserError: one could not be written (disk full, no permission, …).
    """
    with contextlib.ExitStack() as stack:
        for path, data in contents.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None
            stack.enter_context(complete_file(path, len(data))).write_at(0, data)


def _json(metadata: Mapping[str, object], indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: bytes of a command line that are no text come as lone surrogates and are escaped."""
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _check(frames: np.ndarray, fps: float, stride: int = 2) -> None:
    """stride: what height and width have to be multiples of."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; give uint8 [F, H, W, 3] with F at least 1")
    if frames.shape[1] % stride or frames.shape[2] % stride:
        raise UserError(f"frames are {frames.shape[1]}x{frames.shape[2]}; H.264 needs an even height and width")
    if not 0 < fps <= 1000:
        raise UserError(f"fps is {fps}; give a number above 0 and at most 1000")


def _to_yuv(rgb: av.VideoFrame) -> av.VideoFrame:
    return rgb.reformat(
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation="BICUBIC",
    )


def _encoded(pixels: np.ndarray, scale: int, extension: str, **options: int) -> bytes:
    """A picture [H, W, 3] or an animation [F, H, W, 3] as the bytes of a file."""
    enlarged = np.repeat(np.repeat(pixels, scale, axis=-3), scale, axis=-2)
    # imageio's types are partial.
    return iio.imwrite("<bytes>", enlarged, plugin="pillow", extension=extension, **options)  # pyright: ignore


@contextlib.contextmanager
def _said(path: Path) -> Generator[None]:
    """Errors of reading a video become sentences."""
    name = os.fspath(path)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; give the path of a video") from None
    except (OSError, av.error.FFmpegError) as error:
        raise UserError(f"{name} cannot be read as a video ({error.strerror}); give an mp4 file") from error
