#!/usr/bin/env python3
"""Has secateur and lm-evaluation-harness read the same rows of benchmarks as published, and compares every score.

    cargo build --release
    python3 scripts/parity_benchmarks.py --model DIR

The rows are made up here, with what is odd in the real ones; the harness reads them by its own task files, so what is
compared is prompts, choices, shots and gold. Float32. Exits with 1 when the log-likelihood of any choice differs by
more than 2e-3. Needs torch, transformers, datasets, pyarrow and lm_eval 0.4.13.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
TOLERANCE = 2e-3
LAYERS_TO_DROP = 1


def labelled(texts, letters="ABCD"):
    return {"text": texts, "label": list(letters[:len(texts)])}


def mmlu(subject):
    return [
        {"question": f" Which {subject} number {n} comes next?\nThink. ", "subject": subject,
         "choices": [f"the {n}th", "none of them", f"{n + 1}", "both A and C"], "answer": n % 4}
        for n in range(4)]


# By the harness's name: our format, rows, rows that shots come from, shots.
CASES = {
    "arc_easy": ("arc_easy", [
        {"id": "1", "question": "Which is wet?", "choices": labelled(["sand", "water", "fire"]), "answerKey": "B"},
        {"id": "2", "question": "Which of these burns best?  ", "choices": labelled(["oil", "tea", "ice", "mud"], "1234"),
         "answerKey": "1"}], None, 0),
    "arc_challenge": ("arc_challenge", [
        {"id": "1", "question": "Why do leaves fall?", "choices": labelled(["wind and cold", "music"]), "answerKey": "A"}],
        None, 0),
    "openbookqa": ("openbookqa", [
        {"id": "1", "question_stem": "The sun is responsible for", "choices": labelled(["puppies", "plants growing", "fog"]),
         "answerKey": " B"}], None, 0),
    "boolq": ("boolq", [
        {"passage": "Water -- Water is wet.", "question": "is water wet", "idx": 0, "label": 1},
        {"passage": "Tea -- Tea is hot \"mostly\".", "question": "is tea cold", "idx": 1, "label": 0}], None, 0),
    "piqa": ("piqa", [
        {"goal": "To open a jar", "sol1": "twist the lid", "sol2": "shout at it", "label": 0},
        {"goal": "Boil an egg.", "sol1": "  use a pan", "sol2": "use a fridge", "label": 0}], None, 0),
    "sciq": ("sciq", [
        {"question": "What falls?", "support": "  Rain falls.\nOften.", "distractor1": "sun", "distractor2": "moon",
         "distractor3": "sky", "correct_answer": "rain"},
        {"question": "What is left?", "support": "", "distractor1": "a", "distractor2": "b", "distractor3": "c",
         "correct_answer": "nothing"}], None, 0),
    "hellaswag": ("hellaswag", [
        {"ind": 1, "activity_label": "Baking", "ctx_a": "A man bakes [header] bread.", "ctx_b": "he Then Ää",
         "ctx": "", "endings": ["eats  it.", " sleeps [title] well", "runs [substeps] off", "[step] sings"], "label": "1"},
        {"ind": 2, "activity_label": "Rowing", "ctx_a": "Two people sit in a boat.", "ctx_b": "", "ctx": "",
         "endings": ["They row.", "They fly.", "They melt.", "They bark."], "label": "0"}], None, 0),
    "winogrande": ("winogrande", [
        {"sentence": "The cup broke because the _ was thin.", "option1": "cup", "option2": "table", "answer": "1"},
        {"sentence": "Ann told Eve that _  should go home.", "option1": "Ann", "option2": "Eve", "answer": "2"}], None, 0),
    "lambada_openai": ("lambada_openai", [
        {"text": "she took her coat, then she took her hat"}, {"text": "\"no,\" he said , and again no"}], None, 0),
    "mmlu_anatomy": ("mmlu", mmlu("anatomy")[:2], mmlu("anatomy")[2:], 2),
    "mmlu_anatomy_continuation": ("mmlu_continuation", mmlu("anatomy")[:2], mmlu("anatomy")[2:], 1),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--binary", default="target/release/secateur", type=pathlib.Path)
    return p.parse_args()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def ours(args, directory):
    """Log-likelihoods of all choices of all items, by the harness's name: half of the files are parquet."""
    tasks = []
    for i, (name, (form, rows, shots, count)) in enumerate(CASES.items()):
        write = (write_jsonl, write_parquet)[i % 2]
        end = ("jsonl", "parquet")[i % 2]
        task = {"task": name, "format": form, "items": {"from": "path", "path": write(directory / f"{name}.{end}", rows)}}
        if count:
            task |= {"shots": count, "shots_from": {"from": "path", "path": write(directory / f"{name}-shots.{end}", shots)}}
        tasks.append(task)
    spec = {"model": {"from": "path", "path": str(args.model.resolve())},
            "calibration": {"corpus": {"from": "text", "text": "one two three four " * 40}, "samples": 1, "seq_len": 32},
            "prune": {"amount": {"layers": LAYERS_TO_DROP}, "strategy": "deepest"}, "heal": [],
            "eval": {"perplexity": [], "speed": False, "generation": None, "tasks": tasks}}
    path, workspace = directory / "spec.json", directory / "workspace"
    path.write_text(json.dumps(spec))
    subprocess.run([args.binary, "run", path, "--workspace", workspace, "--until", "eval", "--precision", "f32"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = lambda name: map(json.loads, (workspace / "items" / f"base-{name}.jsonl").open())
    return {name: [(item["log_likelihoods"], item.get("gold")) for item in lines(name)] for name in CASES}


def theirs(args):
    """The same by lm-evaluation-harness, whose task files are given our rows in the place of the Hub's."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found, now = {}, {}

    def load_dataset(*_, **__):
        splits = ("train", "validation", "test", "dev")
        rows = {split: now["shots"] if split == "dev" and now["shots"] else now["rows"] for split in splits}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(of) for split, of in rows.items()})

    datasets.load_dataset = load_dataset
    model = HFLM(pretrained=str(args.model), dtype="float32", batch_size=1, device="cpu")
    for name, (_, rows, shots, count) in CASES.items():
        now.update(rows=rows, shots=shots)
        result = simple_evaluate(model=model, tasks=[name], num_fewshot=count, bootstrap_iters=0)
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = [([float(r[0][0]) for r in sample["resps"]], sample["target"]) for sample in samples]
    return found


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as place:
        directory = pathlib.Path(place)
        found, expected = ours(args, directory), theirs(args)
    worst, good = 0.0, True
    for name in CASES:
        for i, ((a, gold), (b, target)) in enumerate(zip(found[name], expected[name], strict=True)):
            off = max(abs(x - y) for x, y in zip(a, b, strict=True))
            worst = max(worst, off)
            same_gold = gold is None or name == "winogrande" or gold == int(target)
            if off > TOLERANCE or not same_gold:
                good = False
                print(f"{name}, item {i}: {a} (gold {gold}), the harness {b} (gold {target})")
        print(f"{name}: {len(found[name])} items")
    print(f"largest difference of a log-likelihood: {worst:.2e}")
    print("agrees" if good else "DISAGREES")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
