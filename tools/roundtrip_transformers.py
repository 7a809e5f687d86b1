#!/usr/bin/env python3
"""Loads what winnow writes with Hugging Face transformers and compares logits with `winnow trace`.

Prunes the model to --keep experts, loads original and result with transformers, and requires that no tensor is
missing, unexpected or misshapen and that logits agree within 1e-4. Needs torch, transformers and safetensors
(`./dev verify DATA --transformers` makes the environment); a development tool, not a part of the program.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOLERANCE = 1e-4  # both compute in float32; sums are ordered differently


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def compare(winnow, folder, name, tmp):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    faults = [f"{key} {sorted(info[key])[:3]}" for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
              if info.get(key)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 96), generator=generator)
    save_file({"input_ids": ids}, os.path.join(tmp, "ids.safetensors"))
    trace = os.path.join(tmp, name + ".trace.safetensors")
    run(winnow, "trace", folder, "--ids", os.path.join(tmp, "ids.safetensors"), "-o", trace, "--compute", "f32")
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
    error = (load_file(trace)["logits"] - want).abs().max().item()
    if not error <= TOLERANCE:
        faults.append(f"logits off by {error:.2e}")
    print(f"{name}: {'; '.join(faults) if faults else 'loads cleanly'}, logits {error:.1e}")
    return not faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--model", default=os.path.join(ROOT, "examples/sample-mixtral"))
    parser.add_argument("--keep", default="6")
    args = parser.parse_args()
    calib = [os.path.join(ROOT, f"examples/text/{name}.calib.txt.xz") for name in ("prose", "docs", "code", "math", "other")]
    with tempfile.TemporaryDirectory() as tmp:
        stats, plan, pruned = (os.path.join(tmp, name) for name in ("stats", "plan.json", "pruned"))
        run(args.winnow, "observe", args.model, "--calib", *calib, "--blocks", 32, "--block", 512, "-o", stats)
        run(args.winnow, "plan", stats, "--method", "naee", "--keep", args.keep, "-o", plan)
        run(args.winnow, "apply", args.model, "--plan", plan, "-o", pruned)
        results = [compare(args.winnow, args.model, "original", tmp), compare(args.winnow, pruned, "pruned", tmp)]
    print(f"transformers {transformers.__version__}: {sum(results)} of {len(results)} agree")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
