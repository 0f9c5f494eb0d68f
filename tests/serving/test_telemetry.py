"""What a scrape says."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import InvalidInput, QueueFull
from serving.telemetry import Metrics, MetricsServer, serve_metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def endpoint(metrics: Metrics) -> Iterator[MetricsServer]:
    server = serve_metrics(metrics.registry)
    yield server
    server.close()


def scrape(endpoint: MetricsServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, tuple(sorted(one.labels.items()))): one.value for f in families for one in f.samples}


def test_a_scrape_says_what_happened(metrics: Metrics, endpoint: MetricsServer) -> None:
    metrics.admitted(prompt_tokens=12)
    metrics.first_token(0.02)
    metrics.token_emitted(0.02)
    metrics.token_emitted(0.003, tokens=4)
    metrics.finished("stop", 1.5)
    metrics.rejected(QueueFull("full"))
    metrics.preemption("aws")
    metrics.advised("aws")
    metrics.migration("replay", requests=3)
    metrics.replayed(40)
    metrics.gave_up(2)
    metrics.moved("kv", 4096)
    metrics.reconfiguration("switch", 0.2)
    metrics.load(running=3, waiting=2, kv_usage=0.5)
    metrics.fleet(4, ["ready", "ready", "leaving"])
    seen = scrape(endpoint)
    assert seen["perennial_prompt_tokens_total", ()] == 12
    assert seen["perennial_generation_tokens_total", ()] == 5
    assert seen["perennial_inter_token_latency_seconds_count", ()] == 5
    assert seen["perennial_inter_token_latency_seconds_sum", ()] == pytest.approx(0.032)
    assert seen["perennial_inter_token_latency_seconds_bucket", (("le", "0.005"),)] == 4
    assert seen["perennial_time_to_first_token_seconds_count", ()] == 1
    assert seen["perennial_e2e_request_latency_seconds_sum", ()] == 1.5
    assert seen["perennial_request_success_total", (("finished_reason", "stop"),)] == 1
    assert seen["perennial_requests_rejected_total", (("error", "QueueFull"),)] == 1
    assert seen["perennial_kv_given_up_total", ()] == 2
    assert seen["perennial_preemptions_total", (("source", "aws"),)] == 1
    assert seen["perennial_advices_total", (("source", "aws"),)] == 1
    assert seen["perennial_migrations_total", (("mode", "replay"),)] == 3
    assert seen["perennial_tokens_replayed_total", ()] == 40
    assert seen["perennial_moved_bytes_total", (("what", "kv"),)] == 4096
    assert seen["perennial_reconfiguration_seconds_count", (("phase", "switch"),)] == 1
    assert seen["perennial_num_requests_running", ()] == 3
    assert seen["perennial_num_requests_waiting", ()] == 2
    assert seen["perennial_kv_cache_usage_perc", ()] == 0.5
    assert seen["perennial_epoch", ()] == 4
    assert seen["perennial_instances", (("state", "ready"),)] == 2
    assert seen["perennial_instances", (("state", "lost"),)] == 0


def test_only_the_plan_in_force_is_shown(metrics: Metrics, endpoint: MetricsServer) -> None:
    for version in ("1", "2"):
        metrics.plan(version=version, sha256="ab", source="file", config="D1")
    plans = [dict(labels) for name, labels in scrape(endpoint) if name == "perennial_plan_info"]
    assert [plan["version"] for plan in plans] == ["2"]


def test_two_services_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.admitted(3)
    assert second.registry.get_sample_value("perennial_prompt_tokens_total") == 0


def test_a_closed_endpoint_is_gone_and_a_port_in_use_is_one_sentence(metrics: Metrics) -> None:
    server = serve_metrics(metrics.registry)
    port = server.port
    with pytest.raises(InvalidInput, match=f"Cannot serve metrics on 127.0.0.1:{port}"):
        serve_metrics(metrics.registry, port=port)
    server.close()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
