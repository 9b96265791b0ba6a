#!/usr/bin/env python3
"""Runs secateur and transformers on the same model and text and compares every number.

    cargo build --release
    python3 scripts/parity.py --model DIR --text FILE.txt --items arc_easy=FILE.jsonl --items lambada=FILE.jsonl:50

Compared, in float32: the layer profile (every cell), the perplexity and every evaluation item of the base and of
the pruned checkpoint, which transformers loads as any other. Exits with 1 when anything disagrees.
Needs torch, transformers and numpy.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROFILE_TOLERANCE = 1e-4  # absolute, in units of pi
PERPLEXITY_TOLERANCE = 1e-3  # relative
LIKELIHOOD_TOLERANCE = 1e-2  # nats, per item


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    p.add_argument("--text", required=True, type=pathlib.Path, help="plain text")
    p.add_argument("--text-bytes", default=60_000, type=int, help="how much of the text is used")
    p.add_argument("--items", action="append", default=[], help="task=FILE.jsonl[:limit]")
    p.add_argument("--samples", default=16, type=int)
    p.add_argument("--seq-len", default=256, type=int)
    p.add_argument("--eval-seq-len", default=512, type=int)
    p.add_argument("--position", default="last", choices=["last", "mean"])
    p.add_argument("--drop", default=6, type=int, help="layers to drop")
    p.add_argument("--workspace", type=pathlib.Path, help="kept; a temporary one by default")
    p.add_argument("--threads", default=2, type=int)
    return p.parse_args()


def task_of(given):
    name, _, rest = given.partition("=")
    path, _, limit = rest.partition(":")
    return {"task": name, "items": {"from": "path", "path": str(pathlib.Path(path).resolve())},
            **({"limit": int(limit)} if limit else {})}


def run_secateur(args, text, workspace, tasks):
    corpus = {"from": "path", "path": str(text)}
    spec = {
        "model": {"from": "path", "path": str(args.model.resolve())},
        "calibration": {"corpus": corpus, "samples": args.samples, "seq_len": args.seq_len, "position": args.position},
        "prune": {"amount": {"layers": args.drop}},
        "heal": [],
        "eval": {"perplexity": [corpus], "tasks": tasks, "speed": False, "seq_len": args.eval_seq_len},
    }
    path = workspace / "parity-spec.json"
    path.write_text(json.dumps(spec))
    command = [args.binary, "run", path, "--workspace", workspace / "run", "--until", "eval", "--precision", "f32"]
    subprocess.run([str(c) for c in command], check=True)
    return workspace / "run"


class Peer:
    """A checkpoint in transformers, in float32."""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def windows(self, text, seq_len):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [ids[i:i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]

    @torch.no_grad()
    def streams(self, ids):
        """The residual stream at every seam, before the final norm: [seams, tokens, hidden]."""
        seen = []
        body = self.model.model
        take = lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0][0].double())
        hooks = [m.register_forward_pre_hook(take, with_kwargs=True) for m in [*body.layers, body.norm]]
        body(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return torch.stack(seen)

    def profile(self, windows, position):
        """by_len[n-1][l], as in profile.json."""
        total = None
        for ids in windows:
            x = self.streams(ids)
            x = x[:, -1:] if position == "last" else x
            x = x / x.norm(dim=-1, keepdim=True)
            cosine = torch.einsum("ith,jth->ijt", x, x).clamp(-1, 1)
            distance = (cosine.arccos() / np.pi).mean(-1)
            total = distance if total is None else total + distance
        mean = (total / len(windows)).numpy()
        layers = len(mean) - 1
        return [[mean[l][l + n] for l in range(layers - n + 1)] for n in range(1, layers + 1)]

    @torch.no_grad()
    def likelihood(self, ids, start):
        """Sum of log softmax over ids[start:], and whether each is the argmax."""
        logits = self.model(torch.tensor([ids[:-1]])).logits[0, start - 1:].double()
        target = torch.tensor(ids[start:])
        logp = logits.log_softmax(-1).gather(1, target[:, None])
        return logp.sum().item(), bool((logits.argmax(-1) == target).all())

    def perplexity(self, windows):
        total = sum(self.likelihood(w, 1)[0] for w in windows)
        return float(np.exp(-total / sum(len(w) - 1 for w in windows)))

    def pair(self, context, continuation):
        kept = context.rstrip()
        whole = self.tokenizer(kept + context[len(kept):] + continuation)["input_ids"]
        return self.likelihood(whole, len(self.tokenizer(kept)["input_ids"]))

    def item(self, item):
        """Log-likelihoods, and whether the item is answered rightly (acc)."""
        if item["kind"] == "multiple_choice":
            pairs = [(item["context"], " " + c) for c in item["choices"]]
        elif item["kind"] == "context_choice":
            pairs = [(c, " " + item["continuation"]) for c in item["contexts"]]
        else:
            likelihood, greedy = self.pair(item["context"], " " + item["continuation"])
            return [likelihood], greedy, None
        found = [self.pair(*p)[0] for p in pairs]
        norm = None
        if item["kind"] == "multiple_choice":
            norm = int(np.argmax([l / len(c) for l, c in zip(found, item["choices"])])) == item["gold"]
        return found, int(np.argmax(found)) == item["gold"], norm


class Verdict:
    def __init__(self):
        self.failed = False

    def say(self, what, ours, theirs, difference, tolerance):
        good = difference <= tolerance
        self.failed |= not good
        print(f"{'agrees ' if good else 'DIFFERS'}  {what:42} secateur {ours:<12.8g} transformers {theirs:<12.8g} "
              f"difference {difference:.2e} (allowed {tolerance:.0e})", flush=True)


def compare_profile(run, peer, text, args, verdict):
    ours = json.loads((run / "profile.json").read_text())
    theirs = peer.profile(peer.windows(text, args.seq_len)[:args.samples], args.position)
    rows = list(zip(ours["by_len"], theirs, strict=True))
    cells = [abs(a - b) for row, other in rows for a, b in zip(row, other, strict=True)]
    mean = lambda table: float(np.mean([v for row in table for v in row]))
    verdict.say(f"profile, worst of {len(cells)} cells", mean(ours["by_len"]), mean(theirs), max(cells), PROFILE_TOLERANCE)
    best = lambda row: int(np.argmin(row[:-1] if len(row) > 1 else row))
    starts = [(best(a), best(b)) for a, b in rows]
    moved = sum(a != b for a, b in starts)
    verdict.say("profile, best starts that differ", 0.0, 0.0, moved, 0)


def compare_task(run, which, peer, task, verdict):
    rows = [json.loads(l) for l in pathlib.Path(task["items"]["path"]).read_text().splitlines() if l.strip()]
    rows = rows[:task.get("limit")]
    results = [json.loads(l) for l in (run / "items" / f"{which}-{task['task']}.jsonl").read_text().splitlines()]
    worst, other, right, theirs_right = 0.0, 0, 0, 0
    for ours, row in zip(results, rows, strict=True):
        likelihoods, correct, norm = peer.item(row)
        worst = max([worst, *(abs(a - b) for a, b in zip(ours["log_likelihoods"], likelihoods, strict=True))])
        other += ours["correct"] != correct or ours["correct_norm"] != norm
        right, theirs_right = right + ours["correct"], theirs_right + correct
    n = len(rows)
    verdict.say(f"{which}: {task['task']}, items judged otherwise ({n})", right / n, theirs_right / n, other, 0)
    verdict.say(f"{which}: {task['task']}, worst log-likelihood", 0.0, 0.0, worst, LIKELIHOOD_TOLERANCE)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    tasks = [task_of(given) for given in args.items]
    with tempfile.TemporaryDirectory() as temporary:
        workspace = args.workspace or pathlib.Path(temporary)
        workspace.mkdir(parents=True, exist_ok=True)
        text = args.text.read_bytes()[:args.text_bytes].decode("utf-8", "ignore")
        # Bytes as they are: no translation of line ends.
        (workspace / "parity.txt").write_bytes(text.encode())
        run = run_secateur(args, (workspace / "parity.txt").resolve(), workspace, tasks)
        scores = json.loads((run / "eval.json").read_text())
        verdict = Verdict()
        for which, path in [("base", args.model), ("pruned", run / "pruned")]:
            peer = Peer(path)
            if which == "base":
                compare_profile(run, peer, text, args, verdict)
            ours, theirs = scores[which]["perplexity"][0]["value"], peer.perplexity(peer.windows(text, args.eval_seq_len))
            verdict.say(f"{which}: perplexity", ours, theirs, abs(ours / theirs - 1), PERPLEXITY_TOLERANCE)
            for task in tasks:
                compare_task(run, which, peer, task, verdict)
    return int(verdict.failed)


if __name__ == "__main__":
    sys.exit(main())
