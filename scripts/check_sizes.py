#!/usr/bin/env python3
"""Files that a person can read in one sitting: headers up to 300 lines, sources up to 600.

A file that has to be longer stands in scripts/size_exceptions.txt with its reason; an entry that is
no longer needed is a fault too. Nothing in the repository may exceed 10 MB.
"""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMITS = {".h": 300, ".cc": 600, ".py": 600, ".sh": 600}
LARGEST_BYTES = 10_000_000


def read_exceptions(path):
    entries = {}
    for line in open(path, encoding="utf-8"):
        name, _, reason = line.partition("#")
        if name.strip():
            entries[name.strip()] = reason.strip()
    return entries


def main():
    exceptions = read_exceptions(os.path.join(ROOT, "scripts/size_exceptions.txt"))
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
                            capture_output=True, text=True, check=True).stdout.splitlines()
    faults = [f"{name}: listed in scripts/size_exceptions.txt without a reason"
              for name, reason in exceptions.items() if not reason]
    needed = set()
    for name in listed:
        path = os.path.join(ROOT, name)
        if not os.path.isfile(path):
            continue
        if os.path.getsize(path) > LARGEST_BYTES:
            faults.append(f"{name}: larger than {LARGEST_BYTES} bytes")
        limit = LIMITS.get(os.path.splitext(name)[1])
        if limit is None:
            continue
        with open(path, encoding="utf-8") as source:
            lines = sum(1 for _ in source)
        if lines > limit:
            needed.add(name)
            if name not in exceptions:
                faults.append(f"{name}: {lines} lines, limit {limit}: split it by topic")
    faults += [f"{name}: needs no entry in scripts/size_exceptions.txt" for name in exceptions if name not in needed]
    for line in faults:
        print(line)
    print(f"file sizes: {len(faults)} faults" if faults else "file sizes: ok")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
