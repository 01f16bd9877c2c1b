"""MBPP's official splits, and its problems in the sanitized set, which is used for evaluation."""

import functools

# Ids of the 427 problems of sanitized-mbpp.json, as runs "first-last".
_SANITIZED = """
    2-4 6-9 11-12 14 16-20 56-59 61-72 74-75 77 79-80 82-106 108-109 111 113 115-120 123-133 135 137-143 145 160-168
    170-172 222-224 226-230 232-235 237-240 242 244-253 255-257 259-262 264-274 276-287 290-297 299-301 304-312
    388-401 404-415 417-422 424-448 450-465 468 470-479 554-560 562-569 572-574 576-600 602-608 610-612 614-620
    622-633 635 637-641 643-644 720-726 728 730-760 762-767 769-773 775-788 790-794 796-809
"""


@functools.cache
def sanitized_ids() -> frozenset[int]:
    """The `task_id`s of the sanitized set: 427 from all splits, 120 of them from the training split."""
    runs = (run.split("-") for run in _SANITIZED.split())
    return frozenset(number for run in runs for number in range(int(run[0]), int(run[-1]) + 1))


def official_split(task_id: int) -> str | None:
    """The split to which MBPP's authors assign a problem: "prompt", "test", "validation" or "train"; else None."""
    borders = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
    return next((split for split, (first, last) in borders.items() if first <= task_id <= last), None)
