"""The converter's array work on NumPy alone: fast transposes, casts, and the search for NaN and infinity."""

from collections.abc import Iterator

import numpy as np

# Elements a piece: temporaries stay at 16-32 MB, and in the processor's cache where the memory allows.
_PIECE = 1 << 22
_STRIP = 64

_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}


def contiguous(array: np.ndarray) -> np.ndarray:
    """A C-contiguous version. Transposed matrices are copied in strips, 5 times faster than NumPy's element order."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2 or not array.flags.f_contiguous or array.dtype.itemsize not in (1, 2, 4, 8):
        return np.ascontiguousarray(array)
    source = array.T.view(f"u{array.dtype.itemsize}")
    result = np.empty(array.shape, source.dtype)
    for start in range(0, source.shape[0], _STRIP):
        result[:, start : start + _STRIP] = source[start : start + _STRIP].T
    return result.view(array.dtype)


def row_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of about four million elements each, along axis 0; the array itself where it has no axis."""
    if array.ndim == 0:
        yield array
        return
    step = max(1, _PIECE * array.shape[0] // max(1, array.size))
    for start in range(0, array.shape[0], step):
        yield array[start : start + step]


def is_float(dtype: np.dtype) -> bool:
    # The types of ml_dtypes have NumPy's kind "V".
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether any element is NaN or infinite."""
    if not is_float(array.dtype):
        return False
    exponent = _EXPONENTS.get(array.dtype.name)
    for piece in row_pieces(array):
        if exponent is None:
            values = piece if array.dtype.itemsize >= 4 else piece.astype(np.float32)
            if not np.isfinite(values).all():
                return True
        # Of 16-bit floats the bits are compared: magnitudes from the infinity's up are infinite or NaN.
        elif piece.size and (piece.view(np.uint16) & 0x7FFF).max() >= exponent:
            return True
    return False


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounded to nearest even; the array itself where it has the type already."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # an overflow to infinity is found and reported by the caller
        return array.astype(dtype)
