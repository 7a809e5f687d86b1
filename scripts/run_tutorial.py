#!/usr/bin/env python3
"""Runs the commands that the tutorial pages quote, in order, in an empty folder: every ```sh block of docs/tutorial/
but those about a reader's own MODEL and `./dev`. Fails with the first that fails. Needs a release build."""
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def commands(page):
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for command in block.replace("\\\n", " ").splitlines():
            command = command.split("#")[0].strip()
            if command and " MODEL" not in command and not command.startswith("./dev"):
                yield command


def main():
    for page in sorted((ROOT / "docs/tutorial").glob("*.md")):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("examples", "build"):
                (pathlib.Path(folder) / name).symlink_to(ROOT / name)
            for command in commands(page):
                run = subprocess.run(["bash", "-c", command], cwd=folder, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT)
                if run.returncode != 0:
                    print(run.stdout)
                    sys.exit(f"{page.relative_to(ROOT)}: `{command}` ends with {run.returncode}")
                print(f"    {command.split()[0].rsplit('/', 1)[-1]} {' '.join(command.split()[1:3])}")


main()
