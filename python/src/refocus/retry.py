"""When a failed call is tried again: after UNAVAILABLE, and RESOURCE_EXHAUSTED where the server says after which time.
Never before that time, and never beyond the call's own deadline."""
from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

from refocus.errors import RefocusError, ResourceExhaustedError, UnavailableError


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    attempts: int = 5          # of one call without progress in between; 1: never again
    first_delay: float = 0.2   # seconds; doubles each time
    max_delay: float = 10.0
    jitter: float = 0.3        # a delay is up to this share longer, so that clients do not come back all at once


class Attempts:
    """Of one call with its retries."""

    def __init__(self, policy: RetryPolicy, timeout: float | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._end = None if timeout is None else clock() + timeout
        self._failed = 0

    def remaining(self) -> float | None:
        """Seconds until the deadline, for gRPC."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def moved(self) -> None:
        """The call got something done: later failures count from one again."""
        self._failed = 0

    @property
    def again(self) -> bool:
        """This is not the first attempt."""
        return self._failed > 0

    def delay_after(self, error: RefocusError) -> float | None:
        """Seconds to wait before the next attempt; None: there is none."""
        self._failed += 1
        transient = isinstance(error, UnavailableError) or (
            isinstance(error, ResourceExhaustedError) and error.retry_after is not None)
        if not transient or self._failed >= self._policy.attempts:
            return None
        delay = min(self._policy.max_delay, self._policy.first_delay * 2.0 ** (self._failed - 1))
        delay = max(delay, error.retry_after or 0.0) * (1.0 + self._policy.jitter * random.random())
        if self._end is not None and self._clock() + delay >= self._end:
            return None
        return delay
