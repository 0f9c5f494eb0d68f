"""Prometheus metrics of the service, with the meanings that vLLM gave their names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.errors import InvalidInput
from serving.requests import FinishReason

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLOW_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class TokenCollector(Collector):
    """What is counted once per token: plain numbers, turned into metrics when somebody scrapes."""

    def __init__(self) -> None:
        self.generated = 0
        self._counts = [0] * (len(_FAST_S) + 1)
        self._total_s = 0.0

    def add(self, tokens: int, gap_s: float) -> None:
        """`tokens` of one stream arrived together, each `gap_s` after the one before on average."""
        self.generated += tokens
        self._counts[bisect_left(_FAST_S, gap_s)] += tokens
        self._total_s += tokens * gap_s

    def collect(self) -> Iterable[Metric]:
        """The counter and the histogram of this moment."""
        yield CounterMetricFamily(
            "perennial_generation_tokens", "Tokens delivered to the journal.", value=self.generated
        )
        cumulated, buckets = 0, []
        for bound, count in zip((*map(str, _FAST_S), "+Inf"), self._counts, strict=True):
            cumulated += count
            buckets.append((bound, cumulated))
        latency = HistogramMetricFamily("perennial_inter_token_latency_seconds", "Time between tokens of one stream.")
        latency.add_metric([], buckets, self._total_s)
        yield latency


class Metrics:
    """The service's metrics in a registry of their own; the controller says what happened."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens = TokenCollector()
        self.registry.register(self._tokens)
        self._running = self._gauge("num_requests_running", "Requests with a slot in a replica.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for a slot.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Fraction of the KV cache in use; 1 is full.")
        self._epoch = self._gauge("epoch", "Number of the layout in force.")
        self._instances = self._gauge("instances", "Instances by state.", ("state",))
        self._plan = self._gauge("plan_info", "1 for the plan in force.", ("version", "sha256", "source", "config"))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._finished = self._counter("request_success", "Requests that ended, by reason.", ("finished_reason",))
        self._rejected = self._counter("requests_rejected", "Requests refused at admission, by error.", ("error",))
        self._preemptions = self._counter("preemptions", "Instances taken away, by who said so.", ("source",))
        self._advices = self._counter("advices", "Instances said to be likely to go, by who said so.", ("source",))
        self._migrations = self._counter("migrations", "Requests moved to another layout, by mode.", ("mode",))
        self._replayed = self._counter("tokens_replayed", "Tokens computed again because their KV was lost.")
        self._given_up = self._counter("kv_given_up", "Requests that lost their KV to older ones.")
        self._moved = self._counter("moved_bytes", "Bytes moved by reconfigurations, by what.", ("what",))
        self._first_token = self._histogram("time_to_first_token_seconds", "Admission to first token.", _FAST_S)
        self._end_to_end = self._histogram("e2e_request_latency_seconds", "Admission to last token.", _SLOW_S)
        self._reconfiguration = self._histogram(
            "reconfiguration_seconds", "Duration of the phases of reconfigurations.", _FAST_S, ("phase",)
        )

    def admitted(self, prompt_tokens: int) -> None:
        """A request was admitted."""
        self._prompt_tokens.inc(prompt_tokens)

    def rejected(self, error: Exception) -> None:
        """A request was refused with `error`."""
        self._rejected.labels(type(error).__name__).inc()

    def first_token(self, seconds: float) -> None:
        """A request's first token came `seconds` after its admission; report it by `token_emitted` too."""
        self._first_token.observe(seconds)

    def token_emitted(self, gap_s: float, tokens: int = 1) -> None:
        """`tokens` of one stream were committed, `gap_s` (each, on average) after the token before."""
        self._tokens.add(tokens, gap_s)

    def finished(self, reason: FinishReason, seconds: float) -> None:
        """A request ended `seconds` after its admission."""
        self._finished.labels(reason).inc()
        self._end_to_end.observe(seconds)

    def preemption(self, source: str) -> None:
        """An instance is being taken away; `source` is a notice source, `crash` or `lease`."""
        self._preemptions.labels(source).inc()

    def advised(self, source: str) -> None:
        """An instance is likely to be taken away, says `source`."""
        self._advices.labels(source).inc()

    def migration(self, mode: str, requests: int = 1) -> None:
        """`requests` went to a new layout; `mode` is `move` or `replay`."""
        self._migrations.labels(mode).inc(requests)

    def replayed(self, tokens: int) -> None:
        """`tokens` are computed again because their KV was lost."""
        self._replayed.inc(tokens)

    def gave_up(self, requests: int) -> None:
        """`requests` lost their KV to older ones."""
        self._given_up.inc(requests)

    def moved(self, what: str, size_bytes: int) -> None:
        """A reconfiguration moved bytes; `what` is `weights` or `kv`."""
        self._moved.labels(what).inc(size_bytes)

    def reconfiguration(self, phase: str, seconds: float) -> None:
        """A phase, or one of the other durations of the event `layout`, took `seconds`."""
        self._reconfiguration.labels(phase).observe(seconds)

    def load(self, *, running: int, waiting: int, kv_usage: float) -> None:
        """How full the service is now."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def fleet(self, epoch: int, states: Sequence[str]) -> None:
        """The epoch in force and the state of every instance."""
        self._epoch.set(epoch)
        for state in ("joining", "ready", "leaving", "lost"):
            self._instances.labels(state).set(states.count(state))

    def plan(self, *, version: str, sha256: str, source: str, config: str) -> None:
        """The plan in force."""
        self._plan.clear()
        self._plan.labels(version, sha256, source, config).set(1)

    def _gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"perennial_{name}", meaning, labels, registry=self.registry)

    def _counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"perennial_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"perennial_{name}", meaning, labels, buckets=buckets, registry=self.registry)


class MetricsServer:
    """`/metrics` over HTTP on a daemon thread."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        """The bound port."""
        return self._server.server_port

    def close(self) -> None:
        """Stop listening and wait for the thread, at most five seconds."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def serve_metrics(registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serve `registry` on `host`. Raises `InvalidInput` if the address cannot be had."""
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InvalidInput(f"Cannot serve metrics on {host}:{port} ({error.strerror}); choose another port.") from error
    return MetricsServer(server, thread)
