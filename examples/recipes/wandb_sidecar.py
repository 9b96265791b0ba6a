#!/usr/bin/env python3
"""Follows a job of secateur and logs it to Weights & Biases: python wandb_sidecar.py JOB

Needs the packages wandb and secateur (clients/python). SECATEUR_URL and SECATEUR_API_KEY name and open the service. `WANDB_MODE=offline` writes
to this machine only. The run has the job's id: started again, the sidecar goes on with the same run.
"""

import os
import sys

import wandb
from secateur import Client, JobFailed


def main(job_id: str) -> int:
    job = Client(os.environ.get("SECATEUR_URL", "http://127.0.0.1:8080")).job(job_id)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "secateur"), id=str(job.id), resume="allow", name=job.name or str(job.id),
        config=job.spec, tags=[f"{key}={value}"[:64] for key, value in job.labels.items()],
    )
    seen = set()
    for event in job.events():
        told = event.model_dump()
        if told["event"] == "measured":
            # Each stage counts its own steps.
            stage = told["stage"]
            if stage not in seen:
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                seen.add(stage)
            run.log({f"{stage}/{told['name']}": told["value"], f"{stage}/step": told["step"]})
        elif told["event"] == "stage_finished":
            run.summary[f"{told['stage']}/duration_ms"] = told["duration_ms"]
    try:
        job.refresh().wait()
    except JobFailed as failed:
        print(failed, file=sys.stderr)
        run.finish(exit_code=1)
        return 1
    scores = job.report().eval.model_dump()
    for checkpoint in ("base", "pruned", "healed"):
        scored = scores.get(checkpoint) or {}
        run.summary.update({f"{checkpoint}/{key}": scored.get(key) for key in ("layer_count", "parameters", "size_bytes")})
        for text in scored.get("perplexity", []):
            run.summary[f"{checkpoint}/perplexity/{text['corpus']}"] = text["value"]
        for task in scored.get("tasks", []):
            run.summary[f"{checkpoint}/acc/{task['task']}"] = task["acc"]
    run.finish()
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1]))
