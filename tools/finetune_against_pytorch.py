#!/usr/bin/env python3
"""Fine-tuning beside PyTorch: the same condensed checkpoint, rows, steps and threads; speed, memory and losses.

Condenses the first layers of a model, writes it in f32 with --export-code, and takes the same AdamW steps on the experts of the
condensed layers with `winnow finetune` and with PyTorch, which loads the exported modelling code. Prints tokens/s of both (the first
step not counted), their ratio, the peak resident sets and the largest difference of the losses. Needs torch, transformers,
safetensors and numpy; run it on a quiet machine.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOMAINS = ("prose", "docs", "code", "math", "other")


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\nexit {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def with_pytorch(folder, rows, args):
    """In a process of its own, so that its peak memory is its own."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    condensed = [f"layers.{layer}.mlp." for layer in json.load(open(os.path.join(folder, "config.json")))["condensed_layers"]]
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in condensed)
        if parameter.requires_grad:
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    ids = torch.from_numpy(load_file(rows)["input_ids"])
    losses, seconds = [], []
    for step in range(args.steps):
        batch = ids[step * args.batch:(step + 1) * args.batch]
        start = time.monotonic()
        logits = model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - start)
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "seconds": seconds,
                      "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--model", default=os.path.join(ROOT, "examples/sample-deepseek"))
    parser.add_argument("--layers", default="0,1", help="to condense, among the MoE layers")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pytorch", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pytorch:
        return with_pytorch(*args.pytorch, args)
    import numpy
    from safetensors.numpy import save_file

    texts = [os.path.join(ROOT, f"examples/text/{domain}.calib.txt.xz") for domain in DOMAINS]
    with tempfile.TemporaryDirectory() as tmp:
        def path(name):
            return os.path.join(tmp, name)

        run(args.winnow, "observe", args.model, "--method", "cd-moe", "--max-experts", args.experts, "--blocks", 10, "--calib", *texts,
            "-o", path("stats"), "-q")
        run(args.winnow, "plan", path("stats"), "--method", "cd-moe", "--experts", args.experts, "--moe-layers", args.layers,
            "--model", args.model, "-o", path("plan.json"), "-q")
        run(args.winnow, "apply", args.model, "--plan", path("plan.json"), "--dtype", "f32", "--export-code", "-o", path("model"), "-q")
        vocabulary = json.load(open(path("model/config.json")))["vocab_size"]
        rows = numpy.random.default_rng(1).integers(3, vocabulary, (args.steps * args.batch, args.tokens))
        save_file({"input_ids": rows.astype("int64")}, path("rows.safetensors"))
        order = [list(range(step * args.batch, (step + 1) * args.batch)) for step in range(args.steps)]
        json.dump(order, open(path("order.json"), "w"))

        def tune(steps, out):
            json.dump(order[:steps], open(path("order.json"), "w"))
            return json.loads(run(args.winnow, "finetune", path("model"), "--rows", path("rows.safetensors"), "--row-order", path("order.json"),
                                  "--batch", args.batch, "--lr", args.lr, "--schedule", "constant", "--warmup", 0, "--held-out", 0, "--compute", "f32",
                                  "--dtype", "f32", "--threads", args.threads, "--log", path(out + ".jsonl"), "-o", path(out), "--json", "-q"))

        ours = tune(args.steps, "tuned")
        mine = [json.loads(line)["loss"] for line in open(path("tuned.jsonl"))]
        other = json.loads(run(sys.executable, __file__, "--pytorch", path("model"), path("rows.safetensors"), "--batch", args.batch, "--lr", args.lr,
                               "--steps", args.steps, "--threads", args.threads).splitlines()[-1])
    per_step = args.batch * args.tokens
    rate = per_step * (args.steps - 1) / sum(other["seconds"][1:])
    print(f"winnow   {ours['tokens_per_second']:8.0f} tokens/s, peak {ours['peak_rss_bytes'] / 2**20:6.0f} MiB")
    print(f"pytorch  {rate:8.0f} tokens/s, peak {other['peak'] / 2**20:6.0f} MiB")
    print(f"ratio    {ours['tokens_per_second'] / rate:8.2f}x at {ours['peak_rss_bytes'] / other['peak']:.2f} of the memory;"
          f" largest difference of the losses {max(abs(a - b) for a, b in zip(mine, other['losses'])):.1e} over {args.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
