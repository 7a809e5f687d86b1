#!/usr/bin/env python3
"""./dev results [-o FILE] [MODEL...]: what each method costs and what it takes, as Markdown.

Without arguments: the bundled sample on the bundled texts. With --corpus FOLDER (<domain>.txt.xz to calibrate on,
heldout/<domain>.txt.xz to judge by): the given models on it. For every number of survivors: the perplexity of each
domain, the mean over domains of the nll increase over the original with its standard error (paired over windows), what
is left of the published method's increase, the seconds and the peak memory of the step that makes it. Choices are
evaluated as if they were applied (the program's tests show that this is the written model's result); healed models are
written. Nothing is chosen on the text that judges.
"""
import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOMAINS = ("prose", "docs", "code", "math", "other")


class Measured:
    def __init__(self, model, args):
        self.model, self.args = model, args
        self.published = None
        if args.corpus:
            self.calib = [os.path.join(args.corpus, f"{domain}.txt.xz") for domain in DOMAINS]
            self.texts = [os.path.join(args.corpus, "heldout", f"{domain}.txt.xz") for domain in DOMAINS]
        else:
            self.calib = [os.path.join(ROOT, f"examples/text/{domain}.calib.txt.xz") for domain in DOMAINS]
            self.texts = [os.path.join(ROOT, f"examples/text/{domain}.eval.txt.xz") for domain in DOMAINS]
        # Models whose tokenizer puts no BOS first are judged without it.
        first = self.run("tokenize", model, "-p", "a")
        self.protocol = "bos-512" if len(first["ids_special"]) > len(first["ids"]) else "plain-512"

    def run(self, *arguments):
        command = [self.args.winnow, *map(str, arguments), "--json", "-q"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr[-600:]}")
        return json.loads(done.stdout)

    def calibration(self):
        return ["--calib", *self.calib, "--blocks", self.args.blocks, "--per-document", 1, "--compute", "f32"]

    def row(self, what, seconds, peak_bytes, *how, published=False):
        """Evaluates `how` (arguments of eval ppl) against the original and prints a line."""
        result = self.run("eval", "ppl", *how, "--against", self.model, "--protocol", self.protocol, "--compute", "f32",
                          "--tokens", self.args.tokens, "--text", *self.texts)
        increases = [text["difference"]["nll"] for text in result["texts"]]
        errors = [text["difference"]["standard_error"] for text in result["texts"]]
        mean = sum(increases) / len(increases)
        if published:
            self.published = mean
        share = f"{100 * mean / self.published:.0f} %" if self.published else ""
        cells = [f"{text['perplexity']:.1f}" for text in result["texts"]]
        cells += [f"{mean:+.4f} +- {math.sqrt(sum(e * e for e in errors)) / len(errors):.4f}", share,
                  f"{seconds:.0f}" if seconds else "", f"{peak_bytes / 2**20:.0f}" if peak_bytes else ""]
        if "experts_per_token" in result:
            what += f" ({result['experts_per_token']:.2f} a token)"
        print(f"| {what} | {' | '.join(cells)} |", file=self.args.out, flush=True)

    def timed(self, *arguments):
        start = time.monotonic()
        return self.run(*arguments), time.monotonic() - start

    def table(self, keeps):
        out, model = self.args.out, self.run("inspect", self.model)
        print(f"\n## {os.path.basename(os.path.normpath(self.model))}\n\n{model['model_type']}, {len(model['moe_layers'])} MoE layers"
              f" of {model['num_experts']} experts, {model['num_experts_per_tok']} a token, {model['bytes'] / 2**20:.1f} MiB."
              f" Protocol `{self.protocol}`, {self.args.tokens:,} tokens of each domain.\n", file=out)
        head = f"| {' | '.join(DOMAINS)} | nll increase | of published | s | peak MiB |"
        line = "|---|" + "--:|" * (len(DOMAINS) + 4)
        with tempfile.TemporaryDirectory(dir=self.args.work) as tmp:
            stats = os.path.join(tmp, "stats")
            observed, seconds = self.timed("observe", self.model, *self.calibration(), "--stats", "full", "-o", stats)
            print(f"Observed once, {observed['tokens']:,} tokens, {seconds:.0f} s, {observed['peak_rss_bytes'] / 2**20:.0f} MiB;"
                  " everything below is planned from that.\n", file=out)
            for keep in keeps:
                print(f"Keeping {keep} of {model['num_experts']}:\n\n| method {head}\n{line}", file=out)
                self.keep(keep, stats, tmp)
                print(file=out)
            print(f"Skipping at run time, nothing removed:\n\n| thresholds {head}\n{line}", file=out)
            self.published = None
            for name, budget in self.skips(model["num_experts_per_tok"]):
                plan = os.path.join(tmp, "skip.json")
                _, seconds = self.timed("plan", stats, "--method", "naee-skip", *budget, "-o", plan, "--force")
                self.row(name, seconds, 0, self.model, "--plan", plan)

    @staticmethod
    def skips(k):
        yield "medians, as published", []
        for share in (0.875, 0.75):
            skipped = k * (1 - share) / (k - 1)
            yield f"one quantile, {skipped:.3g} of the ranks", ["--quantile", skipped]
            yield f"--active {k * share:g}", ["--active", k * share]

    def keep(self, keep, stats, tmp):
        self.published = None
        plan, out = os.path.join(tmp, "plan.json"), os.path.join(tmp, "out")

        def choose(name, *arguments, published=False):
            _, seconds = self.timed("plan", stats, "--keep", keep, *arguments, "-o", plan, "--force")
            self.row(name, seconds, 0, self.model, "--plan", plan, published=published)

        def heal(name, *arguments):
            self.run("plan", stats, "--keep", keep, *arguments, "-o", plan, "--force")
            healed, seconds = self.timed("apply", self.model, "--plan", plan, "--heal", *self.calibration(), "-o", out)
            self.row(name, seconds, healed["peak_rss_bytes"], out)
            shutil.rmtree(out)

        choose("NAEE layer-wise, as published", published=True)
        for method in self.args.methods:
            choose(method, "--method", method)
        choose("NAEE relative to the stream", "--objective", "relative-to-stream")
        choose("NAEE, uneven budget", "--budget", "uneven", "--target", "winnow")
        heal("NAEE, healed")
        heal("NAEE, uneven budget, healed", "--budget", "uneven", "--target", "winnow")

    def condense(self, experts):
        """The table of CD-MoE: settings, bytes, speed, and our variants of the same widths and layers."""
        out, model = self.args.out, self.run("inspect", self.model)
        layers = len(model["moe_layers"])
        print(f"\n## {os.path.basename(os.path.normpath(self.model))}, condensed\n\n{layers} MoE layers of {model['num_experts']} experts,"
              f" {model['num_experts_per_tok']} a token. Protocol `{self.protocol}`, {self.args.tokens:,} tokens of each domain. SR: the shared"
              f" expert and {experts} experts' width; S: the shared expert's alone.\n", file=out)
        head = f"| setting | {' | '.join(DOMAINS)} | nll increase | of published | MiB | prompt tokens/s | decode tokens/s |"
        print(f"{head}\n|---|" + "--:|" * (len(DOMAINS) + 5), file=out, flush=True)
        with tempfile.TemporaryDirectory(dir=self.args.work) as tmp:
            def path(name):
                return os.path.join(tmp, name)

            self.run("observe", self.model, "--method", "cd-moe", "--max-experts", experts, *self.calibration(), "-o", path("mixed"))
            own = path("mixed")
            if self.args.published_ids:
                search, alpha = self.args.published_ids
                own = path("own")
                self.run("observe", self.model, "--method", "cd-moe", "--max-experts", experts, "--calib", search,
                         "--alpha-calib", alpha, "--compute", "f32", "-o", own)
            self.run("observe", self.model, "--method", "condense", "--width", experts, *self.calibration(), "-o", path("neurons"))
            order = self.run("plan", own, "--method", "cd-moe", "--experts", experts, "--layers", layers, "--model", self.model)["layer_order"]
            ours = self.run("plan", path("neurons"), "--method", "condense", "--width", experts, "--layers", layers,
                            "--model", self.model)["layer_order"]
            self.condensed_row("original", self.model)
            for width, kind in ((experts, "SR"), (0, "S")):
                for count in [n for n in (1, 2, 3, layers) if width or n < 4]:
                    self.published = None
                    named = ",".join(map(str, order[:count]))
                    label = f"{kind}, {count} of {layers} layers"
                    if own != path("mixed"):
                        self.condensed(tmp, own, "cd-moe", width, named, f"{label}: published, its own text", published=True)
                    self.condensed(tmp, path("mixed"), "cd-moe", width, named, f"{label}: published", published=own == path("mixed"))
                    self.condensed(tmp, path("neurons"), "condense", width, named, f"{label}: neurons, refitted", heal=True, tune=width > 0)
                    if count == 2 and sorted(order[:2]) != sorted(ours[:2]):
                        named = ",".join(map(str, ours[:2]))
                        self.condensed(tmp, path("neurons"), "condense", width, named, f"{label}: the same, layers by KL", heal=True, tune=width > 0)

    def condensed(self, tmp, stats, method, width, layers, label, published=False, heal=False, tune=False):
        plan, folder = os.path.join(tmp, "condense.json"), os.path.join(tmp, "condensed")
        self.run("plan", stats, "--method", method, "--width" if method == "condense" else "--experts", width,
                 "--moe-layers", layers, "--model", self.model, "-o", plan, "--force")
        self.run("apply", self.model, "--plan", plan, "-o", folder, *(["--heal", *self.calibration()] if heal else ["--fuse"]))
        self.condensed_row(label, folder, published)
        if tune and self.args.tune:
            tuned = os.path.join(tmp, "tuned")
            self.run("finetune", folder, "--teacher", self.model, "--data", *self.calib, "--steps", self.args.tune, "--batch", 16,
                     "--lr", "1e-3", "-o", tuned)
            self.condensed_row(f"{label}, tuned on {self.args.tune * 8192:,} tokens", tuned)
            self.put_away(tuned, f"{label}, tuned")
        self.put_away(folder, label)

    def put_away(self, folder, label):
        """Keeps a model for later looks, or not."""
        if self.args.keep_models:
            shutil.move(folder, os.path.join(self.args.keep_models, re.sub("[^a-zA-Z0-9]+", "-", label)))
        else:
            shutil.rmtree(folder)

    def condensed_row(self, label, folder, published=False):
        result = self.run("eval", "ppl", folder, "--against", self.model, "--protocol", self.protocol, "--compute", "f32",
                          "--tokens", self.args.tokens, "--text", *self.texts)
        increases = [text["difference"]["nll"] for text in result["texts"]]
        errors = [text["difference"]["standard_error"] for text in result["texts"]]
        mean = sum(increases) / len(increases)
        if published:
            self.published = mean
        share = f"{100 * mean / self.published:.0f} %" if self.published and folder != self.model else ""
        speed = self.run("bench", folder, "-p", 512, "-n", 128)
        cells = [f"{text['perplexity']:.1f}" for text in result["texts"]]
        error = math.sqrt(sum(e * e for e in errors)) / len(errors)
        cells += [f"{mean:+.4f} +- {error:.4f}" if folder != self.model else "", share,
                  f"{self.run('inspect', folder)['bytes'] / 2**20:.1f}", f"{speed['prompt_tokens_per_second']:.0f}",
                  f"{speed['decode_tokens_per_second']:.0f}"]
        print(f"| {label} | {' | '.join(cells)} |", file=self.args.out, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL[:KEEP,...]")
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--corpus", help="folder of texts; without it the bundled ones")
    parser.add_argument("--blocks", type=int, default=65, help="of 512 tokens, over all domains")
    parser.add_argument("--tokens", type=int, default=8192, help="of each domain to judge by")
    parser.add_argument("--methods", nargs="*", default=["frequency", "reap", "weighted-ean", "easy-ep", "aimer", "leave-one-out"])
    parser.add_argument("--condense", type=int, metavar="EXPERTS", help="the table of condensed layers in place of pruning's")
    parser.add_argument("--published-ids", nargs=2, metavar=("SEARCH", "ALPHA"), help="id files of the published calibration")
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="of 16 x 512 tokens, for condensed models")
    parser.add_argument("--keep-models", metavar="FOLDER", help="keeps the condensed models there")
    parser.add_argument("--work", help="folder for temporary files")
    parser.add_argument("-o", "--output", help="file to write; without it standard output")
    args = parser.parse_args()
    with open(args.output, "w", encoding="utf-8") if args.output else sys.stdout as args.out:
        print("# Results\n\nMade by `./dev results`; what every column means is said there and in [METHODS.md](METHODS.md)."
              " Perplexities by domain; nll increase: mean over domains, paired standard error; of published: what is left of"
              " the increase of NAEE's layer-wise choice; s and peak MiB: of planning, or of healing and writing.", file=args.out)
        for argument in args.models or [os.path.join(ROOT, "examples/sample-mixtral") + ":6,4"]:
            model, _, keeps = argument.partition(":")
            if args.condense is not None:
                Measured(model, args).condense(args.condense)
                continue
            Measured(model, args).table([int(keep) for keep in keeps.split(",")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
