"""Counters and histograms in the text format of Prometheus.

The format is a few lines, and the client library's registry is global to a process.
The names are those of vLLM with `research:` in place of `vllm:`, so that its dashboards
work after one replacement.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping

PREFIX = "research:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

Labels = tuple[tuple[str, str], ...]


class Metric:
    """One name with its help and its values by label.

    A counter or gauge has one number for each set of labels. A histogram has the number
    of values in each bucket, their sum and their count.
    """

    def __init__(self, name: str, kind: str, help: str, buckets: tuple = ()):
        self.name, self.kind, self.help = PREFIX + name, kind, help
        self._buckets = buckets
        self._values: dict[Labels, float] = defaultdict(float)
        self._counts: dict[Labels, list[int]] = {}

    def add(self, value: float = 1, **labels: str) -> None:
        """Adds to a counter, or a value to a histogram."""
        key = tuple(sorted(labels.items()))
        self._values[key] += value
        if self._buckets:
            counts = self._counts.setdefault(key, [0] * (len(self._buckets) + 1))
            counts[bisect.bisect_left(self._buckets, value)] += 1

    def set(self, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._values[tuple(sorted(labels.items()))] = value

    def clear(self) -> None:
        """Drops all values."""
        self._values.clear()
        self._counts.clear()

    def lines(self) -> Iterator[str]:
        """The lines of this metric."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self._values.items():
            if not self._buckets:
                yield f"{self.name}{_written(labels)} {value:.12g}"
                continue
            total = 0
            bounds = [*map("{:g}".format, self._buckets), "+Inf"]
            for bound, count in zip(bounds, self._counts[labels], strict=True):
                total += count
                yield f"{self.name}_bucket{_written((*labels, ('le', bound)))} {total}"
            yield f"{self.name}_sum{_written(labels)} {value:.12g}"
            yield f"{self.name}_count{_written(labels)} {total}"


class ServerMetrics:
    """All metrics of one server; labels name the model."""

    def __init__(self) -> None:
        self._all: list[Metric] = []
        gauge, counter = self._gauge, self._counter
        self.running = gauge("num_requests_running", "Answers in a slot.")
        self.waiting = gauge("num_requests_waiting", "Answers in the queue.")
        self.cache = gauge("kv_cache_usage_perc", "Filled share of the slots, 0 to 1.")
        self.adapters = gauge("lora_requests_info", "Loaded adapters.")
        self.prefix_queries = gauge(
            "prefix_cache_queries", "Tokens of prompts looked up in the prefix cache."
        )
        self.prefix_hits = gauge("prefix_cache_hits", "Tokens found there.")
        self.prompt = counter("prompt_tokens_total", "Tokens of prompts.")
        self.generated = counter("generation_tokens_total", "New tokens.")
        self.finished = counter("request_success_total", "Answers, by their end.")
        self.refused = counter("request_refused_total", "Requests, by status.")
        self.first_token = self._histogram("time_to_first_token_seconds", SECONDS)
        self.between = self._histogram("inter_token_latency_seconds", SHORT)
        self.whole = self._histogram("e2e_request_latency_seconds", SECONDS)
        self.queued = self._histogram("request_queue_time_seconds", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", SECONDS)
        self.prompt_sizes = self._histogram("request_prompt_tokens", TOKENS)
        self.answer_sizes = self._histogram("request_generation_tokens", TOKENS)

    def text(self) -> str:
        """The page that Prometheus reads."""
        return "".join(f"{x}\n" for metric in self._all for x in metric.lines())

    def _gauge(self, name: str, help: str) -> Metric:
        return self._new(Metric(name, "gauge", help))

    def _counter(self, name: str, help: str) -> Metric:
        return self._new(Metric(name, "counter", help))

    def _histogram(self, name: str, buckets: tuple) -> Metric:
        help = name.replace("_", " ").capitalize() + "."
        return self._new(Metric(name, "histogram", help, buckets))

    def _new(self, metric: Metric) -> Metric:
        self._all.append(metric)
        return metric


def _written(labels: Labels | Mapping[str, str]) -> str:
    r"""`{a="b"}`; a value is escaped, so that no name can end its line."""
    pairs = labels.items() if isinstance(labels, Mapping) else labels
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    inside = ",".join(f'{name}="{value.translate(escapes)}"' for name, value in pairs)
    return f"{{{inside}}}" if inside else ""
