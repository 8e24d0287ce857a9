"""How far a run is, and how long it will still take: a bar on a terminal, elsewhere a line every few seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, Self, runtime_checkable

from x2v_jax.generate.network import Network
from x2v_jax.models.config import Config, VaeConfig, WanConfig
from x2v_jax.request.resolve import ResolvedRequest, WholePlan

# Between two lines where there is no terminal on which one could be kept up to date.
SECONDS_APART = 10.0
_REFRESH = 0.5
_WIDTH = 24
# What the stages of `Clock` are called; a stage of another name is called by it.
_NAMES = {"load": "loading", "text": "encoding the prompt", "image": "encoding the image", "vae": "decoding"}
# Convolutions of the VAE are that much slower than a transformer's matmuls of as many operations (measured on CPUs).
_CONVOLUTION = 1.5


@runtime_checkable
class Output(Protocol):
    """What is written to: a text file."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def vae_to_step(request: ResolvedRequest, transformer: WanConfig, vae: VaeConfig) -> float:
    """About how many denoising steps decoding takes as long as, by counts of operations."""
    frames, height, width, _ = request.latent_shape
    patch = transformer.patch_size
    tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
    weights = transformer.num_layers * (8 * transformer.dim**2 + 2 * transformer.dim * transformer.ffn_dim)
    attention = 2 * tokens * transformer.dim * transformer.num_layers
    step = 2 * tokens * (weights + attention) * (2 if request.uses_guidance else 1)
    pixels = frames * vae.temporal_stride * height * width * vae.spatial_stride**2
    # Six 3x3x3 convolutions at full size, and about as much again in the coarser levels.
    decoding = 2 * 27 * vae.dim**2 * 12 * pixels
    return _CONVOLUTION * decoding / max(step, 1)


class Progress:
    """Shows the stages of a run, with the steps of denoising and the time left. A context: at its end it is gone.

    Args:
        label: in front, such as the video's number.
        clock, output, every: for tests; `every` is the seconds between two lines.
    """

    def __init__(
        self,
        label: str = "",
        *,
        clock: Callable[[], float] = time.perf_counter,
        output: Output | None = None,
        every: float = SECONDS_APART,
    ):
        self._label, self._clock, self._every = label, clock, every
        self._output = sys.stderr if output is None else output
        self._is_terminal = self._output.isatty()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._stage, self._since = "starting", clock()
        self._begin = self._said = self._since
        self._done, self._count, self._decoding, self._unit = 0, 0, 0.0, "steps"
        self._first = self._last = 0.0  # when the first and the latest step were done

    def expect(self, steps: int, decoding: float, unit: str = "steps") -> None:
        """So many denoising steps are to come, and decoding that takes as long as `decoding` of them."""
        with self._lock:
            self._done, self._count, self._decoding, self._unit = 0, steps, decoding, unit

    def begin(self, stage: str) -> None:
        """A stage begins: a name of `Clock`'s, or any text."""
        with self._lock:
            self._stage, self._since = stage, self._clock()

    def step(self, done: int) -> None:
        """So many denoising steps are done."""
        with self._lock:
            self._done, self._last = done, self._clock()
            if done == 1:
                self._first = self._last
        self.show(at_once=self._is_terminal)

    def text(self) -> str:
        """What is shown now."""
        with self._lock:
            now = self._clock()
            stage = _NAMES.get(self._stage, self._stage)
            if self._stage == "denoise":
                stage = (
                    f"denoising, {self._done} of {self._count} {self._unit}"
                    if self._done
                    else "compiling and first step"
                )
            left = self._left(now)
            said = f"{self._label}{stage}, {now - self._begin:.0f} s"
            said += "" if left is None else f", about {left:.0f} s left"
            if not self._count or not self._is_terminal:
                return said
            share = self._share(now, left)
            filled = round(share * _WIDTH)
            bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {100 * share:3.0f} %  "
            return self._label + bar + said.removeprefix(self._label)

    def show(self, *, at_once: bool = False) -> None:
        """Writes what is shown, if it is time."""
        now = self._clock()
        if not at_once and not self._is_terminal and now - self._said < self._every:
            return
        self._said = now
        text = f"\r\033[K{self.text()}" if self._is_terminal else f"{self.text()}\n"
        with contextlib.suppress(OSError, ValueError):  # a closed terminal ends no run
            self._output.write(text)
            self._output.flush()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._refresh, name="x2v_jax progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_terminal:
            with contextlib.suppress(OSError, ValueError):
                self._output.write("\r\033[K")
                self._output.flush()

    def _refresh(self) -> None:
        pause = _REFRESH if self._is_terminal else min(1.0, self._every / 4)
        while not self._ended.wait(pause):
            self.show()

    def _left(self, now: float) -> float | None:
        """Seconds, as far as they can be told: from the steps that were done after the first, which compiles."""
        if self._done < 2:
            return None
        each = (self._last - self._first) / (self._done - 1)
        decoding = self._decoding * each
        if self._stage == "vae":
            return max(decoding - (now - self._since), 0.0) if now - self._since < decoding else None
        if self._stage not in ("denoise", "load"):
            return None
        return max(each * (self._count - self._done) - (now - self._last), 0.0) + decoding

    def _share(self, now: float, left: float | None) -> float:
        if left is not None:
            return (now - self._begin) / max(now - self._begin + left, 1e-9)
        return self._done / (self._count + self._decoding) if self._stage != "vae" else 0.99


@contextlib.contextmanager
def shown(progress: "bool | Progress", label: str = "") -> Iterator[Progress | None]:
    """The display that `progress` asks for: a new one, the given one, or none."""
    if isinstance(progress, Progress):
        yield progress
    elif progress:
        with Progress(label) as display:
            yield display
    else:
        yield None


def expect(display: Progress, request: ResolvedRequest, networks: Mapping[str, Network[Config]]) -> None:
    """Tells a display what a video takes."""
    transformer, vae = (networks[name].config for name in ("transformer", "vae"))
    if isinstance(request.plan, WholePlan) and isinstance(transformer, WanConfig) and isinstance(vae, VaeConfig):
        display.expect(request.num_inference_steps, vae_to_step(request, transformer, vae))
    elif request.num_blocks:
        display.expect(request.num_blocks, 0.0, "blocks")  # each of which is decoded
        display.begin("denoise")
