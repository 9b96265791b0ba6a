#!/usr/bin/env python3
"""Reads our OpenLineage events with OpenLineage's own classes (PyPI: openlineage-python), over a kill of the service.

    scripts/check_lineage.py --binary target/debug/secateur

Every part of an event is given to the class that the standard has for it, which refuses what it does not know, and what the
classes write must be the event again. Jobs succeed, fail and are cancelled while the receiver is away.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil

from openlineage.client import event_v2
from openlineage.client.facet_v2 import (
    dataset_version_dataset, error_message_run, job_type_job, output_statistics_output_dataset, processing_engine_run,
)
from openlineage.client.serde import Serde
from receiver import Receiver
from service import Service, until

FACETS = {
    "processing_engine": processing_engine_run.ProcessingEngineRunFacet,
    "errorMessage": error_message_run.ErrorMessageRunFacet,
    "jobType": job_type_job.JobTypeJobFacet,
    "version": dataset_version_dataset.DatasetVersionDatasetFacet,
    "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
}


def facets(given):
    made = {}
    for name, content in given.items():
        content = dict(content)
        schema, producer = content.pop("_schemaURL"), content.pop("_producer")
        made[name] = FACETS[name](**content, producer=producer)
        assert made[name]._schemaURL == schema, (name, schema, made[name]._schemaURL)
    return made


def parsed(event):
    """The event as an object of the library; it refuses what the standard does not know."""
    named = lambda kind, given: kind(**{**given, **{key: facets(value) for key, value in given.items() if "acets" in key}})
    return event_v2.RunEvent(
        eventType=event_v2.RunState(event["eventType"]), eventTime=event["eventTime"], producer=event["producer"],
        run=event_v2.Run(runId=event["run"]["runId"], facets=facets(event["run"]["facets"])), job=named(event_v2.Job, event["job"]),
        inputs=[named(event_v2.InputDataset, d) for d in event["inputs"]], outputs=[named(event_v2.OutputDataset, d) for d in event["outputs"]],
    )


def full(value):
    """Without what is empty: the library writes empty facets where we write none."""
    if isinstance(value, dict):
        return {key: full(v) for key, v in value.items() if v not in ({}, [], None)}
    return [full(v) for v in value] if isinstance(value, list) else value


class Marquez(Receiver):
    def __init__(self):
        super().__init__(self.keep)
        self.events = collections.defaultdict(dict)

    def keep(self, method, path, headers, body):
        assert (method, path, headers["authorization"]) == ("POST", "/api/v1/lineage", "Bearer word"), (method, path)
        event = json.loads(body)
        told = Serde.to_dict(parsed(event))
        assert full(told) == full(event), f"\n{json.dumps(full(told), sort_keys=True)}\n{json.dumps(full(event), sort_keys=True)}"
        # One that comes again is the same.
        before = self.events[event["run"]["runId"]].setdefault((event["eventTime"], event["eventType"]), event)
        assert before == event
        return 201, b""

    def kinds(self, job):
        return [kind for _, kind in sorted(self.events[job])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/debug/secateur")
    parser.add_argument("--model", help="a directory with a small model; one with random weights is made when absent")
    args = parser.parse_args()
    receiver = Marquez()
    receiver.start()
    os.environ["OPENLINEAGE_API_KEY"] = "word"
    service = Service(args.binary, args.model, "--openlineage-url", f"{receiver.url}/api/v1/lineage", "--sink-patience", "0.05")
    try:
        fine = service.submit("all is well", 3)
        assert service.wait(fine) == "succeeded"
        until("the first run", lambda: receiver.kinds(fine) == ["START", "COMPLETE"])
        receiver.stop()
        long = service.submit("cancelled", 1_000_000)
        service.wait(long, until="running")
        service.call(f"/v1/jobs/{long}/pause", method="POST")
        service.wait(long, until="paused")
        service.call(f"/v1/jobs/{long}/resume", method="POST")
        service.wait(long, until="running")
        # Its text goes while it waits.
        text = pathlib.Path(service.home.name, "goes.txt")
        shutil.copy(service.text, text)
        wrong = service.submit("fails", 3, calibration={"corpus": {"from": "path", "path": str(text)}, "samples": 8, "seq_len": 64})
        text.unlink()
        service.call(f"/v1/jobs/{long}/cancel", method="POST")
        service.wait(long)
        assert service.wait(wrong) == "failed"
        service.kill()
        receiver.start()
        service.start()
        until("everything", lambda: receiver.kinds(long) == ["START", "OTHER", "OTHER", "RUNNING", "ABORT"] and receiver.kinds(wrong) == ["START", "FAIL"], 200)
        complete = [e for (_, kind), e in receiver.events[fine].items() if kind == "COMPLETE"][0]
        assert {d["name"] for d in complete["inputs"]} == {service.model, service.text}
        artifacts = service.call(f"/v1/jobs/{fine}/artifacts")["data"]
        for output in complete["outputs"]:
            name = output["name"].split("/")[1]
            name = "healed" if name == "checkpoint" and any(a["path"].startswith("healed/") for a in artifacts) else name.replace("checkpoint", "pruned")
            files = [a["size_bytes"] for a in artifacts if a["path"].startswith(name + "/")]
            told = output["outputFacets"]["outputStatistics"]
            assert (told["fileCount"], told["size"]) == (len(files), sum(files)), output
    finally:
        receiver.stop()
        service.stop()
    count = sum(len(events) for events in receiver.events.values())
    print(f"OpenLineage: {count} events of 3 runs read by its own classes and written again alike; the receiver was away and the "
          f"service killed in between")


if __name__ == "__main__":
    main()
