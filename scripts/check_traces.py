#!/usr/bin/env python3
"""Reads our traces with OpenTelemetry's own messages (PyPI: opentelemetry-proto), over a kill of the service.

    scripts/check_traces.py --binary target/debug/secateur

A job is asked for with a `traceparent`; the collector is away; service and worker are killed while the job heals. In the end there
is one trace from the request to every stage of every attempt, each span once.
"""

import argparse
import json
import os
import time
import urllib.request

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from receiver import Receiver
from service import Service, until

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(Receiver):
    def __init__(self):
        super().__init__(self.keep)
        self.spans = []

    def keep(self, method, path, headers, body):
        assert (method, path) == ("POST", "/v1/traces"), (method, path)
        assert headers["content-type"] == "application/x-protobuf" and headers["x-scope"] == "check"
        for of in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {pair.key: pair.value.string_value for pair in of.resource.attributes}
            assert names["service.name"] == "shears", names
            self.spans += [span for scope in of.scope_spans for span in scope.spans]
        return 200, b""

    def trace(self):
        return [span for span in self.spans if span.trace_id.hex() == TRACE]


def asked(service, spec):
    headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE}-{CALLER}-01"}
    request = urllib.request.Request(f"{service.url}/v1/jobs", data=json.dumps(spec).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["id"]


def result(span):
    pairs = {pair.key: pair.value.string_value for pair in span.attributes}
    return pairs.get("cicd.pipeline.task.run.result") or pairs.get("cicd.pipeline.result")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    collector = Collector()
    collector.start()
    os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_HEADERS": "x-scope=check", "OTEL_SERVICE_NAME": "shears"}
    service = Service(args.binary, args.model, "--sink-patience", "0.05", "--lease-ttl-ms", "3000", "--backoff-ms", "100")
    collector.stop()
    try:
        begun = time.monotonic()
        job = asked(service, service.spec("traced", 1500))
        until("healing", lambda: service.call(f"/v1/jobs/{job}")["progress"]["task"].startswith("train"))
        service.kill()
        service.start()
        assert service.wait(job, 300) == "succeeded"
        took = time.monotonic() - begun
        collector.start()
        names = lambda: [span.name for span in collector.trace()]
        until("the whole trace", lambda: {"POST /v1/jobs", "RUN secateur", "attempt 1", "attempt 2"} <= set(names()), 200)
        spans = {span.span_id: span for span in collector.trace()}
        assert len(spans) == len(collector.trace()), "a span came twice"
        by_name = {span.name: span for span in spans.values()}
        request, run = by_name["POST /v1/jobs"], by_name["RUN secateur"]
        assert request.parent_span_id.hex() == CALLER and request.kind == Span.SPAN_KIND_SERVER
        assert run.parent_span_id == request.span_id and result(run) == "success"
        attempts = [by_name["attempt 1"], by_name["attempt 2"]]
        assert [result(span) for span in attempts] == ["error", "success"]
        assert all(span.parent_span_id == run.span_id for span in attempts)
        stages = [span for span in spans.values() if spans.get(span.parent_span_id) in attempts]
        told = {stage["stage"]: stage for stage in service.call(f"/v1/jobs/{job}/stages")["data"]}
        last = {span.name: span for span in stages if span.parent_span_id == attempts[1].span_id}
        assert set(last) == set(told), (set(last), set(told))
        for name, span in last.items():
            took_ms = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
            assert abs(took_ms - told[name]["duration_ms"]) < 1, (name, took_ms, told[name])
        cut_off = [span.name for span in stages if result(span) == "error"]
        assert cut_off == ["heal"], cut_off
    finally:
        collector.stop()
        service.stop()
    print(f"traces: one trace of {len(spans)} spans from the request to {len(stages)} stages of two attempts, each once, though the service was "
          f"killed and the collector was away; the job took {took:.1f} s beside a dead collector")


if __name__ == "__main__":
    main()
