"""Parts of documents that programs write, between two comments that name them."""


class NoSuchPart(ValueError):
    """The document has no such comments."""


def replace_part(document: str, name: str, content: str) -> str:
    """The document with what stands between <!-- begin NAME … --> and <!-- end NAME --> replaced.

    Raises:
        NoSuchPart: they are not there, in this order.
    """
    start, end = _bounds(document, name)
    return f"{document[:start]}\n{content.strip()}\n{document[end:]}"


def part(document: str, name: str) -> str:
    """What stands between the two comments.

    Raises:
        NoSuchPart: they are not there, in this order.
    """
    start, end = _bounds(document, name)
    return document[start:end].strip()


def _bounds(document: str, name: str) -> tuple[int, int]:
    opening = document.find(f"<!-- begin {name}")
    start = document.find("-->", opening) + 3
    end = document.find(f"<!-- end {name} -->", start)
    if opening < 0 or start < 3 or end < 0:
        raise NoSuchPart(f"no part {name!r}: put <!-- begin {name} --> and <!-- end {name} --> into the document")
    return start, end
