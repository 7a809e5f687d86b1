#!/usr/bin/env python3
"""Who may include whom, who may print, and whether the documents' links lead anywhere.

Reads scripts/include_rules.txt: a folder of src/ (or cli) and the folders it may include. Checks:
  - every `#include "folder/file.h"` exists and stays within the folder's row; the rows have no cycle
  - only kernels/*.cc (through kernels/*-inl.h) includes Highway or oneDNN, only base/json.h nlohmann
  - nothing but cli/ (and tests, benches, fuzz targets, tools) prints or exits
  - relative links in *.md lead to a file, and to a heading where they name one
Prints each fault as `file:line: what` and exits 1 if there is any.
"""
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
PRINTS = re.compile(
    r"\bstd::(cout|cerr|clog)\b|(?<![\w:.>])(?:std::)?(?:v?printf|v?fprintf|puts|fputs|putchar|perror)\s*\(|\b(?:stdout|stderr)\b"
    r"|\bfmt::print(?:ln)?\s*\(|#\s*include\s*<(?:iostream|fmt/color\.h)>")
EXITS = re.compile(r"(?<![\w:.>])(?:std::)?(?:exit|_exit|_Exit|quick_exit|abort|terminate)\s*\(")
# A test may print and a fuzz target may abort: they are programs of their own.
OWN_PROGRAM = re.compile(r"_(test|bench|fuzz)\.cc$")
faults = []


def fault(path, line, what):
    faults.append(f"{os.path.relpath(path, ROOT)}:{line}: {what}")


def read_rules():
    path, rules = os.path.join(ROOT, "scripts/include_rules.txt"), {}
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        folder, _, allowed = line.partition(":")
        if folder in rules:
            fault(path, number, f"{folder} has two rows")
        rules[folder] = allowed.split()
        for name in rules[folder]:
            if name not in rules:
                # Rows name only rows above them: that alone rules out a cycle.
                fault(path, number, f"{folder} may include {name}, which no row above defines (a cycle, or a misspelling)")
    return rules


def without_comments(text):
    """Comments and string contents blanked, line breaks kept."""
    def blank(match):
        piece = match.group(0)
        return re.sub(r"[^\n]", " ", piece) if piece[0] == "/" else piece[0] + piece[-1]
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def check_file(path, folder, rules):
    base, name = os.path.basename(path), os.path.relpath(path, os.path.join(ROOT, "src"))
    text = open(path, encoding="utf-8").read()
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        quote, target = match.groups()
        if target.startswith("hwy/") or re.match(r"(oneapi/)?dnnl", target):
            # Highway's own habit: *-inl.h holds vector code that each kernels/*.cc compiles per target.
            if folder != "kernels" or not path.endswith((".cc", "-inl.h")):
                fault(path, number, f"{target}: only kernels/*.cc may include Highway or oneDNN")
        elif target.startswith("nlohmann/"):
            if name != "base/json.h":
                fault(path, number, f"{target}: include base/json.h instead")
        elif quote == '"':
            if "/" not in target:
                # Programs of their own (cli/) see their own folder; the library is written from src/.
                if folder != "cli" or not os.path.exists(os.path.join(os.path.dirname(path), target)):
                    fault(path, number, f'"{target}": write includes from src/, as "folder/file.h"')
                continue
            if target.endswith("-inl.h") and not (folder == "kernels" and path.endswith((".cc", "-inl.h"))):
                fault(path, number, f'"{target}": only kernels/*.cc may include vector code')
            other = target.split("/")[0]
            home = ROOT if other == "cli" else os.path.join(ROOT, "src")
            if not os.path.exists(os.path.join(home, target)):
                fault(path, number, f'"{target}": there is no such file')
            elif other not in rules:
                fault(path, number, f"folder {other} has no row in scripts/include_rules.txt")
            elif other != folder and other not in rules[folder] and not OWN_PROGRAM.search(base):
                fault(path, number, f"{folder} may not include {other} (scripts/include_rules.txt)")
    if folder == "cli" or OWN_PROGRAM.search(base):
        return
    for number, line in enumerate(without_comments(text).splitlines(), 1):
        if PRINTS.search(line):
            fault(path, number, "only cli/ prints; return the value or throw")
        if EXITS.search(line):
            fault(path, number, "only cli/ ends the program; throw one of base/error.h")


def check_sources(rules):
    for top in ("src", "cli"):
        for where, folders, files in os.walk(os.path.join(ROOT, top)):
            folders.sort()
            inside = os.path.relpath(where, os.path.join(ROOT, "src")).split(os.sep)[0]
            folder = "cli" if top == "cli" else inside
            sources = sorted(f for f in files if f.endswith((".h", ".cc")))
            if sources and folder not in rules:
                fault(where, 0, "folder has no row in scripts/include_rules.txt")
                continue
            for name in sources:
                check_file(os.path.join(where, name), folder, rules)


def anchors(path):
    """GitHub's names for the headings of a document."""
    found, fenced = set(), False
    for line in open(path, encoding="utf-8"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        match = None if fenced else re.match(r"#{1,6}\s+(.*)", line)
        if match:
            words = re.sub(r"[^\w\- ]", "", match.group(1).strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def check_links():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "*.md"],
                             capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        path, fenced = os.path.join(ROOT, name), False
        if not os.path.exists(path):
            continue
        for number, line in enumerate(open(path, encoding="utf-8"), 1):
            if line.lstrip().startswith("```"):
                fenced = not fenced
            if fenced:
                continue
            for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
                if re.match(r"[a-z][a-z0-9+.-]*:", target):
                    continue
                file, _, heading = target.partition("#")
                goal = os.path.normpath(os.path.join(os.path.dirname(path), file)) if file else path
                if not os.path.exists(goal):
                    fault(path, number, f"dead link {target}")
                elif heading and goal.endswith(".md") and heading not in anchors(goal):
                    fault(path, number, f"dead link {target}: no such heading")


def main():
    check_sources(read_rules())
    check_links()
    for line in faults:
        print(line)
    print(f"includes and links: {len(faults)} faults" if faults else "includes and links: ok")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
