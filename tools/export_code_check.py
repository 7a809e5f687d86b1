#!/usr/bin/env python3
"""Loads checkpoints through modeling_winnow.py (`winnow apply --export-code`) and compares logits with Winnow's.

For every golden checkpoint of a family Winnow reads: the model as it is against its reference logits; condensed layers,
uneven experts and rarely used config keys against `winnow trace`; run-time skipping against `winnow eval ppl`. Each is
also generated from with and without a cache, run as a padded batch, saved and loaded again, and must not load with the
library's own class where that would be another model. Needs torch, transformers and safetensors, as
roundtrip_transformers.py does.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOLERANCE = 1e-4  # of the largest |logit|: all compute in float32 but sum in another order
LOSS_TOLERANCE = 1e-5
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek")
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class Names:
    """What the tensors of decoder layer `layer` are called."""

    def __init__(self, config, layer):
        mixtral = config["model_type"] == "mixtral"
        self.layer = f"model.layers.{layer}."
        self.moe = self.layer + ("block_sparse_moe." if mixtral else "mlp.")
        self.parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        self.router = self.moe + "gate.weight"

    def expert(self, number):
        return [f"{self.moe}experts.{number}.{part}.weight" for part in self.parts]

    def fused(self):
        return [f"{self.layer}mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]

    def shared(self):
        return [f"{self.moe}shared_experts.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]


def moe_layers(config, tensors):
    return [i for i in range(config["num_hidden_layers"]) if Names(config, i).router in tensors]


def experts_of(config):
    return next(config[key] for key in COUNT_KEYS if config.get(key))


def take_experts(config, tensors, layer, wanted):
    """The layer with the experts `wanted` alone, numbered anew; their old matrices."""
    names = Names(config, layer)
    taken = [[tensors[name] for name in names.expert(e)] for e in wanted]
    for e in range(experts_of(config)):
        for name in names.expert(e):
            del tensors[name]
    for e, matrices in enumerate(taken):
        tensors.update({name: t.clone() for name, t in zip(names.expert(e), matrices)})
    return taken


def condensed_apart(config, tensors, random):
    """Two layers; in one of them nothing is left but the shared expert, where there is one."""
    config["condensed_layers"] = {}
    has_shared = config["model_type"] in ("qwen2_moe", "deepseek")
    for layer, wanted in zip(moe_layers(config, tensors)[-2:], ([] if has_shared else [4], [1, 3])):
        take_experts(config, tensors, layer, wanted)
        del tensors[Names(config, layer).router]
        config["condensed_layers"][str(layer)] = {"expert_alphas": [round(0.1 + 0.3 * random(), 6) for _ in wanted]}


def condensed_fused(config, tensors, random):
    """The same two experts (and an ungated shared one) as one MLP, their alphas folded into the last matrix."""
    config["condensed_layers"] = {}
    for layer in moe_layers(config, tensors)[-2:]:
        names = Names(config, layer)
        parts = take_experts(config, tensors, layer, [1, 3])
        for e in range(2):
            for name in names.expert(e):
                del tensors[name]
        del tensors[names.router]
        parts = [(gate, up, down * (0.1 + 0.3 * random())) for gate, up, down in parts]
        if names.shared()[0] in tensors:
            parts.append(tuple(tensors.pop(name) for name in names.shared()))
        for name, matrices, axis in zip(names.fused(), zip(*parts), (0, 0, 1)):
            tensors[name] = torch.cat(matrices, dim=axis).contiguous()
        config["condensed_layers"][str(layer)] = {"dense_width": tensors[names.fused()[0]].shape[0]}


def uneven(config, tensors, random):
    counts = [0] * config["num_hidden_layers"]
    for position, layer in enumerate(moe_layers(config, tensors)):
        counts[layer] = experts_of(config) - 1 - position
        wanted = sorted(sorted(range(experts_of(config)), key=lambda _: random())[: counts[layer]])
        take_experts(config, tensors, layer, wanted)
        router = Names(config, layer).router
        tensors[router] = tensors[router][wanted].contiguous()
    for key in COUNT_KEYS:
        if config.get(key):
            config[key] = max(counts)
    config["num_experts_per_layer"] = counts


def skipping(config, tensors, random):
    config["betas"] = {str(layer): beta for layer, beta in zip(moe_layers(config, tensors), (0.62, 0.85, 0.4))}


def skipping_renormalised(config, tensors, random):
    skipping(config, tensors, random)
    config["norm_topk_prob"] = not config.get("norm_topk_prob", False)


def everything(config, tensors, random):
    """Uneven, condensed and skipping at once."""
    uneven(config, tensors, random)
    layers = moe_layers(config, tensors)
    names = Names(config, layers[-1])
    for e in range(1, config["num_experts_per_layer"][layers[-1]]):
        for name in names.expert(e):
            del tensors[name]
    del tensors[names.router]
    config["condensed_layers"] = {str(layers[-1]): {"expert_alphas": [0.3]}}
    config["betas"] = {str(layer): 0.6 for layer in layers[:-1]}


def rare_keys(config, tensors, random):
    """What released models seldom use: biases, clipping, a window, linear RoPE scaling, tied embeddings."""
    family = config["model_type"]
    config.pop("rope_parameters", None)
    config["rope_theta"] = 5000.0
    config["rope_scaling"] = {"type": "linear", "factor": 2.5}
    config["norm_topk_prob"] = not config.get("norm_topk_prob", False)
    if family == "mixtral":
        config["sliding_window"] = 7
    if family == "olmoe":
        config["clip_qkv"] = 0.8
    if family in ("olmoe", "qwen3_moe", "deepseek"):
        config["attention_bias"] = True
        for name in [name for name in tensors if name.endswith("_proj.weight") and "self_attn" in name]:
            bias = torch.tensor([random() - 0.5 for _ in range(tensors[name].shape[0])])
            tensors[name[: -len("weight")] + "bias"] = bias.to(tensors[name].dtype)
    if family == "qwen2_moe":
        config["qkv_bias"] = False
        for name in [name for name in tensors if name.endswith("_proj.bias")]:
            del tensors[name]
    if family in ("qwen2_moe", "qwen3_moe"):
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]


VARIANTS = (condensed_apart, condensed_fused, uneven, everything, skipping, skipping_renormalised, rare_keys)


def with_modeling_code(config):
    """As ConfigWithModelingCode in src/apply/export_code.cc."""
    config = dict(config)
    config["auto_map"] = {"AutoConfig": "modeling_winnow.WinnowConfig",
                          "AutoModelForCausalLM": "modeling_winnow.WinnowForCausalLM"}
    if "condensed_layers" in config or "num_experts_per_layer" in config:
        config["architectures"] = ["WinnowForCausalLM"]
        config["transformers_weights"] = "load-this-folder-with-trust_remote_code=True.safetensors"
    return config


def library_version():
    return [int(part) for part in transformers.__version__.split(".")[:2]]


def load(folder, wanted=None, **options):
    dtype = "torch_dtype" if library_version() < [5] else "dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{dtype: wanted or torch.float32}, **options)


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def winnow_logits(winnow, folder, ids, tmp):
    save_file({"input_ids": ids}, os.path.join(tmp, "ids.safetensors"))
    trace = os.path.join(tmp, "trace.safetensors")
    run(winnow, "trace", folder, "--ids", os.path.join(tmp, "ids.safetensors"), "-o", trace, "--compute", "f32",
        "--force", "-q")
    return load_file(trace)["logits"]


def skipping_difference(winnow, folder, ids, logits, tmp):
    """Of the mean loss, which `eval ppl` computes with skipping; and by how much skipping changes it."""
    file = os.path.join(tmp, "ids.safetensors")
    save_file({"input_ids": ids}, file)
    said = json.loads(run(winnow, "eval", "ppl", folder, "--ids", file, "--json", "--compute", "f32", "-q"))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten()).item()
    return abs(loss - said["nll"]), abs(said["nll"] - said["without_skipping"][0]["nll"])


def behaviour_faults(model, folder, tmp, ids, logits):
    """Generation, padding, saving and loading; nothing if all is as it should be."""
    faults = []
    model.generation_config.eos_token_id = None

    def generate(prompt, mask=None, **options):
        mask = torch.ones_like(prompt) if mask is None else mask
        new = model.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
        return new[:, prompt.shape[1]:]

    if not torch.equal(generate(ids[:, :6]), generate(ids[:, :6], use_cache=False)):
        faults.append("generate with and without cache differ")
    # The second row without its first five tokens, padded on the left and on the right.
    short = ids[1:, 5:]
    alone = logits_of(model, short)
    zeros, ones = torch.zeros(1, 5, dtype=ids.dtype), torch.ones_like(short)
    for side, row, mask, where in (
            ("left", torch.cat((zeros, short), 1), torch.cat((zeros, ones), 1), slice(5, None)),
            ("right", torch.cat((short, zeros), 1), torch.cat((ones, zeros), 1), slice(0, -5))):
        both = logits_of(model, torch.cat((ids[:1], row)), attention_mask=torch.cat((torch.ones_like(ids[:1]), mask)))
        error = max((both[:1] - logits[:1]).abs().max(), (both[1:, where] - alone).abs().max())
        if not error <= TOLERANCE * logits.abs().max():
            faults.append(f"padding on the {side} changes logits")
    prompts = torch.cat((ids[:1, :9], torch.cat((zeros, ids[1:, :4]), 1)))
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0
    if not torch.equal(generate(prompts, mask), torch.cat((generate(ids[:1, :9]), generate(ids[1:, :4])))):
        faults.append("generate of a padded batch differs")
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if not abs(loss.item() - torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()) < 1e-4:
        faults.append("loss differs")
    saved = os.path.join(tmp, "saved")
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved)
    with open(os.path.join(saved, "config.json"), encoding="utf-8") as file:
        keys = json.load(file)
    if keys["model_type"] not in FAMILIES or "auto_map" not in keys:
        faults.append("the saved config is another")
    again = logits_of(load(saved, trust_remote_code=True), ids)  # sums differ with where in memory a matrix lies
    if not (again - logits).abs().max() <= TOLERANCE * logits.abs().max():
        faults.append("saved and loaded again it differs")
    half = load(folder, torch.bfloat16, trust_remote_code=True)
    if half.dtype != torch.bfloat16 or not torch.isfinite(logits_of(half, ids)).all():
        faults.append("bfloat16 fails")
    return faults


def check(name, winnow, folder, tmp, ids, want, skips):
    model = load(folder, trust_remote_code=True).eval()
    faults = [] if type(model).__name__ == "WinnowForCausalLM" else [f"loaded as {type(model).__name__}"]
    logits = logits_of(model, ids)
    largest = logits.abs().max().item()
    if skips:
        error, effect = skipping_difference(winnow, folder, ids, logits, tmp)
        if effect < 10 * LOSS_TOLERANCE:
            faults.append(f"skipping changes the loss by {effect:.1e} only")
        what, limit = "loss", LOSS_TOLERANCE
    else:
        want = want if want is not None else winnow_logits(winnow, folder, ids, tmp)
        error, what, limit = (logits - want).abs().max().item() / largest, "logits", TOLERANCE
    if not error <= limit:
        faults.append(f"off by {error:.2e}")
    faults += behaviour_faults(model, folder, tmp, ids, logits)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        # Older libraries do not know the key and fill a condensed layer with random numbers.
        refused = "transformers_weights" in json.load(file) and library_version() >= [4, 52]
    # What a folder of our own wrote must be readable by Winnow again.
    back = winnow_logits(winnow, os.path.join(tmp, "saved"), ids, tmp)
    if not skips and not (back - logits).abs().max().item() <= TOLERANCE * largest:
        faults.append("winnow reads the saved folder otherwise")
    if refused:
        try:
            load(folder, trust_remote_code=False)
            faults.append("the library's own class loads it")
        except (OSError, ValueError) as problem:
            if "trust_remote_code=True" not in str(problem):
                faults.append(f"refused without saying how to load: {problem}")
    print(f"{name:44} {'; '.join(faults) if faults else 'ok'}, {what} {error:.1e}", flush=True)
    return not faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--golden", required=True, help="folder of golden checkpoints with expected.safetensors")
    parser.add_argument("--only", default="", help="checkpoints whose name begins like this")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if hasattr(transformers.utils.logging, "disable_progress_bar"):
        transformers.utils.logging.disable_progress_bar()
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        for model in sorted(os.listdir(args.golden)):
            source = os.path.join(args.golden, model)
            with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            if config["model_type"] not in FAMILIES or not model.startswith(args.only):
                continue
            with open(os.path.join(source, "meta.json"), encoding="utf-8") as file:
                meta = json.load(file)
            expected = load_file(os.path.join(source, meta.get("expected_from", "."), "expected.safetensors"))
            ids = expected["input_ids"]
            tensors = {}
            for shard in sorted(os.listdir(source)):
                if shard.startswith("model") and shard.endswith(".safetensors"):
                    tensors.update(load_file(os.path.join(source, shard)))
            unfused = moe_layers(config, tensors) and not any(n.endswith("gate_up_proj") for n in tensors)
            for variant in (None, *(VARIANTS if unfused else ())):
                name = f"{model} {variant.__name__ if variant else 'intact'}"
                folder = os.path.join(tmp, name.replace(" ", "-"))
                shutil.copytree(source, folder)
                keys, weights = json.loads(json.dumps(config)), dict(tensors)
                if variant:
                    random = torch.Generator().manual_seed(7)
                    variant(keys, weights, lambda: torch.rand(1, generator=random).item())
                    for file in os.listdir(folder):
                        if file.endswith((".safetensors", ".index.json")):
                            os.remove(os.path.join(folder, file))
                    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
                with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                    json.dump(with_modeling_code(keys), file, indent=1)
                shutil.copy(os.path.join(ROOT, "src/apply/modeling_winnow.py"), folder)
                want = None if variant else expected["logits"]
                results.append(check(name, args.winnow, folder, tmp, ids, want, "betas" in keys))
                shutil.rmtree(folder)
    print(f"transformers {transformers.__version__}: {sum(results)} of {len(results)} agree")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    # The library copies a folder's code into its cache; ours goes when the run ends, and nothing is fetched.
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(HF_HOME=cache, HF_MODULES_CACHE=cache, HF_HUB_OFFLINE="1")
        import torch
        import transformers
        from safetensors.torch import load_file, save_file

        sys.exit(main())
