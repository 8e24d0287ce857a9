"""The globals that a file written by torch.save may name, each with an inert stand-in of our own.

The pickle of a state_dict names functions of torch._utils that rebuild tensors from storages, the types of the
storages, and OrderedDict. This table is the whole of what is understood; nothing is imported by name.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.pickle_reader import Global, Interpreter, Record, is_dict, is_list, is_tuple, shorten

MAX_AXES = 64  # NumPy's own limit

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "complex128": np.dtype(np.complex128),
    "complex64": np.dtype(np.complex64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

# The dtypes that have a storage type of their own. The others are saved in an untyped storage, counted in bytes.
STORAGES: dict[str, np.dtype] = {
    "torch.DoubleStorage": DTYPES["float64"],
    "torch.FloatStorage": DTYPES["float32"],
    "torch.HalfStorage": DTYPES["float16"],
    "torch.BFloat16Storage": DTYPES["bfloat16"],
    "torch.ComplexDoubleStorage": DTYPES["complex128"],
    "torch.ComplexFloatStorage": DTYPES["complex64"],
    "torch.LongStorage": DTYPES["int64"],
    "torch.IntStorage": DTYPES["int32"],
    "torch.ShortStorage": DTYPES["int16"],
    "torch.CharStorage": DTYPES["int8"],
    "torch.ByteStorage": DTYPES["uint8"],
    "torch.BoolStorage": DTYPES["bool"],
    "torch.storage.UntypedStorage": DTYPES["uint8"],
}
UNTYPED = "torch.storage.UntypedStorage"


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A reference to the numbers of one or more tensors, as the pickle claims it.

    Attributes:
        key: its name in the file.
        dtype: its element type; uint8 where it is untyped.
        size: its number of elements.
        view: first element and number of elements of the part that this is (legacy files only), or None.
        typed: whether tensors must have this dtype.
    """

    key: str
    dtype: np.dtype
    size: int
    view: tuple[int, int] | None
    typed: bool


@dataclass(frozen=True, eq=False, slots=True)
class TensorRecord:
    """A tensor as the pickle claims it; whether it fits its storage is not known yet.

    Attributes: offset and stride count elements; conjugate and negate are torch's lazy operations.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conjugate: bool
    negate: bool


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is an int (no bool) that torch could have written as a size, a stride or an offset."""
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    return is_tuple(value) and len(value) <= MAX_AXES and all(map(is_count, value))


def _tensor(
    vm: Interpreter, name: str, arguments: tuple[object, ...], dtype: np.dtype | None, metadata: object
) -> TensorRecord:
    storage, offset, shape, stride = arguments
    if type(storage) is not Storage or storage.typed == (dtype is not None):
        vm.refuse(f"a tensor in it ({name}) has {shorten(storage)} where its storage should be. Download it again.")
    dtype = storage.dtype if dtype is None else dtype
    if not _are_sizes(shape) or not _are_sizes(stride):
        vm.refuse(
            f"a tensor in it has the shape {show(shape)} and the stride {show(stride)}; both must be tuples"
            f" of at most {MAX_AXES} numbers from 0 on. Download it again."
        )
    if len(shape) != len(stride) or not is_count(offset):
        vm.refuse(
            f"a tensor in it has the shape {show(shape)}, the stride {show(stride)} and the offset"
            f" {shorten(offset)}, which contradict each other. Download it again."
        )
    flags: object = {} if metadata is None else metadata
    if not is_dict(flags) or not flags.keys() <= {"conj", "neg"} or (flags and dtype.kind not in "fc"):
        vm.refuse("a tensor in it has metadata that is not torch's 'conj' or 'neg'. Save it as a plain tensor.")
    conjugate = flags.get("conj") is True and dtype.kind == "c"
    return TensorRecord(storage, dtype, offset, shape, stride, conjugate, flags.get("neg") is True)


def show(sizes: object) -> str:
    """A shape or stride for an error message, however long or wrong."""
    if not is_tuple(sizes):
        return shorten(sizes)
    return "(" + ", ".join(map(shorten, sizes[:8])) + (", ...)" if len(sizes) > 8 else ")")


def _wrong_arguments(vm: Interpreter, name: str) -> NoReturn:
    vm.refuse(f"it calls {name!r} with arguments that torch.save does not write. Download it again.")


def _rebuild_tensor(vm: Interpreter, arguments: tuple[object, ...]) -> TensorRecord:
    if len(arguments) != 4:
        _wrong_arguments(vm, "torch._utils._rebuild_tensor")
    return _tensor(vm, "torch._utils._rebuild_tensor", arguments, None, None)


def _rebuild_tensor_v2(vm: Interpreter, arguments: tuple[object, ...]) -> TensorRecord:
    # (storage, offset, shape, stride, requires_grad, backward_hooks[, metadata])
    if len(arguments) not in (6, 7):
        _wrong_arguments(vm, "torch._utils._rebuild_tensor_v2")
    return _tensor(vm, "torch._utils._rebuild_tensor_v2", arguments[:4], None, (*arguments, None)[6])


def _rebuild_tensor_v3(vm: Interpreter, arguments: tuple[object, ...]) -> TensorRecord:
    # (storage, offset, shape, stride, requires_grad, backward_hooks, dtype[, metadata])
    dtype = arguments[6] if len(arguments) in (7, 8) else None
    if type(dtype) is not Global or not _is_dtype(dtype.value) or dtype.name in STORAGES:
        _wrong_arguments(vm, "torch._utils._rebuild_tensor_v3")
    return _tensor(vm, "torch._utils._rebuild_tensor_v3", arguments[:4], dtype.value, (*arguments, None)[7])


def _is_dtype(value: object) -> TypeGuard[np.dtype[np.generic]]:
    return isinstance(value, np.dtype)


def _rebuild_parameter(vm: Interpreter, arguments: tuple[object, ...]) -> TensorRecord:
    # (data, requires_grad, backward_hooks[, state])
    if len(arguments) not in (3, 4) or type(arguments[0]) is not TensorRecord:
        _wrong_arguments(vm, "torch._utils._rebuild_parameter")
    return arguments[0]


def _rebuild_from_type(vm: Interpreter, arguments: tuple[object, ...]) -> TensorRecord:
    # (rebuild function, its arguments' type, its arguments, attributes): a tensor to which somebody gave attributes
    function, kind, inner = (*arguments, None, None, None)[:3]
    is_known = len(arguments) == 4 and type(kind) is Global and kind.name in _TENSOR_TYPES
    if is_known and type(function) is Global and function.name in _REBUILDS and function.call and is_tuple(inner):
        rebuilt = function.call(vm, inner)
        if type(rebuilt) is TensorRecord:
            return rebuilt
    _wrong_arguments(vm, "torch._tensor._rebuild_from_type_v2")


def _ordered_dict(vm: Interpreter, arguments: tuple[object, ...]) -> dict[Hashable, object]:
    # Python 2 wrote the items as a list of pairs.
    pairs: object = arguments[0] if len(arguments) == 1 else []
    if len(arguments) > 1 or not is_list(pairs):
        _wrong_arguments(vm, "collections.OrderedDict")
    vm.charge(len(pairs))
    result: dict[Hashable, object] = {}
    for pair in pairs:
        if not (is_list(pair) or is_tuple(pair)) or len(pair) != 2:
            _wrong_arguments(vm, "collections.OrderedDict")
        vm.set_item(result, *pair)
    return result


def _default_dict(vm: Interpreter, arguments: tuple[object, ...]) -> dict[Hashable, object]:
    if len(arguments) > 1:
        _wrong_arguments(vm, "collections.defaultdict")
    return {}


def _set(vm: Interpreter, arguments: tuple[object, ...]) -> set[Hashable]:
    items = arguments[0] if len(arguments) == 1 else None
    if not is_list(items):
        _wrong_arguments(vm, "builtins.set")
    vm.charge(2 * len(items) + 4)
    return set(map(vm.key, items))


def _frozenset(vm: Interpreter, arguments: tuple[object, ...]) -> frozenset[Hashable]:
    return frozenset(_set(vm, arguments))


def _encode(vm: Interpreter, arguments: tuple[object, ...]) -> bytes:
    # How protocol 2, which has no bytes, writes them; a bytearray likewise, or from bytes.
    if len(arguments) == 1 and isinstance(arguments[0], bytes):
        return arguments[0]
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        _wrong_arguments(vm, "_codecs.encode")
    vm.charge(len(arguments[0]) // 64)
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        _wrong_arguments(vm, "_codecs.encode")


def _bytearray(vm: Interpreter, arguments: tuple[object, ...]) -> bytearray:
    raw = _encode(vm, arguments) if arguments else b""
    vm.charge(len(raw) // 64)
    return bytearray(raw)


def _complex(vm: Interpreter, arguments: tuple[object, ...]) -> complex:
    parts = [part for part in arguments if type(part) is float]
    if len(arguments) != 2 or len(parts) != 2:
        _wrong_arguments(vm, "builtins.complex")
    return complex(*parts)


def _size(vm: Interpreter, arguments: tuple[object, ...]) -> tuple[int, ...]:
    sizes = arguments[0] if len(arguments) == 1 else None
    if not _are_sizes(sizes):
        _wrong_arguments(vm, "torch.Size")
    return sizes


def _device(vm: Interpreter, arguments: tuple[object, ...]) -> str:
    if len(arguments) not in (1, 2) or type(arguments[0]) is not str or not all(map(is_count, arguments[1:])):
        _wrong_arguments(vm, "torch.device")
    vm.charge(len(arguments[0]) // 64)
    return ":".join(map(str, arguments))


def _path(vm: Interpreter, arguments: tuple[object, ...]) -> str:
    parts = [part for part in arguments if type(part) is str]
    if len(arguments) > MAX_AXES or len(parts) != len(arguments):
        _wrong_arguments(vm, "pathlib.Path")
    vm.charge(sum(map(len, parts)) // 64)
    return "/".join(parts).replace("//", "/")


def _namespace(vm: Interpreter, arguments: tuple[object, ...]) -> Record:
    if arguments:
        _wrong_arguments(vm, "argparse.Namespace")
    return Record()


_Call = Callable[[Interpreter, tuple[object, ...]], object]

_REBUILDS: dict[str, _Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

# The types without a function only name the values of a defaultdict.
_BUILTINS: dict[str, _Call | None] = {
    "set": _set,
    "frozenset": _frozenset,
    "bytearray": _bytearray,
    "complex": _complex,
    **dict.fromkeys(("dict", "list", "int", "float")),
}

# Plain values that trainers keep beside the tensors: settings, paths, counters. Python 2's name of the module builtins
# is what protocol 2 writes.
_PLAIN: dict[str, _Call | None] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "argparse.Namespace": _namespace,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,
    "_codecs.encode": _encode,
    **{f"{module}.{name}": function for module in ("builtins", "__builtin__") for name, function in _BUILTINS.items()},
}

GLOBALS: dict[str, Global] = {
    **{name: Global(name, function) for name, function in {**_REBUILDS, **_PLAIN}.items()},
    **{name: Global(name) for name in _TENSOR_TYPES},
    **{f"torch.{name}": Global(f"torch.{name}", value=dtype) for name, dtype in DTYPES.items()},
    **{name: Global(name, value=dtype) for name, dtype in STORAGES.items()},
}
