"""OpenTelemetry: a span for each request that is traced, and one for each of its stages."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode, Tracer

from klein.app.account import OK, Account
from klein.core import Stage


class Tracing:
    """Spans of `tracer`, where the span around a request is recorded; elsewhere none are made.

    They have what an Account tells and nothing that a caller wrote.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def request(self, account: Account) -> Iterator[None]:
        """A span `klein.request` around the work on a request."""
        if not trace.get_current_span().is_recording():
            yield
            return
        with self._tracer.start_as_current_span(
            "klein.request",
            attributes={"klein.request_id": account.id},
            record_exception=False,  # its message and stack are for the log
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            finally:
                span.set_attributes({f"klein.{name}": v for name, v in account.facts().items()})
                if account.outcome != OK:
                    span.set_status(Status(StatusCode.ERROR, account.outcome))

    def stage(self, done: Stage) -> None:
        """A span of a stage that has ended, in the context of its request."""
        if trace.get_current_span().is_recording():
            span = self._tracer.start_span(
                f"klein.{done.name}",
                start_time=done.started,
                attributes={f"klein.{name}": count for name, count in done.detail.items()},
            )
            span.end(done.started + round(done.seconds * 1e9))
