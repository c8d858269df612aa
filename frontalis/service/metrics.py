"""Figures of the service for Prometheus: requests, batches, the release that answers. No ids, no names."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "frontalis_request_seconds",
            "Seconds from the request to its answer.",
            ["endpoint", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queries = Counter("frontalis_queries", "Queries searched.", ["mode"], registry=self.registry)
        self.batches = Histogram(
            "frontalis_batch_queries", "Queries in one search of the index.", buckets=_SIZES, registry=self.registry
        )
        self.waiting = Gauge("frontalis_waiting_queries", "Queries that wait for a search.", registry=self.registry)
        self.refresh_errors = Counter(
            "frontalis_refresh_errors", "Times that the served release could not be read.", registry=self.registry
        )
        self.release = Gauge(
            "frontalis_release_number", "Number of the release that answers.", ["release"], registry=self.registry
        )
        self.rows = Gauge("frontalis_index_rows", "Rows of the index.", ["mode"], registry=self.registry)

    def answers_from(self, release: str, number: int, rows: dict[str, int]) -> None:
        """Record which release answers."""
        self.release.clear()
        self.rows.clear()
        self.release.labels(release).set(number)
        for mode, count in rows.items():
            self.rows.labels(mode).set(count)

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus."""
        return generate_latest(self.registry)
