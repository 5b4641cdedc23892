"""Tables of the pages that the programs write."""


def table(head, rows):
    """Lines of a Markdown table; the cells are strings or numbers."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
