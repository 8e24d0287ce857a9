"""What a call of a pipeline takes beside the fields of a request: several prompts, and what diffusers' users write."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np

from x2v_jax.errors import UserError
from x2v_jax.request.diffusers_names import OUTPUT_TYPES
from x2v_jax.request.request import Request, RequestFields

_MAX_VIDEOS = 100_000


@runtime_checkable
class Generator(Protocol):
    """What knows its seed, as a torch.Generator does."""

    def initial_seed(self) -> int: ...


type Seed = int | Generator
# (pipeline, step from 0, timestep, {"latents": [1, C, F, H, W]}) -> the dict
type StepEndCallback = Callable[..., object]


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """What `Pipeline.__call__` takes beside the fields of `Request`.

    on_step: called after each step with (step from 0, number of steps, latents), as in `Pipeline.generate`.
    generator: the seed: a number, or anything with `initial_seed()`, such as a torch.Generator; or one for each video.
    num_videos_per_prompt: so many, with seeds seed, seed + 1, ….
    output_type: "np" for uint8 arrays, "pil" for lists of PIL images.
    callback_on_step_end: diffusers' form of on_step: called with (pipeline, step from 0, timestep, {"latents": …}),
        the latents as [1, C, F, H, W]. An exception from it ends the run.
    progress: whether each video shows on stderr how far it is; None: as the pipeline was made.
    latents: noise to start from in place of the seed's, [1, C, F, H, W], or [N, C, F, H, W] for N videos.
    """

    # Of the types of `CallFields`; what else is given is told in a sentence by `Call.of`.
    on_step: object = None
    generator: object = None
    num_videos_per_prompt: object = 1
    output_type: object = "np"
    callback_on_step_end: object = None
    latents: object = None
    progress: object = None


class CallFields(RequestFields, total=False):
    """The keywords of a call of a pipeline: fields of `Request`, and `CallOptions` but `output_type`."""

    on_step: Callable[..., object] | None
    generator: Seed | Sequence[Seed] | None
    num_videos_per_prompt: int
    callback_on_step_end: StepEndCallback | None
    latents: np.ndarray | None
    progress: bool | None


type OutputType = Literal["np", "pil"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call, understood: a request for each video. is_batch: whether the answer is a list of videos, or the one."""

    requests: tuple[Request, ...]
    options: CallOptions
    is_batch: bool

    @classmethod
    def of(cls, prompt: object, fields: Mapping[str, object]) -> "Call":
        """A call from its arguments.

        Raises:
            UserError: an unknown field, with the one that is meant; or a value that it cannot have.
        """
        known = {field.name for field in dataclasses.fields(CallOptions)}
        options = CallOptions(**{name: value for name, value in fields.items() if name in known})
        asked = {name: value for name, value in fields.items() if name not in known}
        if isinstance(prompt, Request):
            raise UserError("the prompt is a Request; write generate(request), or give its fields: pipe('a cat', …)")
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
        prompts: list[object] = list(cast("Sequence[object]", prompt)) if is_list else [prompt]
        count = _count(options.num_videos_per_prompt)
        if not prompts:
            raise UserError("the list of prompts is empty; give one prompt or more")
        if options.output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {options.output_type!r}; {_output_advice(options.output_type)}")
        for name in ("on_step", "callback_on_step_end"):
            if not (getattr(options, name) is None or callable(getattr(options, name))):
                raise UserError(f"{name} is {getattr(options, name)!r}; give a function")
        total = len(prompts) * count
        seeds, latents = _seeds(options.generator, asked, total, count), _latents(options.latents, asked, total)
        requests: list[Request] = []
        for number in range(total):
            own = {name: _own(name, value, number // count, len(prompts), is_list) for name, value in asked.items()}
            own |= {"seed": seeds[number], "initial_noise": latents[number]}
            text = cast("str", prompts[number // count])  # checked with the other fields
            requests.append(Request.of(text, own))
        return cls(tuple(requests), options, is_list or count > 1)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_VIDEOS:
        raise UserError(f"num_videos_per_prompt is {value!r}; give a whole number from 1 on")
    return value


def _output_advice(value: object) -> str:
    if value == "latent":
        return "generate(Request(…)).latents has the latents; here give 'np' or 'pil'"
    if value == "pt":
        return "this library has no torch tensors; give 'np', and torch.from_numpy takes the frames"
    return "give 'np' or 'pil'"


def _own(name: str, value: object, index: int, prompts: int, is_list: bool) -> object:
    """One prompt's value of a field that may be given as a list beside a list of prompts."""
    if name not in ("negative_prompt", "image") or not is_list or not isinstance(value, list | tuple):
        return value
    values = cast("Sequence[object]", value)
    if len(values) != prompts:
        raise UserError(f"{name} has {len(values)} entries for {prompts} prompts; give one, or one for each")
    return values[index]


def seed_of(generator: object) -> int:
    """The seed that a generator stands for.

    Raises:
        UserError: it is no number, and has no initial_seed().
    """
    value = generator.initial_seed() if isinstance(generator, Generator) else generator
    number = _whole(value)
    if number is None:
        raise UserError(
            f"generator is a {type(generator).__name__}; give the seed itself, or what has initial_seed(), such as a "
            "torch.Generator"
        )
    return number


def _whole(value: object) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # or TypeError
    except TypeError:
        return None


def _seeds(generator: object, asked: Mapping[str, object], total: int, count: int) -> list[object]:
    """The seed of each video; None where one is to be drawn."""
    if generator is None:
        given, first = asked.get("seed"), _whole(asked.get("seed"))
        if first is None:
            return [given] * total
        return [first + number % count for number in range(total)]
    if asked.get("seed") is not None:
        raise UserError("seed and generator are both given, and mean the same; leave one out")
    if isinstance(generator, list | tuple):
        generators = cast("Sequence[object]", generator)
        if len(generators) != total:
            raise UserError(f"generator has {len(generators)} entries for {total} videos; give one, or one for each")
        return [seed_of(each) for each in generators]
    first = seed_of(generator)
    return [first + number % count for number in range(total)]


def _latents(latents: object, asked: Mapping[str, object], total: int) -> list[object]:
    """What each video starts from: [C, F, H, W], or the file that initial_noise names."""
    if latents is None:
        return [asked.get("initial_noise")] * total
    if asked.get("initial_noise") is not None:
        raise UserError("latents and initial_noise are both given, and mean the same; leave one out")
    try:
        values = np.asarray(latents)
        values = values if values.dtype == np.float32 else values.astype(np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"latents is a {type(latents).__name__}; give a float array [1, C, F, H, W]") from None
    if values.ndim != 5 or len(values) != total:
        each = ", one for each video" if total > 1 else ""
        raise UserError(f"latents are {list(values.shape)}; give [{total}, C, F, H, W]{each}")
    return list(values)
