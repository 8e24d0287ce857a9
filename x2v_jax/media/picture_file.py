"""imageio's reader of pictures, with the picture before it becomes an array."""

from imageio.plugins.pillow import PillowPlugin
from PIL import Image


class PictureFile(PillowPlugin):
    """For `imageio.v3.imopen(file, "r", plugin=PictureFile)`.

    The plugin's own `read` goes straight to an array. It fails on broken EXIF beside sound pixels, and it changes how
    Pillow reads GIFs in the whole process.
    """

    @property
    def picture(self) -> Image.Image:
        """The first picture of the file; its pixels are decoded when they are asked for."""
        return self._image  # pyright: ignore[reportReturnType]  # imageio names the module where it means the class
