#!/usr/bin/env python3
"""Kills `observe` and `apply` with SIGKILL at random moments and checks that --resume finishes them.

Each run is killed up to --kills times, restarted with --resume, then left to finish. Its output must be the
same bytes as that of a run nobody disturbed, and after every kill the final name must hold nothing unfinished.
Prints one line per verb, `observe: 20 of 20 ...`, and exits 1 unless all are. Python standard library only.
"""
import argparse
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def files_of(path):
    """{relative name: path} of a file or of everything in a folder."""
    if os.path.isfile(path):
        return {"": path}
    found = {}
    for where, _, names in os.walk(path):
        for name in names:
            full = os.path.join(where, name)
            found[os.path.relpath(full, path)] = full
    return found


def difference(path, reference):
    """What differs between two outputs, or nothing."""
    if not os.path.exists(path):
        return "no output"
    got, want = files_of(path), files_of(reference)
    if set(got) != set(want):
        return f"files differ: {sorted(set(got) ^ set(want))[:4]}"
    for name in sorted(want):
        if not filecmp.cmp(got[name], want[name], shallow=False):
            return f"{name or os.path.basename(path)}: bytes differ"
    return ""


def remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def run_to_end(command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr[-600:]}")


class Trial:
    """One verb: the command without its output, and the output of an undisturbed run."""

    def __init__(self, name, command, folder):
        self.name, self.command, self.folder = name, command, folder
        # Outputs carry their own name nowhere, but give every run the same one all the same.
        self.reference = os.path.join(folder, name + "-undisturbed", "out")
        os.makedirs(os.path.dirname(self.reference))
        start = time.monotonic()
        run_to_end(command + ["-o", self.reference])
        self.seconds = time.monotonic() - start

    def disturb(self, number, kills, rng):
        """Returns (kills that hit a running process, what went wrong or nothing)."""
        where = os.path.join(self.folder, f"{self.name}-{number}")
        out = os.path.join(where, "out")
        os.makedirs(where)
        hits = 0
        for attempt in range(rng.randint(1, kills)):
            command = self.command + ["-o", out] + (["--resume"] if attempt else [])
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, start_new_session=True) as process:
                try:
                    process.wait(timeout=rng.uniform(0.0, self.seconds))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                return hits, f"exit {process.returncode} after {attempt} kills"
            hits += 1
            # A kill after the final rename leaves a complete output; anything else is half-written.
            if os.path.exists(out):
                wrong = difference(out, self.reference)
                if wrong:
                    return hits, f"half-written under its final name ({wrong})"
        if not os.path.exists(out):
            run_to_end(self.command + ["-o", out, "--resume"])
        wrong = difference(out, self.reference)
        left = sorted(set(os.listdir(where)) - {"out"})
        if not wrong and left:
            wrong = f"left behind: {left}"
        shutil.rmtree(where)
        return hits, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--synthetic", default=os.path.join(ROOT, "build/release/tools/make_synthetic_checkpoint"))
    parser.add_argument("--model", default=os.path.join(ROOT, "examples/sample-mixtral"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="largest number of kills of one run")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", help="folder for outputs (default: a temporary one)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        text = os.path.join(ROOT, "examples/text")
        calib = [os.path.join(text, f"{name}.calib.txt.xz") for name in ("prose", "docs", "code", "math", "other")]
        # The sample is rewritten in a few milliseconds, so `apply` gets 0.9 GB in several files.
        large = os.path.join(folder, "large")
        run_to_end([args.synthetic, "--family", "qwen2_moe", "--hidden", "1024", "--layers", "6", "--heads", "8",
                    "--kv-heads", "8", "--vocab", "8192", "--experts", "32", "--expert-width", "640",
                    "--shared-width", "1024", "--dense-width", "1024", "--shard-size", "150000000",
                    "--ids", "512", "--block", "128", "-o", large])
        stats, plan = os.path.join(folder, "large.stats"), os.path.join(folder, "plan.json")
        run_to_end([args.winnow, "observe", large, "--calib", os.path.join(large, "ids.safetensors"), "-o", stats])
        run_to_end([args.winnow, "plan", stats, "--method", "naee", "--keep", "30", "-o", plan])
        trials = [Trial("observe", [args.winnow, "observe", args.model, "--calib", *calib,
                                    "--blocks", str(args.blocks), "--block", "512"], folder),
                  Trial("apply", [args.winnow, "apply", large, "--plan", plan], folder)]
        for trial in trials:
            good = hits = 0
            for number in range(args.runs):
                struck, wrong = trial.disturb(number, args.kills, rng)
                hits += struck
                if wrong:
                    print(f"  {trial.name} run {number}: {wrong}")
                else:
                    good += 1
            print(f"{trial.name}: {good} of {args.runs} runs ended with the same bytes"
                  f" ({hits} kills, {trial.seconds:.1f} s undisturbed)", flush=True)
            failed |= good != args.runs
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
