"""Any picture becomes upright 8-bit RGB, or a sentence."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from x2v_jax.errors import UserError
from x2v_jax.media import image as image_module
from x2v_jax.media.image import load_image

# Pillow warns of damaged and large files; what counts here is the picture or the sentence.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

# A picture whose corners all differ, so that any turn or mirroring shows. [H 2, W 3].
CORNERS = np.array([[[255, 0, 0], [10, 20, 30], [0, 255, 0]], [[0, 0, 255], [40, 50, 60], [255, 255, 255]]], np.uint8)


def _save(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "gif", "ppm", "tga"])
def test_formats_without_loss_give_the_pixels_back(tmp_path, extension):
    options = {"lossless": True, "exact": True} if extension == "webp" else {}
    path = _save(tmp_path / f"a.{extension}", Image.fromarray(CORNERS), **options)
    pixels = load_image(path)
    np.testing.assert_array_equal(pixels, CORNERS)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def test_jpeg_is_close(tmp_path):
    grey = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    pixels = load_image(str(_save(tmp_path / "a.jpg", Image.fromarray(grey), quality=95)))
    assert pixels.shape == (16, 24, 3) and np.abs(pixels.astype(int) - grey).max() <= 3


# How a viewer shows a stored picture with each orientation (EXIF 2.32: where row 0 and column 0 belong).
UPRIGHT = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: np.rot90(CORNERS, -1),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(CORNERS, 1),
    9: CORNERS,  # not an orientation: left alone
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_is_turned_upright_by_its_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "a.png", Image.fromarray(CORNERS), exif=exif)
    np.testing.assert_array_equal(load_image(path), UPRIGHT[orientation])


def test_broken_exif_beside_a_sound_picture_is_ignored(tmp_path):
    path = _save(tmp_path / "a.png", Image.fromarray(CORNERS), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffrubbish")
    np.testing.assert_array_equal(load_image(path), CORNERS)


def test_transparent_parts_are_laid_over_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    pixels = load_image(_save(tmp_path / "a.png", Image.fromarray(rgba)))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    la = np.array([[[0, 255], [0, 0], [100, 255]]], np.uint8)
    pixels = load_image(_save(tmp_path / "a.png", Image.fromarray(la, "LA")))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 255, 100]])


def test_a_transparent_colour_of_a_palette_is_laid_over_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    pixels = load_image(_save(tmp_path / "a.png", picture, transparency=1))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])
    pixels = load_image(_save(tmp_path / "b.png", picture))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])


def test_8_bit_and_1_bit_grey(tmp_path):
    grey = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(load_image(_save(tmp_path / "a.png", Image.fromarray(grey)))[0, :, 1], [0, 7, 255])
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(load_image(_save(tmp_path / "b.png", bits))[0, :, 2], [255, 0])


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    grey = np.array([[0, 257, 25700, 32896, 65535]], np.uint16)
    pixels = load_image(_save(tmp_path / name, Image.fromarray(grey)))
    np.testing.assert_array_equal(pixels, np.repeat([[[0], [1], [100], [128], [255]]], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pixels_are_refused(tmp_path, dtype):
    path = _save(tmp_path / "a.tiff", Image.fromarray(np.array([[0, 100_000]], dtype)))
    with pytest.raises(UserError, match=r"a\.tiff.*32-bit pixels"):
        load_image(path)


@pytest.mark.parametrize("extension", ["tiff", "jpg"])
def test_cmyk(tmp_path, extension):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :, 1:3] = 255  # magenta and yellow: red
    pixels = load_image(_save(tmp_path / f"a.{extension}", Image.fromarray(inks, "CMYK")))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


def test_cmyk_with_a_profile_of_something_else_still_loads(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"rubbish"):
        path = _save(tmp_path / "a.tiff", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), icc_profile=profile)
        np.testing.assert_array_equal(load_image(path)[0, 0], [255, 0, 0])


def test_other_colour_spaces(tmp_path):
    path = _save(tmp_path / "a.jpg", Image.new("YCbCr", (8, 8), (128, 128, 128)))
    assert np.abs(load_image(path).astype(int) - 128).max() <= 2


def _png_text(**texts: str) -> PngInfo:
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    return info


def _gamma() -> PngInfo:
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", 22_000))
    return info


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# Kinds of pixels that imageio's own arrays would change or refuse: name -> mode, and options of saving.
KINDS = {
    "grey.png": ("L", {"exif": _turned(5)}),
    "alpha.webp": ("RGBA", {"lossless": True, "exact": True, "exif": _turned(7)}),
    "bits.tiff": ("1", {}),
    "grey-alpha.tiff": ("LA", {}),
    "palette.gif": ("P", {"transparency": 3}),
    "palette.png": ("P", {"transparency": bytes(range(200)), "exif": _turned(6)}),
    "colour-that-is-clear.png": ("RGB", {"transparency": (255, 0, 0)}),
    "sixteen.png": ("I;16", {"exif": _turned(8)}),
    "sixteen-clear.png": ("I;16", {"transparency": 0}),
    "inks.jpg": ("CMYK", {"exif": _turned(3)}),
    "lab.tiff": ("LAB", {}),
    "sizes.ico": ("RGBA", {"sizes": [(16, 16), (32, 32)]}),
    "wavelets.jp2": ("RGB", {}),
    "gamma.png": ("RGB", {"pnginfo": _gamma()}),
    "words.png": ("RGB", {"pnginfo": _png_text(mode="L", shape="x", Orientation="6", gamma="9")}),
    "no-exif.png": ("RGB", {"exif": b"Exif\x00\x00rubbish!"}),
    "no-exif.jpg": ("RGB", {"exif": b"Exif\x00\x00rubbish!"}),
    "moves.png": ("RGBA", {"save_all": True, "append_images": [Image.new("RGBA", (32, 40))]}),
    "moves.webp": ("RGBA", {"save_all": True, "append_images": [Image.new("RGBA", (32, 40))], "lossless": True}),
    "moves.gif": ("P", {"save_all": True, "append_images": [Image.new("P", (32, 40))]}),
    "pages.tiff": ("RGB", {"save_all": True, "append_images": [Image.new("L", (32, 40))]}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_as_pillow_reads_it(tmp_path, name):
    mode, options = KINDS[name]
    values = np.random.default_rng(0).integers(0, 256, (40, 32, 4), np.uint8)
    rgba = Image.fromarray(values)
    if mode == "LAB":
        picture = Image.frombytes("LAB", rgba.size, values[..., :3].tobytes())
    elif mode == "I;16":
        picture = Image.fromarray(values.view(np.uint16)[..., 0])
    else:
        picture = rgba.convert("RGB").quantize(200) if mode == "P" else rgba.convert(mode)
    path = _save(tmp_path / name, picture, **options)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(load_image(path), load_image(opened))


def test_reading_a_gif_leaves_pillow_as_it_was(tmp_path):
    before = GifImagePlugin.LOADING_STRATEGY
    load_image(_save(tmp_path / "a.gif", Image.fromarray(CORNERS)))
    assert before == GifImagePlugin.LOADING_STRATEGY


@pytest.mark.parametrize("name", ["imageio:chelsea.png", "https://localhost:1/a.png", "<clipboard>", "<video0>"])
def test_names_that_mean_something_to_imageio_are_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_image(name)
    if "/" not in name:
        (tmp_path / name).write_bytes(_save(tmp_path / "a.png", Image.fromarray(CORNERS)).read_bytes())
        np.testing.assert_array_equal(load_image(name), CORNERS)


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    path = _save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(path), np.full((3, 4, 3), (255, 0, 0)))


def test_takes_what_is_loaded_already():
    np.testing.assert_array_equal(load_image(CORNERS), CORNERS)
    np.testing.assert_array_equal(load_image(Image.fromarray(CORNERS)), CORNERS)
    assert load_image(CORNERS[:, ::-1]).flags.c_contiguous


@pytest.mark.parametrize(
    "array", [CORNERS.astype(np.float32), CORNERS[..., 0], np.zeros((2, 2, 4), np.uint8), CORNERS[:0]]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UserError, match=r"give uint8 \[H, W, 3\]"):
        load_image(array)


def test_other_things_are_refused():
    with pytest.raises(UserError, match="image is a int"):
        load_image(3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png.*does not exist"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("text", ["data:image/png;base64," + "iVBORw0K" * 1000, "~nobody-here/a.png", "a\x00.png"])
def test_text_that_is_no_path_is_refused(text):
    with pytest.raises(UserError, match="does not exist"):
        load_image(text)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        load_image(tmp_path)


def test_a_device_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png.*is not a file"):
        load_image(tmp_path / "pipe.png")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"a\.png.*empty"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\x00" * 4096]
)
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png.*is not a picture"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7])
def test_a_file_cut_short_is_named(tmp_path, extension, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = _save(tmp_path / f"a.{extension}", Image.fromarray(noise))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=rf"a\.{extension}"):
        load_image(path)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_give_a_picture_or_a_sentence(tmp_path, seed):
    rng = np.random.default_rng(seed)
    extension = ["png", "jpg", "webp", "tiff", "gif"][seed % 5]
    path = _save(tmp_path / f"a.{extension}", Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)))
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    places = rng.integers(0, len(data), 12)
    data[places] = rng.integers(0, 256, 12)
    path.write_bytes(data.tobytes())
    try:
        pixels = load_image(path)
    except UserError as error:
        assert f"a.{extension}" in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def _png_of_claimed_size(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side):
    (tmp_path / "a.png").write_bytes(_png_of_claimed_size(side))
    with pytest.raises(UserError, match=r"a\.png.*more than 120,000,000 pixels"):
        load_image(tmp_path / "a.png")


def test_the_limit_holds_for_pictures_in_memory_too(monkeypatch):
    monkeypatch.setattr(image_module, "MAX_PIXELS", 5)
    with pytest.raises(UserError, match="more than 5 pixels"):
        load_image(Image.fromarray(CORNERS))


def test_a_compressed_text_bomb_beside_the_pixels_is_refused(tmp_path):
    info = PngInfo()
    info.add_text("comment", "x" * 80_000_000, zip=True)
    file = io.BytesIO()
    Image.fromarray(CORNERS).save(file, "png", pnginfo=info)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_postscript_is_refused_without_running_an_interpreter(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"a\.eps.*EPS drawing"):
        load_image(tmp_path / "a.eps")
