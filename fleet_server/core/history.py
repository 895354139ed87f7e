"""Which version a device ran before: the target of a rollback without a number.

Pure. Knows only the order in which one device committed versions of one model; whether the answer is still
published, and how it gets to the device, is for the drivers.
"""

from collections.abc import Sequence


def version_before(committed: Sequence[int], wanted: int | None) -> int | None:
    """Return the version to go back to from ``wanted``, or None when there is none.

    ``committed`` is oldest first. It is read as a stack: going back to a version that was there before pops what was
    committed after it, so that two rollbacks in a row go two steps back instead of swinging between two versions.
    """
    stack = _stack_of(committed)
    if stack and stack[-1] != wanted:
        return stack[-1]  # the wanted one never got as far as committed: the top is what runs, or ran last
    return stack[-2] if len(stack) > 1 else None


def _stack_of(committed: Sequence[int]) -> list[int]:
    stack: list[int] = []
    for version in committed:
        if version in stack:
            del stack[stack.index(version) + 1 :]
        else:
            stack.append(version)
    return stack
