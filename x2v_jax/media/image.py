"""Any picture file -> the 8-bit RGB array that the models take."""

import io
import os
import pathlib
import warnings
from typing import BinaryIO, TypeGuard, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from x2v_jax.errors import UserError

# The most pixels a picture may have: those of 108-megapixel phones fit.
MAX_PIXELS = 120_000_000

_EXIF_ORIENTATION = 0x0112
# What to do with the stored picture to see it upright: names of PIL.Image.Transpose, by EXIF 2.32's table.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def load_image(source: object) -> UInt8[np.ndarray, "height width 3"]:
    """Reads a picture as a person would see it in a viewer.

    - It is turned upright by its EXIF orientation. (LightX2V ignores it and animates phone photos lying on their side.)
    - Transparent parts are laid over white: the colour stored under them is never meant to be seen, and white is what
      cut-outs are drawn for and what browsers show them on.
    - 16-bit grey is scaled, not clipped, to 8 bits. CMYK goes through its embedded ICC profile where it has one; other
      profiles are ignored, as LightX2V does, so that RGB numbers stay what the file says.
    - Of an animation, the first frame is taken.

    Args:
        source: a path, or a picture that is loaded already: a PIL image, or a uint8 array [H, W, 3].

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        UserError: no such file, not a picture, truncated, too many pixels, or a kind of pixel without a fixed range.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(cast(np.ndarray, source))  # of whichever dtype, which is checked there
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image")
    if not _is_path(source):
        raise UserError(f"image is a {type(source).__name__}; give a path, a PIL image or a uint8 array [H, W, 3]")
    path = pathlib.Path(os.path.expanduser(source))
    # os.path and not pathlib: text that cannot be a path (pasted base64 is too long a name) simply does not exist.
    if not os.path.exists(path):
        raise UserError(f"image {str(path)[:200]!r} does not exist; check the path")
    if not path.is_file():
        raise UserError(f"image {str(path)!r} is not a file; give the path of one picture")
    name = f"image {str(path)!r}"
    if not path.stat().st_size:
        raise UserError(f"{name} is empty (0 bytes); copy or download it again")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); mend its permissions") from error
    with file:
        return _decode(file, name)


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, str | os.PathLike)


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(
            f"image is a {array.dtype} array {list(array.shape)}; give uint8 [H, W, 3]: RGB in 0..255, channels last"
        )
    return np.ascontiguousarray(array)


def _decode(file: BinaryIO, name: str) -> np.ndarray:
    import imageio.v3 as iio

    from x2v_jax.media.picture_file import PictureFile

    try:
        with warnings.catch_warnings():  # Pillow warns from 89 million pixels on; ours is the limit that counts
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = iio.imopen(file, "r", plugin=PictureFile)  # pyright: ignore[reportUnknownMemberType]
    except OSError as error:
        raise _not_opened(name, error.__cause__ or error) from error
    with opened:
        return _to_rgb(opened.picture, name)


def _not_opened(name: str, cause: BaseException) -> UserError:
    """`cause` is what stands behind imageio's general error."""
    from imageio.core.request import InitializationError

    if isinstance(cause, InitializationError):
        return UserError(f"{name} is not a picture that can be read; give a PNG, JPEG, WebP or the like")
    if isinstance(cause, Image.DecompressionBombError):
        return _too_many_pixels(name)
    return _broken(name, cause)  # Decoders raise anything on malformed files: SyntaxError, struct.error, KeyError...


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(name)
    if image.width == 0 or image.height == 0:
        raise UserError(f"{name} is {image.width}x{image.height} pixels; give a picture with at least one pixel")
    if image.format in ("EPS", "WMF"):
        # Pillow would start another program (Ghostscript) on these, and they hold drawings, not pixels.
        raise UserError(f"{name} is a {image.format} drawing; export it as PNG or JPEG")
    try:
        image.load()
        return np.ascontiguousarray(np.asarray(_upright(_rgb(image, name), image)))
    except UserError:
        raise
    except Exception as error:
        raise _broken(name, error) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or (image.mode.startswith("I") and not _is_16_bit(image)):
        raise UserError(f"{name} has 32-bit pixels, whose white is not defined; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        grey = np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    # 16-bit files have mode "I;16" or, from some formats, "I" (32-bit integers) with 16-bit values.
    if image.mode.startswith("I;16"):
        return True
    low, high = cast(tuple[float, float], image.getextrema())  # pairs come only with several channels
    return low >= 0 and high <= 65535


def _from_cmyk(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # The module in C that makes profiles has no types.
            screen = ImageCms.createProfile("sRGB")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            converted = ImageCms.profileToProfile(image, source, screen, outputMode="RGB")  # pyright: ignore[reportUnknownArgumentType]
        except (OSError, ImageCms.PyCMSError):
            converted = None  # A broken or foreign profile: the plain formula below still gives a usable picture.
        if converted is not None:
            return converted
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        orientation = source.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Broken EXIF beside a sound picture: show the picture as it is stored.
        orientation = 1
    name = _UPRIGHT.get(orientation)
    return rgb.transpose(Image.Transpose[name]) if name else rgb


def _too_many_pixels(name: str) -> UserError:
    return UserError(f"{name} has more than {MAX_PIXELS:,} pixels; scale it down first (a video has about a million)")


def _broken(name: str, error: BaseException) -> UserError:
    return UserError(f"{name} is damaged or cut short ({error}); copy or download it again")
