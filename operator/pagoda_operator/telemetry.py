"""The operator's metrics, under the names that dashboards of controllers know."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Telemetry:
    """Every metric of one operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._add_those_of_controllers()
        self._add_own()

    def _add_those_of_controllers(self) -> None:
        """Under the names that controller-runtime and client-go give them."""
        self.reconciles = Counter(
            "controller_runtime_reconcile_total",
            "Reconciles by their result: success, retry, error, or foreign (another operator's).",
            ["controller", "result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "controller_runtime_reconcile_time_seconds",
            "Duration of a reconcile.",
            ["controller"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "workqueue_depth", "Services that wait for a worker.", ["name"], registry=self.registry
        )
        self.queue_seconds = Histogram(
            "workqueue_queue_duration_seconds",
            "How long a service that was due waited for a worker.",
            ["name"],
            registry=self.registry,
        )
        self.retries = Counter(
            "workqueue_retries_total",
            "Passes that failed and are tried again.",
            ["name"],
            registry=self.registry,
        )
        self.requests = Counter(
            "rest_client_requests_total",
            "Requests to the API server by status code; 0 is a request without an answer.",
            ["code", "method"],
            registry=self.registry,
        )
        self.is_leader = Gauge(
            "leader_election_master_status",
            "1 while this operator holds its Lease, 0 while it stands by.",
            ["name"],
            registry=self.registry,
        )

    def _add_own(self) -> None:
        self.watch_age = Gauge(
            "pagoda_operator_watch_age_seconds",
            "For how long the watch of this kind is known to have missed changes; 0 if it is not.",
            ["kind"],
            registry=self.registry,
        )
        self.resync_drift = Counter(
            "pagoda_operator_resync_drift_total",
            "Changes and deletions that no watch told, found by the lists of the resync.",
            ["kind"],
            registry=self.registry,
        )
        self.desired_replicas = Gauge(
            "pagoda_operator_desired_replicas",
            "The replicas that a service with autoscaling should have now.",
            ["namespace", "service"],
            registry=self.registry,
        )
        self.scale_decisions = Counter(
            "pagoda_operator_scale_decisions_total",
            "Changes of the number of replicas by the autoscaler: demand, idle or (other) limits.",
            ["reason"],
            registry=self.registry,
        )
        self.poll_failures = Counter(
            "pagoda_operator_poll_failures_total",
            "Ready pods that did not tell their load: timeout, unreachable, status, answer, error.",
            ["reason"],
            registry=self.registry,
        )
        self.polled_services = Gauge(
            "pagoda_operator_polled_services",
            "Services whose pods are asked for their load.",
            registry=self.registry,
        )
