"""llama.cpp beside Winnow, for the comparing tools here: its environment, its GGUF files, its speed and its logits.

GGUF files are written from a Hugging Face folder with the `gguf` package, a tensor at a time, and quantised by llama.cpp itself;
models run through the low-level calls of llama-cpp-python, built from source for this machine. Development only.
"""
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
import venv

PACKAGES = ("llama-cpp-python", "gguf", "numpy")
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}  # every instruction of this processor; no image models
FTYPES = {"bf16": 32, "q8_0": 7, "q4_0": 2, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q4_k_m": 15, "q5_k": 16,
          "q6_k": 18}  # llama_ftype; _S where there is one
BF16 = 30  # ggml_type
TOLERATED_UNUSED = ("rotary_emb.inv_freq",)


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\nexit {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def enter_environment(folder):
    """Goes on in the Python environment `folder`, which is made if it does not exist: llama.cpp compiles for half an hour on two cores."""
    python = os.path.join(os.path.abspath(folder), "bin", "python")
    if os.path.abspath(sys.prefix) == os.path.abspath(folder):
        return
    if not os.path.exists(python):
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode:
        print(f"building {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "--no-cache-dir", "--no-binary", "llama-cpp-python", *PACKAGES], check=True,
                       stdout=sys.stderr, env={"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))), **os.environ, **BUILD})
    os.execv(python, [python, *sys.argv])


class Checkpoint:
    """The tensors of a safetensors folder (or of one file in it) as numpy sees them, bf16 as uint16, each read when asked for."""

    def __init__(self, folder, file_name=".safetensors", config=True):
        self.config = json.load(open(os.path.join(folder, "config.json"))) if config else None
        self.entries = {}
        for name in sorted(os.listdir(folder)):
            if not name.endswith(file_name):
                continue
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                for tensor, entry in json.loads(file.read(header)).items():
                    if tensor != "__metadata__":
                        self.entries[tensor] = (path, 8 + header, entry)

    def dtype(self, name):
        return self.entries[name][2]["dtype"]

    def shape(self, name):
        return self.entries[name][2]["shape"]

    def bytes(self, name):
        import numpy
        path, start, entry = self.entries[name]
        begin, end = entry["data_offsets"]
        return numpy.fromfile(path, "u1", end - begin, offset=start + begin)

    def array(self, name):
        import numpy
        kinds = {"BF16": "u2", "F32": "f4", "F16": "f2", "U8": "u1", "I64": "i8", "I32": "i4"}
        return self.bytes(name).view(numpy.dtype("<" + kinds[self.dtype(name)])).reshape(self.shape(name))

    def float32(self, name):
        import numpy
        array = self.array(name)
        if self.dtype(name) == "BF16":
            return (array.astype(numpy.uint32) << 16).view(numpy.float32)
        return array.astype(numpy.float32)


def gguf_metadata(writer, config, arch):
    """What the loaders of `olmoe` and `qwen2moe` read; the vocabulary is of made-up words, since only ids are compared."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(hidden // heads)
    writer.add_value_length(hidden // heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if arch == "qwen2moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    writer.add_eos_token_id(config.get("eos_token_id") or 0)
    writer.add_add_bos_token(False)


def gguf_tensors(config, arch):
    """(GGUF name, tensors it is made of, whether it is a table of weights), in the order of the file. Several tensors are stacked."""
    tied = config.get("tie_word_embeddings", False)
    yield "token_embd.weight", ["model.embed_tokens.weight"], True
    yield "output_norm.weight", ["model.norm.weight"], False
    yield "output.weight", ["model.embed_tokens.weight" if tied else "lm_head.weight"], True
    for n in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{n}.", f"blk.{n}."
        yield theirs + "attn_norm.weight", [ours + "input_layernorm.weight"], False
        yield theirs + "ffn_norm.weight", [ours + "post_attention_layernorm.weight"], False
        for one, other in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            yield f"{theirs}attn_{other}.weight", [f"{ours}self_attn.{one}_proj.weight"], True
            if arch == "qwen2moe" and one != "o":
                yield f"{theirs}attn_{other}.bias", [f"{ours}self_attn.{one}_proj.bias"], False
            if arch == "olmoe" and one in "qk":
                yield f"{theirs}attn_{other}_norm.weight", [f"{ours}self_attn.{one}_norm.weight"], False
        yield theirs + "ffn_gate_inp.weight", [ours + "mlp.gate.weight"], False
        for kind in ("gate", "up", "down"):
            yield (f"{theirs}ffn_{kind}_exps.weight", [f"{ours}mlp.experts.{e}.{kind}_proj.weight" for e in range(config["num_experts"])], True)
        if arch == "qwen2moe":
            yield theirs + "ffn_gate_inp_shexp.weight", [ours + "mlp.shared_expert_gate.weight"], False
            for kind in ("gate", "up", "down"):
                yield f"{theirs}ffn_{kind}_shexp.weight", [f"{ours}mlp.shared_expert.{kind}_proj.weight"], True


def gguf_architecture(config):
    """The name llama.cpp has for the model; exits if its code computes something else than the configuration asks for."""
    arch = {"olmoe": "olmoe", "qwen2_moe": "qwen2moe"}.get(config["model_type"])
    if arch is None:
        sys.exit(f"model_type {config['model_type']}: GGUF is written of olmoe and qwen2_moe")
    if config.get("norm_topk_prob") and config["num_experts_per_tok"] != config["num_experts"]:
        sys.exit(f"norm_topk_prob: llama.cpp never renormalises in {arch} (see --all-experts)")
    if config.get("clip_qkv") or config.get("rope_scaling") or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        sys.exit("clip_qkv, rope_scaling and dense layers are not written as GGUF here")
    return arch


def write_gguf(folder, path):
    """The checkpoint as GGUF: matrices stay in bf16, vectors, routers and gates become f32. Holds one expert at a time."""
    import gguf
    import numpy
    checkpoint = Checkpoint(folder)
    arch = gguf_architecture(checkpoint.config)
    tensors = list(gguf_tensors(checkpoint.config, arch))
    missing = [part for _, parts, _ in tensors for part in parts if part not in checkpoint.entries]
    used = {part for _, parts, _ in tensors for part in parts}
    unused = [name for name in checkpoint.entries if name not in used and not name.endswith(TOLERATED_UNUSED)]
    if missing or unused:
        sys.exit(f"{folder}: tensors missing {missing[:3]}, not used {unused[:3]}")
    writer = gguf.GGUFWriter(path + ".part", arch)
    writer.add_file_type(FTYPES["bf16"])
    writer.add_quantization_version(2)
    gguf_metadata(writer, checkpoint.config, arch)
    for name, parts, table in tensors:
        shape = ([len(parts)] if len(parts) > 1 else []) + checkpoint.shape(parts[0])
        if table:
            if any(checkpoint.dtype(part) != "BF16" for part in parts):
                sys.exit(f"{parts[0]}: {checkpoint.dtype(parts[0])}, expected BF16 (winnow apply --dtype bf16)")
            shape[-1] *= 2  # bytes
            writer.add_tensor_info(name, shape, numpy.dtype("uint8"), int(numpy.prod(shape)), gguf.GGMLQuantizationType.BF16)
        else:
            if name.endswith("gate_inp_shexp.weight"):
                shape = shape[-1:]
            writer.add_tensor_info(name, shape, numpy.dtype("float32"), 4 * int(numpy.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    for _, parts, table in tensors:  # the writer's own call wants a whole stack of experts at once
        writer.write_padding(out, out.tell())
        for part in parts:
            (checkpoint.bytes(part) if table else checkpoint.float32(part)).tofile(out)
    writer.write_padding(out, out.tell())
    writer.close()
    os.rename(path + ".part", path)


def silence():
    """llama.cpp's own messages below errors go nowhere."""
    import llama_cpp
    llama_cpp._logger.set_verbose(False)


def quantise_gguf(source, path, kind, output="same", embedding="bf16"):
    """llama.cpp's own quantiser, every matrix of the same type (`pure`) but for the mixtures `_m`; `output`: same or bf16."""
    import llama_cpp
    silence()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FTYPES[kind]
    options.pure = not kind.endswith("_m")
    options.nthread = len(os.sched_getaffinity(0))
    if embedding == "bf16":
        options.token_embedding_type = BF16
    if output == "bf16":
        options.output_tensor_type = BF16
    if llama_cpp.llama_model_quantize(source.encode(), (path + ".part").encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp does not quantise {source} to {kind}")
    os.rename(path + ".part", path)


class LlamaModel:
    """A GGUF in memory with one context; llama.cpp's defaults (mmap, weights repacked for the processor, f16 KV cache) but for threads."""

    def __init__(self, path, threads, context=512):
        import llama_cpp
        silence()
        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit(f"llama.cpp makes no context of {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def step(self, ids, start, every=False):
        """Runs ids at the positions from `start` on; logits of the last, or of every one."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = every or i + 1 == len(ids)
        if self.api.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def logits(self, ids):
        """[tokens, vocabulary], of one row from an empty context."""
        import numpy
        self.clear()
        self.step(ids, 0, every=True)
        shape = (len(ids), self.vocabulary)
        pointer = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return numpy.ctypeslib.as_array(pointer, shape).copy()


def bench(path, threads, prompt, new, repetitions):
    """Tokens per second as `llama-bench` takes them: random ids, one warm-up, prefill in one batch, decode from an empty context."""
    import random
    start = time.monotonic()
    model = LlamaModel(path, threads, context=max(prompt, new))
    loaded = time.monotonic() - start
    generator = random.Random(42)
    rates = {"prompt": [], "decode": []}
    for repetition in range(repetitions + 1):
        for kind, count in (("prompt", prompt), ("decode", new)):
            ids = [generator.randrange(model.vocabulary) for _ in range(count)]
            model.clear()
            start = time.monotonic()
            if kind == "prompt":
                model.step(ids, 0)
            else:
                for i, token in enumerate(ids):
                    model.step([token], i)
            if repetition:
                rates[kind].append(count / (time.monotonic() - start))
    return {**rates, "load_seconds": loaded, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def description():
    """Version and the instruction sets llama.cpp was built with."""
    import importlib.metadata
    import llama_cpp
    silence()
    on = [word.strip() for word in llama_cpp.llama_print_system_info().decode().replace(":", "|").split("|") if word.strip().endswith("= 1")]
    return {"llama_cpp_python": llama_cpp.__version__, "gguf": importlib.metadata.version("gguf"),
            "system_info": [word.split()[0] for word in on]}
