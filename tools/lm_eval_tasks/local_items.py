"""Data of the tasks beside this file: the .jsonl files that `winnow eval tasks` reads, from the folder that the environment
variable WINNOW_TASK_DATA names (default: the working folder)."""
import os

import datasets


def load(file, **_):
    folder = os.environ.get("WINNOW_TASK_DATA", ".")
    path = os.path.join(folder, file)
    if not os.path.exists(path) and path.endswith(".xz"):
        path = path[: -len(".xz")]
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; WINNOW_TASK_DATA names the folder of the .jsonl files")
    return datasets.load_dataset("json", data_files={"test": path})
