"""Where the members of an uncompressed zip archive lie in its file.

Not `zipfile`, because torch's archives are mapped and never extracted, and because an archive from a stranger needs
stricter rules than a general tool can have: every member stored, in one place, under one plain name, without overlap.
"""

import struct
from dataclasses import dataclass

from x2v_jax.checkpoint.files.lazy_tensor import MappedFile
from x2v_jax.checkpoint.files.pickle_reader import shorten

MAX_MEMBERS = 200_000

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_IN_ZIP64_FIELD = 0xFFFFFFFF
_ENCRYPTED = 0x1 | 0x40 | 0x2000


@dataclass(frozen=True, slots=True)
class Member:
    """The bytes of one member: [start, start + size) of the file."""

    name: str
    start: int
    size: int


def read_members(file: MappedFile) -> dict[str, Member]:
    """The members of the archive by name; of their contents nothing is read.

    Raises:
        UserError: the archive is truncated or damaged, or has a member that is compressed, encrypted, repeated,
            overlapping another, or named with an absolute path or `..`.
    """
    position, size, count = _find_directory(file)
    directory = file.bytes(position, position + size)
    members: dict[str, Member] = {}
    cursor = 0
    for _ in range(count):
        member, cursor = _read_entry(file, directory, cursor, position)
        if member.name in members:
            file.refuse(f"its archive has the member {shorten(member.name)} twice. Download it again.")
        members[member.name] = member
    if cursor != size:
        file.refuse("its archive's list of members has another length than it says. Download it again.")
    end = 0
    for member in sorted(members.values(), key=lambda member: (member.start, member.size)):
        if member.start < end:
            file.refuse(f"its archive's member {shorten(member.name)} overlaps another. Download it again.")
        end = member.start + member.size
    return members


def _find_directory(file: MappedFile) -> tuple[int, int, int]:
    """Position and size of the central directory, and the number of its entries."""
    tail_start = max(0, len(file) - _END.size - _MAX_COMMENT)
    tail = file.bytes(tail_start, len(file))
    before = max(0, len(tail) - _END.size + 4)
    while (found := tail.rfind(b"PK\5\6", 0, before)) >= 0:
        end = _END.unpack_from(tail, found)
        if found + _END.size + end[7] == len(tail):
            break
        before = found + 3  # the signature may be chance in a comment: look before it
    else:
        file.refuse("its archive is truncated: the list of members at the end is missing. Download it again.")
    end_position = tail_start + found
    _, disk, first_disk, count_here, count, size, position, _ = end
    locator_position = end_position - _END64_LOCATOR.size
    limit = end_position
    if locator_position >= 0 and file.bytes(locator_position, locator_position + 4) == b"PK\6\7":
        _, disk, limit, disks = _END64_LOCATOR.unpack(file.bytes(locator_position, end_position))
        raw = file.bytes(limit, limit + _END64.size)
        if limit + _END64.size > locator_position or raw[:4] != b"PK\6\6" or disks > 1:
            file.refuse("its archive's end record is damaged. Download it again.")
        _, _, _, _, disk, first_disk, count_here, count, size, position = _END64.unpack(raw)
    if disk or first_disk or count_here != count:
        file.refuse("its archive is split over several files. Join them first.")
    if position + size != limit or count * _CENTRAL.size > size:
        file.refuse("its archive is truncated or has bytes that belong to nothing. Download it again.")
    if count > MAX_MEMBERS or size > MAX_MEMBERS * 512:
        file.refuse(f"its archive lists {count:,} members in {size:,} bytes, which no checkpoint needs.")
    return position, size, count


def _read_entry(file: MappedFile, directory: bytes, cursor: int, end: int) -> tuple[Member, int]:
    """One entry of the central directory and the cursor behind it; `end` is where the members must end."""
    if directory[cursor : cursor + 4] != b"PK\1\2" or cursor + _CENTRAL.size > len(directory):
        file.refuse("its archive's list of members is damaged. Download it again.")
    fields = _CENTRAL.unpack_from(directory, cursor)
    flags, method, _, _, _, packed, size, name_length, extra_length, comment_length, disk, _, _, header = fields[5:]
    name_start = cursor + _CENTRAL.size
    raw_name = directory[name_start : name_start + name_length]
    extra = directory[name_start + name_length : name_start + name_length + extra_length]
    cursor = name_start + name_length + extra_length + comment_length
    name = _check_name(file, raw_name)
    size, packed, header = _zip64_values(extra, size, packed, header)
    if flags & _ENCRYPTED:
        file.refuse(f"its archive's member {shorten(name)} is encrypted. Decrypt the archive first.")
    if method != 0 or packed != size:
        file.refuse(
            f"its archive's member {shorten(name)} is compressed, but torch.save stores members as they are"
            " (TorchScript does not). Save the model's state_dict() with torch.save."
        )
    local = file.bytes(header, header + _LOCAL.size)
    if disk or cursor > len(directory) or len(local) < _LOCAL.size:
        file.refuse(f"its archive's entry for {shorten(name)} is damaged. Download it again.")
    signature, _, local_flags, local_method, *_, local_name_length, local_extra_length = _LOCAL.unpack(local)
    local_name = file.bytes(header + _LOCAL.size, header + _LOCAL.size + local_name_length)
    if signature != b"PK\3\4" or local_method != 0 or local_flags & _ENCRYPTED or local_name != raw_name:
        file.refuse(f"its archive contradicts itself about the member {shorten(name)}. Download it again.")
    start = header + _LOCAL.size + local_name_length + local_extra_length
    if start + size > end:
        file.refuse(f"its archive's member {shorten(name)} ends outside the archive. Download it again.")
    return Member(name, start, size), cursor


def _zip64_values(extra: bytes, *values: int) -> list[int]:
    """`values`, with each that is too large for 32 bits taken from the zip64 extra field, where they stand in order."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            body = extra[4 : 4 + length]
            wide = list(struct.unpack_from(f"<{len(body) // 8}Q", body))
        extra = extra[4 + length :]
    return [wide.pop(0) if value == _IN_ZIP64_FIELD and wide else value for value in values]


def _check_name(file: MappedFile, raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        file.refuse(f"its archive has a member named {shorten(raw)}, which is not UTF-8. Download it again.")
    # Members are looked up by name and never extracted; a name like this says that the archive is not torch's.
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        file.refuse(f"its archive has a member named {shorten(name)}, which is not a plain relative path.")
    return name
