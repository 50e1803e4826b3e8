"""A made part of a page that is otherwise written by hand."""


def replaced(text: str, name: str, content: str) -> str:
    """`text` with what stands between the comments `name: begin` and `name: end` replaced by `content`.

    Raises ValueError where the page does not have both once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"
