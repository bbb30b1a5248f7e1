"""Errors that a user can mend: one sentence each, and what it says."""

import errno

from data_cards import CardError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class StageError(Exception):
    """A stage cannot go on; the message is one sentence: what, where, how to mend it."""


class ShardError(ValueError):
    """A shard that cannot be read or does not fit its schema; the message names file and cure."""


class Stopped(Exception):
    """The stage was asked to stop, and has finished the shard it was at."""


# What `sentence` has words for; any other error is a bug.
USER_ERRORS = (StageError, CardError, ShardError, OSError, MemoryError)


def sentence(error: BaseException) -> str | None:
    """What a person can do about an error; None for a bug."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; run it where there is more, or lower its batch"
    if not isinstance(error, OSError):
        return str(error)
    message = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
    if error.errno in FULL:
        return f"{message}; make room and run again, finished shards are kept"
    return f"{message}; make it accessible and run again" if error.errno in FORBIDDEN else None


def first_line(error: BaseException) -> str:
    """What an error says, on one line and not too long; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
