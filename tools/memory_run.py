#!/usr/bin/env python3
"""Prunes a 13.8 GB checkpoint of OLMoE-1B-7B's shape within a memory budget and prints what it took.

Writes the checkpoint (pseudo-random weights), observes 4,096 random token ids with --stats full (also with the files in
the page cache, and reads them without computing), plans with NAEE, applies, and copies the result with cp for comparison; with --heal it heals
the pruned model too. The page cache is emptied of the files before each step.
Needs about 42 GB of disk while it runs; removes everything unless --keep-files. Python standard library only.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def forget_cached(folder):
    """Writes a folder's files out and drops them from the page cache."""
    for where, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(where, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def read_files(folder):
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass


def size_of(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(path) for name in names)


class Step:
    """Runs a command; measures wall time, peak resident set and bytes it asked the kernel to read."""

    def __init__(self, name, command):
        start = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   text=True)
        self.output = process.stdout.read()
        # The counters stay readable between exit and reaping.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with open(f"/proc/{process.pid}/io", encoding="ascii") as io:
            self.read_bytes = int(next(line for line in io if line.startswith("rchar")).split()[1])
        _, status, usage = os.wait4(process.pid, 0)
        self.name, self.seconds = name, time.monotonic() - start
        self.peak_bytes = usage.ru_maxrss * 1024
        self.processor_seconds = usage.ru_utime + usage.ru_stime
        if status:
            sys.exit(f"{name} failed with {os.waitstatus_to_exitcode(status)}: {' '.join(map(str, command))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--synthetic", default=os.path.join(ROOT, "build/release/tools/make_synthetic_checkpoint"))
    parser.add_argument("--work", default=os.path.join(ROOT, "build/memory_run"))
    parser.add_argument("--max-memory", default="3G")
    parser.add_argument("--keep", default="62")
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--threads", help="passed on to winnow")
    parser.add_argument("--heal", action="store_true", help="also heal the pruned model, under 4G")
    parser.add_argument("--keep-files", action="store_true", help="leave the checkpoint there, and use it if it is")
    parser.add_argument("shape", nargs="*", help="options of make_synthetic_checkpoint, after --")
    args = parser.parse_args()
    model, stats, warm, plan, out, copy = (os.path.join(args.work, name) for name in
                                           ("model", "stats", "stats-in-cache", "plan.json", "pruned", "copy"))
    os.makedirs(args.work, exist_ok=True)
    limits = ["--max-memory", args.max_memory] + (["--threads", args.threads] if args.threads else [])
    for old in (stats, warm, plan, out, copy):
        shutil.rmtree(old, ignore_errors=True)
        if os.path.isfile(old):
            os.remove(old)
    try:
        if not os.path.exists(os.path.join(model, "config.json")):
            step = Step("write checkpoint", [args.synthetic, "--ids", args.ids, *args.shape, "-o", model])
            print(f"checkpoint: {step.output.strip()}", flush=True)
        total = size_of(model)
        print(f"{'step':<10} {'wall s':>8} {'CPU s':>8} {'peak RSS MB':>12} {'read GB':>8} {'read / checkpoint':>18}")

        def report(name, command, cold):
            forget_cached(cold)
            step = Step(name, command)
            print(f"{name:<10} {step.seconds:>8.1f} {step.processor_seconds:>8.1f} {step.peak_bytes / 1e6:>12.0f}"
                  f" {step.read_bytes / 1e9:>8.2f} {step.read_bytes / total:>18.3f}", flush=True)
            return step

        observe_command = [args.winnow, "observe", model, "--calib", os.path.join(model, "ids.safetensors"),
                           "--stats", "full", *limits]
        observe = report("observe", [*observe_command, "-o", stats], model)
        forget_cached(model)
        start = time.monotonic()
        read_files(model)
        reading_seconds = time.monotonic() - start
        # The files are in the page cache now, if it holds them.
        computing = report("in cache", [*observe_command, "-o", warm], args.work + "/nothing")
        shutil.rmtree(warm)
        alone = max(reading_seconds, computing.seconds)
        print(f"observe takes {observe.seconds / alone:.2f} of the larger of computing alone ({computing.seconds:.1f} s) and"
              f" reading alone ({reading_seconds:.1f} s)", flush=True)
        report("plan", [args.winnow, "plan", stats, "--method", "naee", "--keep", args.keep, "-o", plan], args.work)
        apply = report("apply", [args.winnow, "apply", model, "--plan", plan, *limits, "-o", out], model)
        start = time.monotonic()
        forget_cached(out)
        apply_seconds = apply.seconds + time.monotonic() - start
        written = size_of(out)
        start = time.monotonic()
        subprocess.run(["cp", "-r", out, copy], check=True)
        forget_cached(copy)
        copy_seconds = time.monotonic() - start
        print(f"checkpoint {total / 1e9:.2f} GB, statistics {size_of(stats) / 1e6:.0f} MB, pruned {written / 1e9:.2f} GB")
        print(f"apply {written / 1e6 / apply_seconds:.0f} MB/s, cp -r of the result {written / 1e6 / copy_seconds:.0f} MB/s"
              f" (both until the data is on disk): apply takes {apply_seconds / copy_seconds:.2f} of the time of cp")
        if args.heal:
            for old in (copy, out):
                shutil.rmtree(old, ignore_errors=True)
            threads = ["--threads", args.threads] if args.threads else []
            heal = report("heal", [args.winnow, "apply", model, "--plan", plan, "--heal", "--calib",
                                   os.path.join(model, "ids.safetensors"), "--max-memory", "4G", *threads, "-o", out], model)
            print(f"healing and writing take {heal.seconds / observe.seconds:.2f} of the time of observing")
    finally:
        for old in (copy, out, stats, warm):
            shutil.rmtree(old, ignore_errors=True)
        if not args.keep_files:
            shutil.rmtree(args.work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
