#!/usr/bin/env python3
"""./dev results: what pruning the bundled sample costs, as a table in Markdown.

Perplexity (protocol bos-512, 8,192 tokens of each held-out text) of the original, of what NAEE keeps layer by layer
and progressively, and of experts drawn by lot (geometric mean of three draws). Plans are evaluated on the original
checkpoint as if they were applied; the program's tests show that this is the written model's result.
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOMAINS = ("prose", "docs", "code", "math", "other")


def text(domain, kind):
    return os.path.join(ROOT, f"examples/text/{domain}.{kind}.txt.xz")


class Winnow:
    def __init__(self, program, model):
        self.program, self.model = program, model

    def run(self, *arguments):
        done = subprocess.run([self.program, *map(str, arguments), "--json", "-q"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"winnow {' '.join(map(str, arguments))}\nexit {done.returncode}: {done.stderr[-600:]}")
        return json.loads(done.stdout)

    def perplexities(self, plan=None):
        result = self.run("eval", "ppl", self.model, *(["--plan", plan] if plan else []), "--tokens", 8192,
                          "--text", *(text(domain, "eval") for domain in DOMAINS))
        return [row["perplexity"] for row in result["texts"]]


def random_plan(seed, keep, model, path):
    rng = random.Random(seed)
    layers = [{"layer": layer, "kept": sorted(rng.sample(range(model["num_experts"]), keep))}
              for layer in model["moe_layers"]]
    with open(path, "w", encoding="utf-8") as out:
        json.dump({"schema": "winnow.plan/1", "model": {"model_type": model["model_type"]}, "layers": layers}, out)
    return path


def geometric_mean(values):
    return math.exp(sum(math.log(value) for value in values) / len(values))


def print_row(keep, size, method, values):
    numbers = " | ".join(f"{value:.1f}" for value in [*values, geometric_mean(values)])
    print(f"| {keep} | {size / 2**20:.1f} | {method} | {numbers} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--model", default=os.path.join(ROOT, "examples/sample-mixtral"))
    parser.add_argument("--keep", type=int, nargs="+", default=[7, 6, 5, 4])
    args = parser.parse_args()
    winnow = Winnow(args.winnow, args.model)
    model = winnow.run("inspect", args.model)
    calib = ["--calib", *(text(domain, "calib") for domain in DOMAINS)]
    start = time.monotonic()
    print(f"| kept | weights MiB | method | {' | '.join(DOMAINS)} | mean |\n|--:|--:|---|" + "--:|" * (len(DOMAINS) + 1))
    print_row(model["num_experts"], model["bytes"], "original", winnow.perplexities())
    with tempfile.TemporaryDirectory() as tmp:
        stats = os.path.join(tmp, "stats")
        winnow.run("observe", args.model, *calib, "--stats", "full", "-o", stats)
        for keep in args.keep:
            plan = os.path.join(tmp, f"naee-{keep}.json")
            made = winnow.run("plan", stats, "--method", "naee", "--keep", keep, "-o", plan)
            size = made["predicted"]["bytes_after"]
            print_row(keep, size, "NAEE", winnow.perplexities(plan))
            progressive, plan = os.path.join(tmp, f"progressive-{keep}"), os.path.join(tmp, f"progressive-{keep}.json")
            winnow.run("observe", args.model, *calib, "--progressive", "--keep", keep, "-o", progressive)
            winnow.run("plan", progressive, "--method", "naee", "--keep", keep, "-o", plan)
            print_row(keep, size, "NAEE, progressive", winnow.perplexities(plan))
            draws = [winnow.perplexities(random_plan(seed, keep, model, os.path.join(tmp, f"random-{keep}-{seed}.json")))
                     for seed in (1, 2, 3)]
            print_row(keep, size, "by lot", [geometric_mean(column) for column in zip(*draws)])
    print(f"\n{time.monotonic() - start:.0f} s; calibrated on 65,536 tokens of the same five kinds of text.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
