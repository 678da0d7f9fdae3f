"""Counters of the server, and their Prometheus text. One lock; every method may be called from any thread."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

WINDOW_S = 10.0
FIRST_TOKEN_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NEXT_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
QUEUE_BUCKETS_S = (0.01, 0.1, 1.0, 5.0, 30.0, 120.0, 600.0)


class Rate:
    """Tokens per second, a mean over the last ``window_s`` seconds (over the uptime while that is shorter)."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s, self._clock, self._start_s = window_s, clock, clock()
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        now_s = self._clock()
        self._samples.append((now_s, tokens))
        self._forget(now_s)

    def per_s(self) -> float:
        now_s = self._clock()
        self._forget(now_s)
        span_s = min(self._window_s, now_s - self._start_s)
        return sum(tokens for _, tokens in self._samples) / span_s if span_s > 0 else 0.0

    def _forget(self, now_s: float) -> None:
        while self._samples and self._samples[0][0] <= now_s - self._window_s:
            self._samples.popleft()


class Histogram:
    """Cumulative buckets of seconds, as Prometheus wants them."""

    def __init__(self, buckets_s: tuple[float, ...]) -> None:
        self.buckets_s = buckets_s
        self.counts = [0] * (len(buckets_s) + 1)
        self.sum_s = 0.0

    def observe(self, value_s: float) -> None:
        index = next((i for i, bound in enumerate(self.buckets_s) if value_s <= bound), len(self.buckets_s))
        self.counts[index] += 1
        self.sum_s += value_s

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.buckets_s, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum_s:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """All counters of one server process."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock, self._start_s, self.window_s = clock, clock(), window_s
        self._prefill, self._decode = Rate(window_s, clock), Rate(window_s, clock)
        self._responses: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._lookups: Counter[str] = Counter()
        self._cancelled = 0
        self._first_token = Histogram(FIRST_TOKEN_BUCKETS_S)
        self._next_token = Histogram(NEXT_TOKEN_BUCKETS_S)
        self._queue = Histogram(QUEUE_BUCKETS_S)

    def response(self, route: str, status: int) -> None:
        with self._lock:
            self._responses[route, status] += 1

    def queued(self, wait_s: float) -> None:
        with self._lock:
            self._queue.observe(wait_s)

    def prompt(self, prompt_tokens: int, hit_tokens: int) -> None:
        with self._lock:
            self._tokens["prompt"] += prompt_tokens
            self._tokens["hit"] += hit_tokens
            self._tokens["miss"] += prompt_tokens - hit_tokens

    def looked_up(self, reason: str) -> None:
        """A prompt was looked up in the KV cache; ``reason`` as in Usage, of which only the first word is counted."""
        with self._lock:
            self._lookups[reason.partition(":")[0] or "hit"] += 1

    def prefilled(self, tokens: int) -> None:
        with self._lock:
            self._prefill.add(tokens)
            self._tokens["prefilled"] += tokens

    def first_token(self, since_queued_s: float) -> None:
        with self._lock:
            self._first_token.observe(since_queued_s)
            self._tokens["completion"] += 1

    def next_token(self, step_s: float) -> None:
        with self._lock:
            self._next_token.observe(step_s)
            self._decode.add(1)
            self._tokens["completion"] += 1

    def cancelled(self) -> None:
        with self._lock:
            self._cancelled += 1

    @property
    def uptime_s(self) -> float:
        return self._clock() - self._start_s

    def tokens(self, kind: str) -> int:
        """Total since start; ``kind`` is prompt, hit, miss, prefilled or completion."""
        with self._lock:
            return self._tokens[kind]

    def rates(self) -> tuple[float, float]:
        """Prefill and decode tokens per second over the window."""
        with self._lock:
            return self._prefill.per_s(), self._decode.per_s()

    def requests(self, route: str) -> int:
        with self._lock:
            return sum(count for (known, _), count in self._responses.items() if known == route)

    def exposition(self, gauges: dict[str, float]) -> str:
        """Prometheus text format 0.0.4; ``gauges`` (name without prefix → value) are added as they are."""
        with self._lock:
            lines = list(self._lines())
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE solocard_{name} gauge", f"solocard_{name} {value:.17g}"]
        return "\n".join(lines) + "\n"

    def _lines(self) -> Iterator[str]:
        yield "# TYPE solocard_http_responses_total counter"
        for (route, status), count in sorted(self._responses.items()):
            yield f'solocard_http_responses_total{{route="{route}",status="{status}"}} {count}'
        counters = {
            "prompt_tokens": "prompt", "prefix_cache_hit_tokens": "hit", "prefix_cache_miss_tokens": "miss",
            "prefilled_tokens": "prefilled", "generation_tokens": "completion",
        }
        for name, kind in counters.items():
            yield f"# TYPE solocard_{name}_total counter"
            yield f"solocard_{name}_total {self._tokens[kind]}"
        yield "# TYPE solocard_kv_lookups_total counter"
        for reason, count in sorted(self._lookups.items()):
            yield f'solocard_kv_lookups_total{{reason="{reason}"}} {count}'
        yield "# TYPE solocard_requests_cancelled_total counter"
        yield f"solocard_requests_cancelled_total {self._cancelled}"
        for name, histogram in (
            ("time_to_first_token_seconds", self._first_token),
            ("inter_token_latency_seconds", self._next_token),
            ("request_queue_time_seconds", self._queue),
        ):
            yield f"# TYPE solocard_{name} histogram"
            yield from histogram.lines(f"solocard_{name}")
