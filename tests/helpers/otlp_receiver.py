"""The smallest OpenTelemetry collector: keeps the spans that a server sends to it over HTTP."""

from __future__ import annotations

import http.server
import threading
import time
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class OtlpReceiver:
    """Listens on a free port of the loopback until `close`."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, dict[str, Any]]] = []
        """Name and attributes; lists of strings come as lists."""
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest()
                sent.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        receiver.spans += [(span.name, _attributes(span)) for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self.environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def wait_for(self, request_id: str, seconds: float = 60) -> dict[str, Any]:
        """The attributes of the span of a request whose id has this in it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, attributes in list(self.spans):
                if name == "llm_request" and request_id in attributes["gen_ai.request.id"]:
                    return attributes
            time.sleep(0.05)
        raise AssertionError(f"no span of request {request_id} came; there are {self.spans[-5:]}")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _attributes(span: Any) -> dict[str, Any]:
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found
