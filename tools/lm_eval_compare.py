#!/usr/bin/env python3
"""Scores one set of multiple-choice items twice, with lm-evaluation-harness through a running `winnow serve` and with
`winnow eval tasks`, and compares log-likelihoods and answers.

    pip install "lm_eval[api]==0.4.13" transformers
    build/release/winnow serve MODEL --port 8080 &
    python3 tools/lm_eval_compare.py MODEL http://127.0.0.1:8080 FOLDER --tasks arc_easy,piqa --limit 50

FOLDER holds arc_easy.jsonl(.xz) and so on, as tools/lm_eval_tasks/README.md says. Exit 1 if any log-likelihood differs
by more than TOLERANCE or any answer does. Prompts of the server and batches of `eval` are the same arithmetic, so the
differences are of the last bits.
"""
import argparse
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # nats over a whole choice


def task_file(folder, task):
    for ending in (".jsonl.xz", ".jsonl"):
        if (folder / (task + ending)).exists():
            return str(folder / (task + ending))
    sys.exit(f"{folder}/{task}.jsonl: no such file")


def served(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]
    return model["id"], model["max_model_len"]


def run_harness(arguments, tasks, out):
    name, context = served(arguments.url)
    options = {"base_url": arguments.url + "/v1/completions", "model": name, "tokenizer": arguments.model,
               "tokenizer_backend": "huggingface", "tokenized_requests": "True", "max_length": context,
               "num_concurrent": arguments.concurrent, "max_retries": 1}
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path",
               str(ROOT / "tools/lm_eval_tasks"), "--tasks", ",".join("winnow_" + task for task in tasks),
               "--log_samples", "--output_path", out, "--model_args",
               ",".join(f"{key}={value}" for key, value in options.items())]
    if arguments.limit:
        command += ["--limit", str(arguments.limit)]
    environment = {**os.environ, "WINNOW_TASK_DATA": str(arguments.folder), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=environment)
    scores = {}
    for task in tasks:
        (path,) = glob.glob(os.path.join(out, "**", f"samples_winnow_{task}_*.jsonl"), recursive=True)
        for line in open(path, encoding="utf-8"):
            sample = json.loads(line)
            scores[task, sample["doc_id"]] = [float(answer[0]) for answer in sample["filtered_resps"]]
    return scores, context


def run_winnow(arguments, tasks, context, out):
    items = os.path.join(out, "items.jsonl")
    command = [str(ROOT / "build/release/winnow"), "eval", "tasks", arguments.model, "--items", items, "--max-length",
               str(context), *(task_file(arguments.folder, task) for task in tasks)]
    if arguments.limit:
        command += ["--limit", str(arguments.limit)]
    subprocess.run(command, check=True)
    scores, numbers = {}, {}
    for line in open(items, encoding="utf-8"):
        item = json.loads(line)
        number = numbers[item["task"]] = numbers.get(item["task"], -1) + 1
        scores[item["task"], number] = item["log_likelihoods"]
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tasks", default="arc_easy,hellaswag,piqa")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--concurrent", type=int, default=4)
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    with tempfile.TemporaryDirectory() as out:
        harness, context = run_harness(arguments, tasks, out)
        winnow = run_winnow(arguments, tasks, context, out)
    if sorted(harness) != sorted(winnow):
        sys.exit(f"{len(harness)} items by the harness, {len(winnow)} by winnow: not the same")
    largest, wrong, differing = 0.0, 0, 0
    for key, values in harness.items():
        difference = max(abs(a - b) for a, b in zip(values, winnow[key], strict=True))
        largest = max(largest, difference)
        wrong += difference > TOLERANCE
        differing += values.index(max(values)) != winnow[key].index(max(winnow[key]))
    print(f"{len(harness)} items, {sum(map(len, harness.values()))} choices: largest difference {largest:.2e}, "
          f"{wrong} items beyond {TOLERANCE}, {differing} other answers")
    return 1 if wrong or differing else 0


if __name__ == "__main__":
    sys.exit(main())
