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
    dtype = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **{dtype: torch.float32})
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


def prune(winnow, model, calibration, keep, name, tmp):
    stats, plan, pruned = (os.path.join(tmp, f"{name}.{kind}") for kind in ("stats", "plan.json", "pruned"))
    run(winnow, "observe", model, *calibration, "-o", stats)
    run(winnow, "plan", stats, "--method", "naee", "--keep", keep, "-o", plan)
    run(winnow, "apply", model, "--plan", plan, "-o", pruned)
    return pruned


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--synthetic", default=os.path.join(ROOT, "build/release/tools/make_synthetic_checkpoint"))
    parser.add_argument("--model", default=os.path.join(ROOT, "examples/sample-mixtral"))
    parser.add_argument("--keep", default=6)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    domains = ("prose", "docs", "code", "math", "other")
    text = ["--calib", *(os.path.join(ROOT, f"examples/text/{name}.calib.txt.xz") for name in domains), "--blocks", 32]
    with tempfile.TemporaryDirectory() as tmp:
        results = [compare(args.winnow, args.model, "sample", tmp)]
        pruned = prune(args.winnow, args.model, text, args.keep, "sample", tmp)
        results.append(compare(args.winnow, pruned, "sample-pruned", tmp))
        # The other families stock transformers has, as small models of random weights.
        for family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
            model = os.path.join(tmp, family)
            run(args.synthetic, "--family", family, "--hidden", 64, "--layers", 3, "--heads", 4, "--kv-heads", 2,
                "--head-dim", 16, "--vocab", 320, "--experts", 8, "--top-k", 3, "--expert-width", 32,
                "--shared-width", 48, "--dense-width", 48, "--ids", 256, "--block", 64, "-o", model)
            ids = ["--calib", os.path.join(model, "ids.safetensors")]
            results.append(compare(args.winnow, prune(args.winnow, model, ids, 5, family, tmp), family + "-pruned", tmp))
    print(f"transformers {transformers.__version__}: {sum(results)} of {len(results)} agree")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
