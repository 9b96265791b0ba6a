#!/usr/bin/env python3
"""Whole stages of secateur, each against its peer: in one run, on the same files, with the same threads.

    make bench-peers
    python3 benches/peers/run.py --only profile,decode --rounds 5 --model DIR --items arc_easy=FILE.jsonl:200

Every contender of a case runs in turn, round after round, each time in a process of its own, so that a slow minute
of the machine falls on all of them and the kernel's account of the largest resident set is that contender's.
Leaves a table (Markdown) and all numbers (JSON) in --out. Only the standard library is used here; what the peers
need goes into a virtual environment in the cache.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import venv

import table

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# They agree with each other, so one environment is enough.
PEERS = ["torch==2.15.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0", "bitsandbytes==0.50.2",
         "lm_eval==0.4.13", "mergekit==0.1.5"]
CACHE = pathlib.Path(os.environ.get("SECATEUR_CACHE")
                     or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "secateur")
# What benches/engine.rs cannot set for itself and the product does (src/cli/process.rs).
AS_THE_PRODUCT = {"CANDLE_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Starts a command and tells how long it took and what the kernel counted. A process of its own, because a child
# begins with the peak of who started it: this small one hides nothing.
LAUNCHER = """
import os, sys, time
start = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as out:
    print(time.monotonic() - start, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, file=out)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


@dataclasses.dataclass
class Contender:
    name: str
    command: list
    # The one of ours that does the same with the same precision; nothing for ours.
    against: str = ""
    # From what the process printed to {"seconds", "check", …}; the time of the whole process without.
    read: callable = None
    # Removed before each run.
    output: pathlib.Path = None


@dataclasses.dataclass
class Case:
    name: str
    title: str
    contenders: list


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"cases, by comma: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in a process of forward, decode and step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=pathlib.Path, help="default: what scripts/fetch_model.py writes")
    parser.add_argument("--items", action="append", help="multiple-choice items: TASK=FILE.jsonl[:LIMIT]; again for more")
    parser.add_argument("--windows", default="16x512", help="of the profile: COUNTxTOKENS")
    parser.add_argument("--drop", type=int, default=6, help="eval: layers that the second checkpoint lacks")
    parser.add_argument("--python", type=pathlib.Path, help="one that has all peers, instead of our environment")
    parser.add_argument("--out", type=pathlib.Path, help="directory for the results; default: bench-peers in the target directory")
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else list(CASES)
    if unknown := set(args.only) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return args


def say(text):
    print(f"bench-peers: {text}", file=sys.stderr, flush=True)


def peers_python():
    """The environment's interpreter; made when it is missing or of other versions."""
    home = CACHE / "peers"
    python, stamp = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join([sys.version, *PEERS])
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"installing {' '.join(PEERS)} in {home}: some gigabytes, once")
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def build():
    """The binary and the bench of the engine."""
    command = ["cargo", "build", "--release", "--locked"]
    subprocess.run(command, check=True, cwd=ROOT)
    command = ["cargo", "bench", "--locked", "--bench", "engine", "--no-run", "--message-format=json-render-diagnostics"]
    told = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    built = [json.loads(line) for line in told.splitlines()]
    engine = next(b["executable"] for b in built if b.get("target", {}).get("name") == "engine" and b.get("executable"))
    return target() / "release" / "secateur", pathlib.Path(engine)


def target():
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target")


def last_json(printed, _):
    return json.loads(printed.splitlines()[-1])


class Bench:
    """What the cases are made of."""

    def __init__(self, args):
        self.args = args
        self.binary, self.engine = build()
        self.python = args.python or peers_python()
        self.scratch = CACHE / "bench-peers"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.model = args.model.resolve() if args.model else self.told([ROOT / "scripts" / "fetch_model.py"])
        self.environment = {
            **os.environ, "RAYON_NUM_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads),
            # Nothing of the peers may ask the network, or write outside of the cache.
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.scratch / "huggingface"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"), "TOKENIZERS_PARALLELISM": "true",
            "PYTHONWARNINGS": "ignore"}

    def told(self, command):
        return pathlib.Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())

    def shape(self):
        """A random checkpoint of a well-known shape, 2.2 GB, kept."""
        directory = self.scratch / "tinyllama-1.1b"
        if not directory.is_dir():
            part = directory.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            say(f"writing {directory}")
            subprocess.run([sys.executable, ROOT / "benches" / "make_checkpoint.py", "tinyllama-1.1b", part, "--random"],
                           check=True)
            part.rename(directory)
        return directory

    def layers(self, model):
        return json.loads((model / "config.json").read_text())["num_hidden_layers"]

    def ours(self, name, model, part, precision, check):
        command = [self.engine, "--bench", model, part, precision, self.args.repeats]
        settings = [f"{key}={value}" for key, value in AS_THE_PRODUCT.items()]

        def read(printed, _):
            told = last_json(printed, _)
            return {**told, "check": {check: told["check"]}}
        return Contender(name, ["env", *settings, *command], read=read)

    def peer(self, name, against, part, model, *options, check="", output=None):
        command = [self.python, HERE / "work.py", part, model, "--threads", self.args.threads,
                   "--repeats", self.args.repeats, "--check", check, *options]
        return Contender(name, command, against, last_json, output)

    def ours_until(self, name, stage, precision, spec, check):
        """`secateur run` to the end of a stage: its own time is the stage's."""
        path, workspace = self.scratch / f"{stage}.json", self.scratch / f"{stage}-{precision}"
        path.write_text(json.dumps({"model": {"from": "path", "path": str(self.model)}, "heal": [], **spec}))
        command = [self.binary, "run", path, "--workspace", workspace, "--until", stage, "--precision", precision,
                   "--threads", self.args.threads, "--events", "jsonl"]

        def read(printed, output):
            ends = [e for e in map(json.loads, printed.splitlines()) if e["event"] == "stage_finished"]
            duration = next(e["duration_ms"] for e in ends if e["stage"] == stage) / 1000
            return {"seconds": [duration], "check": check(output)}
        return Contender(name, command, read=read, output=workspace)


def profile(bench):
    count, length = map(int, bench.args.windows.split("x"))
    path = bench.scratch / "windows.jsonl"
    vocab = json.loads((bench.model / "config.json").read_text())["vocab_size"]
    rows = [{"input_ids": [(n * 31 + i * 7919) % vocab for i in range(length)]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"calibration": {"corpus": {"from": "path", "path": str(path)}, "samples": count, "seq_len": length,
                            "position": "last"},
            "prune": {"amount": {"layers": 1}}, "eval": {"perplexity": [], "speed": False}}
    mean = "mean distance"

    def check(workspace):
        cells = [cell for row in json.loads((workspace / "profile.json").read_text())["by_len"] for cell in row]
        return {mean: statistics.fmean(cells)}
    ours = lambda name, precision: bench.ours_until(name, "profile", precision, spec, check)
    peer = lambda name, against, part, dtype: bench.peer(
        name, against, part, bench.model, "--windows", path, "--dtype", dtype, check=mean)
    return Case("profile", f"profile: all pairs of layers, last token, {count} x {length} tokens", [
        ours("ours bf16", "bf16"),
        peer("transformers with hooks, bf16", "ours bf16", "profile", "bf16"),
        peer("transformers, a pass per n (PruneMe), bf16", "ours bf16", "profile_per_n", "bf16"),
        ours("ours f32", "f32"),
        peer("transformers with hooks, f32", "ours f32", "profile", "f32"),
    ])


def prune(bench):
    model, place = bench.shape(), bench.scratch
    pruned = place / "pruned"
    cut = lambda out: [bench.binary, "prune", model, "--drop", "10-15", "--out", out]
    shutil.rmtree(pruned, ignore_errors=True)
    subprocess.run(cut(pruned), check=True, stdout=subprocess.DEVNULL)

    def read(output):
        return lambda *_: {"check": {"bytes of weights": sum(f.stat().st_size for f in output.glob("*.safetensors"))}}
    ours, copy, merged = place / "pruned-again", place / "copy", place / "merged"
    mergekit = bench.peer("mergekit passthrough", "ours", "merge", model, "--drop", 10, 15, "--out", merged, output=merged)
    return Case("prune", "prune: 6 of 22 layers of a 2.2 GB checkpoint, files to files, hash and check included", [
        Contender("ours", cut(ours), output=ours, read=read(ours)),
        Contender("cp -r of the result", ["cp", "-r", pruned, copy], "ours", read(copy), copy),
        dataclasses.replace(mergekit, read=lambda printed, output: {**last_json(printed, output), **read(merged)()}),
    ])


def step(bench):
    peer = lambda name, against, *options: bench.peer(name, against, "step", bench.model, *options, check="loss")
    sixteen, four, whole = "ours, 16-bit base, bf16", "ours, NF4 base, bf16", "ours, 16-bit base, f32"
    return Case("step", "heal step: LoRA r 8 on all linears, 4 x 256 tokens, loss and gradients", [
        bench.ours(sixteen, bench.model, "step-16", "bf16", "loss"),
        peer("torch + peft, bf16", sixteen),
        peer("torch + peft, bf16, compiled", sixteen, "--compile"),
        peer("torch + peft, bf16, checkpointing", sixteen, "--checkpointing"),
        bench.ours(four, bench.model, "step-4", "bf16", "loss"),
        peer("torch + peft + bitsandbytes NF4, bf16", four, "--nf4"),
        peer("torch + peft + bitsandbytes NF4, bf16, checkpointing", four, "--nf4", "--checkpointing"),
        bench.ours(whole, bench.model, "step-16", "f32", "loss"),
        peer("torch + peft, f32", whole, "--dtype", "f32"),
    ])


def evaluate(bench):
    items = {}
    for given in bench.args.items or [f"everyday_questions={ROOT / 'examples' / 'eval_items.jsonl'}"]:
        name, _, rest = given.partition("=")
        path, _, limit = rest.partition(":")
        rows = [line for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
        rows = [row for row in rows if json.loads(row)["kind"] == "multiple_choice"][:int(limit) if limit else None]
        items[name] = bench.scratch / f"items-{name}.jsonl"
        items[name].write_text("\n".join(rows) + "\n")
    first = bench.layers(bench.model) - bench.args.drop - 1
    dropped, pruned = [first, first + bench.args.drop - 1], bench.scratch / "eval-pruned"
    shutil.rmtree(pruned, ignore_errors=True)
    subprocess.run([bench.binary, "prune", bench.model, "--drop", "{}-{}".format(*dropped), "--out", pruned], check=True,
                   stdout=subprocess.DEVNULL)
    spec = {"calibration": {"corpus": {"from": "text", "text": "word " * 64}, "samples": 1, "seq_len": 16},
            "prune": {"strategy": "explicit", "layers": list(range(dropped[0], dropped[1] + 1))},
            "eval": {"perplexity": [], "speed": False,
                     "tasks": [{"task": name, "items": {"from": "path", "path": str(path)}} for name, path in items.items()]}}

    def check(workspace):
        scores = json.loads((workspace / "eval.json").read_text())
        return {f"{which} {task['task']} {metric}": task[metric] for which in ("base", "pruned")
                for task in scores[which]["tasks"] for metric in ("acc", "acc_norm")}
    ours = lambda name, precision: bench.ours_until(name, "eval", precision, spec, check)
    given = [word for name, path in items.items() for word in ("--items", f"{name}={path}")]
    peer = lambda name, against, dtype: bench.peer(
        name, against, "evaluate", bench.model, "--pruned", pruned, "--dtype", dtype, *given)
    counts = ", ".join(f"{name} ({len(path.read_text().splitlines())})" for name, path in items.items())
    return Case("eval", f"eval: base and pruned checkpoint on {counts}", [
        ours("ours bf16", "bf16"),
        peer("lm-eval, hf backend, bf16", "ours bf16", "bf16"),
        ours("ours f32", "f32"),
        peer("lm-eval, hf backend, f32", "ours f32", "f32"),
    ])


def in_both(bench, model, part, options, check):
    """Ours and torch, in either precision."""
    contenders = []
    for precision in ("bf16", "f32"):
        name = f"ours {precision}"
        contenders += [bench.ours(name, model, part, precision, check),
                       bench.peer(f"torch {precision}", name, *options, "--dtype", precision, check=check)]
    return contenders


def decode(batch):
    def case(bench):
        options = ["decode", bench.model, "--batch", batch]
        return Case(f"decode-{batch}", f"decode: 32 tokens, batch {batch}, with a KV cache, from nothing",
                    in_both(bench, bench.model, f"decode-{batch}", options, "greatest logit"))
    return case


def forward(bench):
    contenders = in_both(bench, bench.model, "forward", ["forward", bench.model], "greatest logit")
    return Case("forward", "forward: 4 x 512 tokens, body", contenders)


def forward_large(bench):
    model = bench.shape()
    contenders = in_both(bench, model, "forward", ["forward", model], "greatest logit")
    return Case("forward-1.1b", "forward: 4 x 512 tokens, body, TinyLlama's shape with random weights", contenders)


CASES = {"profile": profile, "prune": prune, "step": step, "eval": evaluate, "decode-1": decode(1),
         "decode-64": decode(64), "forward": forward, "forward-1.1b": forward_large}


def busy_seconds():
    """Time that all processors together have worked, or were taken from this machine by its host."""
    of_all = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, stolen = map(int, of_all)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def once(bench, contender):
    """One process: what it measured, and what the kernel counted."""
    if contender.output:
        shutil.rmtree(contender.output, ignore_errors=True)
    os.sync()
    note = bench.scratch / "launched.txt"
    command = [str(word) for word in contender.command]
    busy = busy_seconds()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCHER, note, *command], env=bench.environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wall, peak, own = map(float, note.read_text().split())
    foreign = max(0.0, busy_seconds() - busy - own) / (wall * os.cpu_count())
    measured = {"process_s": wall, "process_cpu_s": own, "peak_bytes": int(peak), "foreign_cpu": foreign}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        return {**measured, "error": lines[-1][:300], "command": shlex.join(command)}
    told = contender.read(done.stdout, contender.output)
    return {"seconds": [wall], **measured, **told}


def measure(bench, case):
    runs = {contender.name: [] for contender in case.contenders}
    for number in range(bench.args.rounds):
        for contender in case.contenders:
            if any("error" in run for run in runs[contender.name]):
                continue
            run = once(bench, contender)
            runs[contender.name].append(run)
            told = run.get("error") or " ".join(f"{s:.2f}" for s in run["seconds"]) + " s"
            say(f"{case.name}, round {number + 1}: {contender.name}: {told}")
    for contender in case.contenders:
        if contender.output:
            shutil.rmtree(contender.output, ignore_errors=True)
    rows = [{"name": c.name, "against": c.against, **table.summary(runs[c.name]), "runs": runs[c.name]}
            for c in case.contenders]
    return {"case": case.name, "title": case.title, "rows": table.compared(rows)}


def main():
    args = arguments()
    bench = Bench(args)
    out = args.out or target() / "bench-peers"
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": table.machine(bench.python), "threads": args.threads, "rounds": args.rounds, "cases": []}
    for name in args.only:
        result["cases"].append(measure(bench, CASES[name](bench)))
        # After each case: a long run that is stopped has told what it knew.
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "result.md").write_text(table.markdown(result))
    print((out / "result.md").read_text())
    say(f"written to {out}")
    broken = [row["name"] for case in result["cases"] for row in case["rows"] if not row["against"] and "error" in row]
    return f"bench-peers: of ours failed: {', '.join(broken)}" if broken else 0


if __name__ == "__main__":
    sys.exit(main())
