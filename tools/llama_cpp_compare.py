#!/usr/bin/env python3
"""Speed beside llama.cpp: the same weights at the same bits, decode and prefill, in turns on one machine.

Writes MODEL (OLMoE, or Qwen2-MoE) as GGUF in bf16 and lets llama.cpp quantise it (8bit: Q8_0, 4bit: Q4_0, the token embedding stays
bf16 on both sides); `winnow quantize` writes the same bits in its own format. Requires that both programs compute the same model (logits of
random ids), then runs `winnow bench` and llama.cpp alternately, each in a new process, and prints medians, the ratio of every round, and the
share of the memory bandwidth `winnow bench` measures in the same minute. With --text: the mean loss of both over the same windows.

Needs a few times the size of MODEL in --work. llama-cpp-python is compiled from source into --environment the first time.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import llama_cpp_model as llama  # noqa: E402

KINDS = {"bf16": "bf16", "8bit": "q8_0", "4bit": "q4_0"}  # 16, 8.5 and 4.5 bits a weight on both sides
# Nats, mean KL divergence of llama.cpp's predictions from winnow's, in bf16: products differ in rounding alone, which may choose other experts.
SAME_MODEL = 0.01
# At fewer bits each rounds its own way; both must stay near winnow's bf16, neither this many times as far as the other. Against mistakes,
# such as another model; a better grid has a quarter of the other's divergence.
SIMILAR_ERRORS = 10
BUSY = 0.1  # share of the CPUs that others use, before a round, above which the figures are called provisional
LOOK_SECONDS = 2


def progress(text):
    print(text, file=sys.stderr, flush=True)


def fresh(path, *sources):
    newest = max(os.path.getmtime(os.path.join(source, "config.json") if os.path.isdir(source) else source) for source in sources)
    return os.path.exists(path) and os.path.getmtime(path) >= newest


def use_all_experts(model, folder):
    """A copy of a Qwen2-MoE model that runs all experts, where renormalising changes nothing; the routed outputs keep their mean size."""
    import numpy
    checkpoint = llama.Checkpoint(model)
    config = checkpoint.config
    factor = config["num_experts"] / config["num_experts_per_tok"]
    if factor != 2 ** round(numpy.log2(factor)):
        sys.exit("--all-experts: experts per token are no power of two away from all, so that bf16 would round")
    os.makedirs(folder, exist_ok=True)
    header, begin = {}, 0
    for name in checkpoint.entries:
        size = len(checkpoint.bytes(name))
        header[name] = {"dtype": checkpoint.dtype(name), "shape": checkpoint.shape(name), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in checkpoint.entries:
            if ".experts." in name and name.endswith("down_proj.weight"):
                scaled = (checkpoint.float32(name) * factor).view(numpy.uint32) >> 16  # a power of two: exact
                scaled.astype("<u2").tofile(out)
            else:
                checkpoint.bytes(name).tofile(out)
    for name in os.listdir(model):
        if name.startswith("tokenizer") or name == "generation_config.json":
            with open(os.path.join(model, name), "rb") as source, open(os.path.join(folder, name), "wb") as copy:
                copy.write(source.read())
    config.update(num_experts_per_tok=config["num_experts"], norm_topk_prob=False)
    with open(os.path.join(folder, "config.json"), "w") as out:
        json.dump(config, out, indent=2)
    return folder


def prepare(args):
    """{bits: (folder for winnow, GGUF for llama.cpp)}; what is there from an earlier run and newer than its source is kept."""
    os.makedirs(args.work, exist_ok=True)
    model = args.model
    name = os.path.basename(os.path.abspath(model))
    if args.all_experts:
        name += "-all"
        copy = os.path.join(args.work, name)
        if not fresh(os.path.join(copy, "config.json"), model):
            progress(f"writing {copy}")
            use_all_experts(model, copy)
        model = copy
    tied = json.load(open(os.path.join(model, "config.json"))).get("tie_word_embeddings", False)
    base = os.path.join(args.work, name + ".bf16.gguf")
    if not fresh(base, model):
        progress(f"writing {base}")
        llama.write_gguf(model, base)
    pairs = {}
    for bits in {"bf16", *args.bits}:  # bf16 always: what the others are checked against
        kind, folder = KINDS[bits], model
        path = os.path.join(args.work, f"{name}.{kind}.gguf")
        if bits != "bf16":
            folder = os.path.join(args.work, f"{name}.{bits}")
            if not fresh(path, base):
                progress(f"writing {path}")
                # A tied output is the embedding, which winnow leaves as it is.
                llama.run(sys.executable, __file__, "--child", json.dumps({"quantise": [base, path, kind, "bf16" if tied else "same"]}))
            if not fresh(os.path.join(folder, "config.json"), model):
                progress(f"writing {folder}")
                llama.run(args.winnow, "quantize", model, "--experts", bits, "--rest", bits, "-o", folder, "--force", "-q")
        pairs[bits] = (folder, path)
    return pairs


def write_ids(path, rows):
    """A safetensors file with input_ids [rows, tokens]; no package is needed for so little."""
    import numpy
    ids = numpy.asarray(rows, dtype="<i4")
    header = json.dumps({"input_ids": {"dtype": "I32", "shape": list(ids.shape), "data_offsets": [0, ids.nbytes]}}).encode()
    with open(path, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header + ids.tobytes())


def log_softmax(logits):
    import numpy
    logits = logits.astype(numpy.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=-1, keepdims=True))


def predictions(args, folder, gguf, row, tmp):
    """Log-probabilities [tokens, vocabulary] of the next token after each of `row`, of winnow and of llama.cpp."""
    import numpy
    ids, trace, array = (os.path.join(tmp, name) for name in ("ids.safetensors", "trace.safetensors", "logits.npy"))
    write_ids(ids, [row])
    llama.run(args.winnow, "trace", folder, "--ids", ids, "-o", trace, "--threads", args.threads, "--force", "-q")
    child({"logits": [gguf, args.threads, row, array]})
    ours = llama.Checkpoint(tmp, "trace.safetensors", config=False).float32("logits")
    return log_softmax(ours.reshape(len(row), -1)), log_softmax(numpy.load(array))


def agreement(args, pairs, tmp):
    """Whether both programs run the same model: {bits: mean KL divergence from winnow's bf16 of (winnow, llama.cpp)}, on random ids."""
    import numpy
    found, reference = {}, None
    for bits in KINDS:
        if bits not in pairs:
            continue
        folder, gguf = pairs[bits]
        vocabulary = json.load(open(os.path.join(folder, "config.json")))["vocab_size"]
        row = [int(i) for i in numpy.random.default_rng(1).integers(0, vocabulary, args.agreement_tokens)]
        both = predictions(args, folder, gguf, row, tmp)
        if reference is None:
            reference = both[0]
        found[bits] = tuple(float((numpy.exp(reference) * (reference - one)).sum(axis=-1).mean()) for one in both)
        ours, theirs = found[bits]
        progress(f"{bits}: mean KL from bf16 {ours:.1e} winnow, {theirs:.1e} llama.cpp; same likeliest token "
                 f"{100 * (both[0].argmax(-1) == both[1].argmax(-1)).mean():.0f} %")
        if not (theirs <= SAME_MODEL if bits == "bf16" else max(found[bits]) <= SIMILAR_ERRORS * min(found[bits]) + SAME_MODEL):
            sys.exit(f"{bits}: the two programs do not run the same model")
    return found


def child(request):
    """llama.cpp in a process of its own, so that memory and threads of one measurement are gone before the next."""
    return json.loads(llama.run(sys.executable, __file__, "--child", json.dumps(request)).splitlines()[-1])


def others_share():
    """Share of the CPUs' time that is used while we do nothing."""
    def ticks():
        with open("/proc/stat") as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle and waiting for disks

    total, idle = ticks()
    time.sleep(LOOK_SECONDS)
    later, later_idle = ticks()
    return 1 - (later_idle - idle) / max(later - total, 1)


def wait_until_quiet(seconds):
    """The share others use when it is low, or after so many seconds as it is."""
    end = time.monotonic() + seconds
    share = others_share()
    while share > BUSY and time.monotonic() < end:
        share = others_share()
    return share


def bench_winnow(args, folder):
    return json.loads(llama.run(args.winnow, "bench", folder, "-p", args.prompt, "-n", args.new, "-r", args.repetitions,
                                "--threads", args.threads, "--json", "-q"))


def serve_child(request):
    import numpy
    result = {}
    if "bench" in request:
        result = llama.bench(*request["bench"])
    elif "quantise" in request:
        llama.quantise_gguf(*request["quantise"])
    elif "logits" in request:
        path, threads, ids, out = request["logits"]
        numpy.save(out, llama.LlamaModel(path, threads, context=max(512, len(ids))).logits(ids))
    elif "losses" in request:
        path, threads, ids = request["losses"]
        rows = numpy.load(ids)
        model = llama.LlamaModel(path, threads, context=rows.shape[1])
        losses = []
        for row in rows:
            logits = model.logits([int(i) for i in row[:-1]])
            largest = logits.max(axis=-1, keepdims=True)
            normaliser = largest[:, 0] + numpy.log(numpy.exp(logits - largest).sum(axis=-1, dtype=numpy.float64))
            losses.append(float((normaliser - logits[numpy.arange(len(logits)), row[1:]]).mean()))
        result = {"losses": losses}
    elif "description" in request:
        result = llama.description()
    print(json.dumps(result))
    return 0


def measure(args, pairs):
    """Rounds of both programs at each width, who goes first alternating: a slow drift of the machine meets both alike."""
    rounds = {bits: [] for bits in pairs}
    for i in range(args.rounds):
        for bits, (folder, gguf) in pairs.items():
            one = {"others": wait_until_quiet(args.wait)}
            for who in (("winnow", "llama_cpp") if i % 2 == 0 else ("llama_cpp", "winnow")):
                one[who] = (bench_winnow(args, folder) if who == "winnow"
                            else child({"bench": [gguf, args.threads, args.prompt, args.new, args.repetitions]}))
            ours, theirs = one["winnow"], one["llama_cpp"]
            one["decode"] = ours["decode_tokens_per_second"], statistics.mean(theirs["decode"])
            one["prompt"] = ours["prompt_tokens_per_second"], statistics.mean(theirs["prompt"])
            one["bandwidth"] = [rate * ours["bytes_per_token"] * 1e-9 / ours["dram_gb_per_second"] for rate in one["decode"]]
            rounds[bits].append(one)
            progress(f"round {i + 1} {bits}: " + ", ".join(f"{kind} {one[kind][0]:.2f} / {one[kind][1]:.2f} = {one[kind][0] / one[kind][1]:.2f}x"
                                                           for kind in ("prompt", "decode"))
                     + f", {100 * one['bandwidth'][0]:.0f} % of {ours['dram_gb_per_second']:.1f} GB/s, others {100 * one['others']:.0f} % of the CPUs")
    return rounds


def losses(args, pairs, tmp):
    """Mean loss of both on the same windows: BOS (if the model has one) and the next 512 tokens, those scored."""
    import lzma
    import numpy
    rows = []
    for text in args.text:
        content = (lzma.open if text.endswith(".xz") else open)(text, "rt", encoding="utf-8").read()
        config = json.load(open(os.path.join(args.model, "config.json")))
        lines = os.path.join(tmp, "text.jsonl")
        with open(lines, "w") as out:
            out.write(json.dumps({"text": content}) + "\n")
        ids = json.loads(llama.run(args.winnow, "tokenize", args.model, "--jsonl", lines, "-q").splitlines()[0])["ids"]
        for start in range(0, min(len(ids), args.tokens) - 511, 512):
            rows.append([config["bos_token_id"]] + ids[start:start + 512] if config.get("bos_token_id") is not None else ids[start:start + 512])
    windows, array = os.path.join(tmp, "windows.safetensors"), os.path.join(tmp, "windows.npy")
    write_ids(windows, rows)
    numpy.save(array, numpy.asarray(rows))
    found = {}
    for bits, (folder, gguf) in pairs.items():
        ours = json.loads(llama.run(args.winnow, "eval", "ppl", folder, "--ids", windows, "--threads", args.threads, "--json", "-q"))
        theirs = child({"losses": [gguf, args.threads, array]})["losses"]
        found[bits] = {"winnow": ours["nll"], "llama_cpp": statistics.mean(theirs), "windows": len(rows)}
        progress(f"{bits}: loss {found[bits]['winnow']:.4f} / {found[bits]['llama_cpp']:.4f} over {len(rows)} windows")
    return found


def folder_bytes(folder):
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder) if name.endswith(".safetensors"))


def print_report(args, report, pairs):
    about = report["llama_cpp"]
    print(f"llama-cpp-python {about['llama_cpp_python']} ({', '.join(about['system_info'])})")
    print(f"{report['machine']}, {args.threads} threads; pp{args.prompt}, tg{args.new} from an empty context; "
          f"medians of {args.rounds} rounds of {args.repetitions} runs; llama.cpp with mmap, files cached")
    print("\n| bits | GB winnow / llama.cpp | KL from bf16, both | test | winnow t/s | llama.cpp t/s | ratio of each round | median ratio | of RAM's read, both |")
    print("|---|--:|--:|---|--:|--:|---|--:|--:|")
    for bits, rounds in report["rounds"].items():
        folder, gguf = pairs[bits]
        for kind, test in (("prompt", f"pp{args.prompt}"), ("decode", f"tg{args.new}")):
            ratios = [one[kind][0] / one[kind][1] for one in rounds]
            shares = [100 * statistics.median(one["bandwidth"][who] for one in rounds) for who in (0, 1)]
            share = f"{shares[0]:.0f} / {shares[1]:.0f} %" if kind == "decode" else ""
            print(f"| {bits} / {KINDS[bits]} | {folder_bytes(folder) * 1e-9:.2f} / {os.path.getsize(gguf) * 1e-9:.2f} "
                  f"| {' / '.join(f'{kl:.1e}' for kl in report['kl'][bits])} | {test} | {statistics.median(one[kind][0] for one in rounds):.2f} | {statistics.median(one[kind][1] for one in rounds):.2f} "
                  f"| {', '.join(f'{ratio:.2f}' for ratio in ratios)} | **{statistics.median(ratios):.2f}** | {share} |")
    for bits, found in report["losses"].items():
        print(f"{bits}: loss {found['winnow']:.4f} winnow, {found['llama_cpp']:.4f} llama.cpp {KINDS[bits]}, {found['windows']} windows")
    shares = [one["others"] for rounds in report["rounds"].values() for one in rounds]
    if shares and max(shares) > BUSY:
        print(f"\nOther programs used {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the CPUs before the rounds: provisional.")


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} CPUs"
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--work", default=os.path.join(ROOT, "build/llama_cpp"), help="folder for the written models")
    parser.add_argument("--environment", default=os.path.join(ROOT, "build/llama_cpp_environment"), help="Python environment, made if missing")
    parser.add_argument("--bits", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3, help="0: no speeds")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of a round")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="before each run of a pair, for other programs to finish")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--agreement-tokens", type=int, default=64)
    parser.add_argument("--all-experts", action="store_true", help="compare a copy of MODEL that runs all experts: see norm_topk_prob")
    parser.add_argument("--text", nargs="*", default=[], help="texts to measure the loss on")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return serve_child(json.loads(args.child))
    if not args.model:
        parser.error("MODEL is missing")
    llama.enter_environment(args.environment)
    pairs = prepare(args)
    report = {"model": args.model, "machine": processor(), "threads": args.threads, "llama_cpp": child({"description": True})}
    with tempfile.TemporaryDirectory(dir=args.work) as tmp:
        report["kl"] = agreement(args, pairs, tmp)
        pairs = {bits: pairs[bits] for bits in args.bits}
        report["rounds"] = measure(args, pairs) if args.rounds else {}
        report["losses"] = losses(args, pairs, tmp) if args.text else {}
    print_report(args, report, pairs)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(report, out, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
