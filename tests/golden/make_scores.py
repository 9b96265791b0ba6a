"""Makes scores.json: what lm-evaluation-harness says of written answers, and what sacrebleu and rouge-score say of texts.

    pip install lm-eval==0.4.13 sacrebleu==2.6.0 rouge-score==0.1.2
    python tests/golden/make_scores.py
"""

import json
import pathlib

import sacrebleu
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from rouge_score import rouge_scorer

STRICT = RegexFilter(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
IGNORED = [",", "\\$", "(?s).*#### ", "\\.$"]

ANSWERS = [
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"),
    ("18", "#### 18.\nQuestion"),
    ("18", "The answer is 18"),
    ("18", "The answer is 18."),
    ("18", "#### 17\nNo, the answer is 18"),
    ("18", "#### 18\n#### 19"),
    ("18", "####18"),
    ("18", "nothing at all"),
    ("18", ""),
    ("1000", "so it is $1,000."),
    ("1,000", "#### 1000"),
    ("-5", "It drops to -5 degrees. #### -5"),
    ("-5", "10 - 15 = -5"),
    ("5", "It is $5"),
    ("5", "it is 5 . . ."),
    ("3", "1.2.3"),
    ("70000", "#### 70000.00"),
    ("2.5", "#### 2.5"),
    ("12", "a dozen: 12,"),
    ("natural #### 42", "#### 42"),
]

TEXTS = {
    "same": [("The cat sat on the mat.", "The cat sat on the mat.")],
    "near": [
        ("The cat sat on a mat, and looked at 3.5 birds.", "The cat sat on the mat and looked at 3.5 birds!"),
        ("Rain fell all day; nobody went out.", "Rain fell all day, and nobody left the house."),
        ("One two three four five six seven.", "One two three five four six seven eight."),
    ],
    "far": [("completely different words here and there", "The old man and the sea is a short book of 1952.")],
    "short": [("yes", "yes"), ("a b", "a c")],
    "empty": [("", "The cat sat on the mat."), ("A dog.", "A dog barked at the well-known tree-house.")],
    "looped": [("the the the the the the the the the the", "The river runs past the mill to the sea.")],
    "other": [("猫が座った。", "猫が 座っている。"), ("Größe, café & naïve", "Größe: café und naïveté")],
    "quoted": [('He said: "It\'s $5,000 -- no more (or less)".', "He said, “it's $5,000, no more or less”.")],
}


def main():
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    answers = []
    for answer, written in ANSWERS:
        found = [f.apply([[written]], [{}])[0][0] for f in (STRICT, FLEXIBLE)]
        right = [
            bool(exact_match_hf_evaluate([text], [answer], regexes_to_ignore=IGNORED, ignore_case=True)["exact_match"])
            for text in found
        ]
        answers.append({"answer": answer, "written": written, "strict": right[0], "flexible": right[1]})
    texts = []
    for name, pairs in TEXTS.items():
        written, references = [w for w, _ in pairs], [r for _, r in pairs]
        texts.append(
            {
                "name": name,
                "pairs": pairs,
                "bleu": sacrebleu.corpus_bleu(written, [references]).score,
                "chrf": sacrebleu.corpus_chrf(written, [references]).score,
                "rouge_l": sum(rouge.score(r, w)["rougeL"].fmeasure for w, r in pairs) / len(pairs),
            }
        )
    out = {"answers": answers, "texts": texts}
    path = pathlib.Path(__file__).with_name("scores.json")
    path.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
