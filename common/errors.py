"""One-line error messages for the user of a program."""

import errno


def explain(error):
    """What an OSError means, in words that go behind a path; torch wraps some in a RuntimeError."""
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room, or name another folder"
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission; name another file or folder"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def one_line(error):
    """An error's message on one line; for an OSError the file, and what to do."""
    if isinstance(error, OSError):
        return f"{error.filename}: {explain(error)}" if error.filename else explain(error)
    return " ".join(str(error).split()) or type(error).__name__


def brief(error):
    """An error's kind and the beginning of its message, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"
