"""Modelling code for a Mixture-of-Experts checkpoint compressed by Winnow.

Winnow wrote this file into the checkpoint's folder because the checkpoint is one that the library's own classes
cannot express: layers with different numbers of experts, condensed layers (the router is gone), or experts skipped at
run time. Load it with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It computes what Winnow computes, for the families mixtral, qwen2_moe, qwen3_moe, olmoe and deepseek (v1), and reads
besides the family's own keys of config.json (all optional):

  num_experts_per_layer  [8, 6, 8]: the number of experts by decoder layer
  condensed_layers       {"3": {"expert_alphas": [0.06, 0.05]}}: no router; the shared expert if there is one, and every
                         expert times its fixed alpha. {"3": {"dense_width": 384}}: one MLP instead of the experts
  betas                  {"0": 0.51}: selected experts whose probability is below beta times the best one are left out

It needs torch, safetensors and transformers 4.40 or newer, and is written for clarity: one loop over the experts that
were selected, PyTorch's scaled_dot_product_attention, no parallel plans. Use it under the terms of the checkpoint.
"""
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

PLAIN_NAMES = ("gate_proj", "up_proj", "down_proj")
# Stands in config.json under `transformers_weights`, the key under which newer libraries look for the weights' file:
# their own classes then stop with this name in the message instead of filling what a layer lacks with random numbers.
NO_NATIVE_WEIGHTS = "load-this-folder-with-trust_remote_code=True.safetensors"
# The cache of keys and values changes its name with version 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True)
class Family:
    """How a family differs from the others; the values are those of config keys that are absent."""

    kv_heads: Optional[int] = None  # None: as many as heads
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    top_k: Optional[int] = None
    expert_width: str = "moe_intermediate_size"  # config key
    moe_name: str = "mlp"
    expert_names: Tuple[str, str, str] = PLAIN_NAMES  # gate, up, down
    shared_name: Optional[str] = None
    shared_gated: bool = False  # the shared expert is multiplied by sigmoid(x . shared_expert_gate)
    qk_norm: Optional[str] = None  # "head" or "projection"
    attention_bias: Optional[str] = None  # config key, of all four projections
    qkv_bias: bool = False  # q, k and v unless the config says qkv_bias false
    always_renormalise: bool = False
    renormalise_eps: float = 0.0
    clips_qkv: bool = False
    sliding_window: bool = False  # a number under this key limits attention


FAMILIES = {
    "mixtral": Family(kv_heads=8, rope_theta=1e6, rms_norm_eps=1e-5, top_k=2, expert_width="intermediate_size",
                      moe_name="block_sparse_moe", expert_names=("w1", "w3", "w2"), always_renormalise=True,
                      sliding_window=True),
    "qwen2_moe": Family(kv_heads=16, top_k=4, shared_name="shared_expert", shared_gated=True, qkv_bias=True),
    "qwen3_moe": Family(kv_heads=4, top_k=8, qk_norm="head", attention_bias="attention_bias"),
    "olmoe": Family(rms_norm_eps=1e-5, top_k=8, expert_width="intermediate_size", qk_norm="projection",
                    attention_bias="attention_bias", clips_qkv=True),
    "deepseek": Family(kv_heads=32, shared_name="shared_experts", attention_bias="attention_bias",
                       renormalise_eps=1e-20),
}


class WinnowConfig(PretrainedConfig):
    # Not the family's: the library converts tensor names by this attribute. config.json keeps the family's.
    model_type = "winnow"

    def __init__(self, model_type="mixtral", **keys):
        keys.pop("transformers_weights", None)
        self.family = model_type
        family = self.properties

        def take(key, default):
            value = keys.pop(key, None)
            return default if value is None else value

        rope = {**take("rope_scaling", {}), **take("rope_parameters", {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "linear") or keys.get("use_sliding_window"):
            raise ValueError("winnow: RoPE scaling other than linear and use_sliding_window are not supported")
        self.rope_theta = rope.get("rope_theta") or keys.get("rope_theta") or family.rope_theta
        self.rope_factor = rope.get("factor", 1.0) if kind == "linear" else 1.0
        keys.pop("rope_theta", None)
        self.vocab_size = take("vocab_size", 32000)
        self.hidden_size = take("hidden_size", 4096)
        self.num_hidden_layers = take("num_hidden_layers", 1)
        self.num_attention_heads = take("num_attention_heads", 32)
        self.num_key_value_heads = take("num_key_value_heads", family.kv_heads or self.num_attention_heads)
        self.head_dim = take("head_dim", self.hidden_size // self.num_attention_heads)
        self.num_experts_per_tok = take("num_experts_per_tok", family.top_k or 1)
        self.rms_norm_eps = take("rms_norm_eps", family.rms_norm_eps)
        self.initializer_range = take("initializer_range", 0.02)
        # The library's caches drop what is outside of it, so it must not be there where it does not count.
        window = keys.pop("sliding_window", None)
        self.sliding_window = window if family.sliding_window else None
        keys["tie_word_embeddings"] = bool(keys.get("tie_word_embeddings"))
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            keys.setdefault(key, None)
        self.use_cache = take("use_cache", True)
        self.fused_layers = keys.pop("fused_layers", [])  # found in the weights, see from_pretrained
        super().__init__(**keys)

    @property
    def properties(self):
        return FAMILIES[self.family]

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        # As in the base class, which would warn that config.json names another model_type.
        keys, kwargs = cls.get_config_dict(path, **kwargs)
        if keys.get("model_type") not in FAMILIES:
            raise ValueError(f"winnow: model_type {keys.get('model_type')!r} is none of {', '.join(FAMILIES)}")
        return cls.from_dict(keys, **kwargs)

    def to_dict(self):
        keys = super().to_dict()
        keys["model_type"] = keys.pop("family", self.family)
        if self.value("condensed_layers") or self.value("num_experts_per_layer"):
            keys["transformers_weights"] = NO_NATIVE_WEIGHTS
        keys.pop("fused_layers", None)
        factor = keys.pop("rope_factor", 1.0)
        keys["rope_scaling"] = {"type": "linear", "factor": factor} if factor != 1.0 else None
        return keys

    def value(self, key, default=None):
        found = getattr(self, key, None)
        return default if found is None else found

    def layer(self, index):
        """What decoder layer `index` consists of."""
        family = self.properties
        experts = next((n for n in map(self.value, ("num_local_experts", "num_experts", "n_routed_experts")) if n), 0)
        if self.family in ("qwen2_moe", "qwen3_moe"):
            moe = (index + 1) % self.value("decoder_sparse_step", 1) == 0
            moe = moe and index not in self.value("mlp_only_layers", [])
        elif self.family == "deepseek":
            moe = index >= self.value("first_k_dense_replace", 0) and index % self.value("moe_layer_freq", 1) == 0
        else:
            moe = True
        layer = SimpleNamespace(num_experts=0, dense_width=0, shared_width=0, alphas=None, beta=0.0,
                                fused=index in self.fused_layers)
        if not (moe and experts):
            layer.dense_width = self.intermediate_size
            return layer
        if family.shared_name == "shared_expert":
            layer.shared_width = self.shared_expert_intermediate_size
        elif family.shared_name == "shared_experts":
            layer.shared_width = self.value("n_shared_experts", 0) * self.moe_intermediate_size
        condensed = self.value("condensed_layers", {}).get(str(index))
        if condensed is None:
            layer.num_experts = self.value("num_experts_per_layer", [experts] * self.num_hidden_layers)[index]
            layer.beta = self.value("betas", {}).get(str(index), 0.0)
        elif "dense_width" in condensed:
            layer.dense_width = condensed["dense_width"]
            if not family.shared_gated:
                layer.shared_width = 0  # it is a part of the fused matrices
        else:
            layer.alphas = condensed["expert_alphas"]
            layer.num_experts = len(layer.alphas)
        return layer


class WinnowRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class WinnowMLP(nn.Module):
    """SwiGLU, with its matrices under the given names."""

    def __init__(self, hidden, width, names=PLAIN_NAMES):
        super().__init__()
        self.names = names
        if width:
            for name in names[:2]:
                setattr(self, name, nn.Linear(hidden, width, bias=False))
            setattr(self, names[2], nn.Linear(width, hidden, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class WinnowFusedExperts(nn.Module):
    """All experts of a layer in two tensors, as newer libraries may write them."""

    def __init__(self, count, hidden, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def __getitem__(self, expert):
        def run(x):
            gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.down_proj[expert])

        return run


class WinnowFeedForward(WinnowMLP):
    """Dense MLP, routed experts, or what is left of a condensed layer; with the shared expert where there is one."""

    def __init__(self, config, layer):
        super().__init__(config.hidden_size, layer.dense_width)
        family = config.properties
        self.layer = layer
        self.top_k = config.num_experts_per_tok
        self.renormalise = family.always_renormalise or bool(config.value("norm_topk_prob", False))
        self.renormalise_eps = family.renormalise_eps
        if not layer.dense_width:
            width = config.value(family.expert_width)
            if layer.alphas is None:
                self.gate = nn.Linear(config.hidden_size, layer.num_experts, bias=False)
            if layer.fused:
                self.experts = WinnowFusedExperts(layer.num_experts, config.hidden_size, width)
            else:
                self.experts = nn.ModuleList(WinnowMLP(config.hidden_size, width, family.expert_names)
                                             for _ in range(layer.num_experts))
        self.shared_name = family.shared_name if layer.shared_width else None
        self.shared_gated = family.shared_gated
        if self.shared_name:
            setattr(self, self.shared_name, WinnowMLP(config.hidden_size, layer.shared_width))
            if self.shared_gated:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        if self.layer.dense_width:
            y = super().forward(x)
        elif self.layer.alphas is not None:
            y = torch.zeros_like(x)
            for alpha, expert in zip(self.layer.alphas, self.experts):
                y = y + alpha * expert(x)
        else:
            y = self.routed(x)
        if self.shared_name:
            shared = getattr(self, self.shared_name)(x)
            y = y + (torch.sigmoid(self.shared_expert_gate(x)) * shared if self.shared_gated else shared)
        return y.view_as(hidden)

    def routed(self, x):
        # Sorted stably, so that of equal probabilities the lower expert number wins, as in Winnow.
        weights, ids = self.gate(x).float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        weights, ids = weights[:, : self.top_k], ids[:, : self.top_k]
        if self.layer.beta > 0:
            weights = weights.masked_fill(weights < self.layer.beta * weights[:, :1], 0.0)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.renormalise_eps)
        used = weights > 0
        y = torch.zeros_like(x)
        for expert in ids[used].unique().tolist():
            token, slot = torch.where((ids == expert) & used)
            y.index_add_(0, token, (self.experts[expert](x[token]) * weights[token, slot, None]).to(y.dtype))
        return y


class WinnowAttention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        family = config.properties
        self.index = index
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.qk_norm = family.qk_norm
        self.clip = config.value("clip_qkv") if family.clips_qkv else None
        q_width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        all_bias = bool(family.attention_bias and config.value(family.attention_bias, False))
        bias = all_bias or (family.qkv_bias and config.value("qkv_bias", True))
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=all_bias)
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = WinnowRMSNorm(self.head_dim if per_head else q_width, config.rms_norm_eps)
            self.k_norm = WinnowRMSNorm(self.head_dim if per_head else kv_width, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache, mask_for):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.view(*x.shape[:2], -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        mask = mask_for(k.shape[2], k.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class WinnowDecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        layer = config.layer(index)
        self.input_layernorm = WinnowRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = WinnowAttention(config, index)
        self.post_attention_layernorm = WinnowRMSNorm(config.hidden_size, config.rms_norm_eps)
        # Mixtral's experts have a name of their own, unless they are fused.
        self.block = "mlp" if layer.fused or layer.dense_width else config.properties.moe_name
        setattr(self, self.block, WinnowFeedForward(config, layer))

    def forward(self, x, *attention):
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + getattr(self, self.block)(self.post_attention_layernorm(x))


class WinnowModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WinnowDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = WinnowRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, attention_mask, position_ids, cache, keep_states):
        past = cache.get_seq_length() if cache is not None else 0
        count = x.shape[1]
        total = past + count
        padding = None
        if attention_mask is not None and not bool(attention_mask.all()):
            if attention_mask.shape != (x.shape[0], total):
                raise ValueError(f"winnow: attention_mask must be [batch, {total}], got {list(attention_mask.shape)}")
            padding = attention_mask.bool()
        if position_ids is None:
            if padding is None:
                position_ids = torch.arange(past, total, device=x.device)[None]
            else:
                position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        # Computed here, not kept in a buffer, which loaders may leave empty.
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        inverse = (self.config.rope_theta ** -exponents / self.config.rope_factor).float().to(x.device)
        angles = position_ids[:, None, :, None].float() * inverse  # [batch, 1, tokens, head_dim / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        window = self.config.sliding_window
        masks = {}

        def mask_for(keys, device):
            """True where a query sees a key; None if all that came before. A cache may keep only the last keys."""
            if keys not in masks:
                query = torch.arange(past, total, device=x.device)[:, None]
                key = torch.arange(total - keys, total, device=x.device)[None]
                mask = (key <= query)[None, None]
                if window:
                    mask = mask & (key > query - window)
                if padding is not None:  # a padded token sees itself, so that its softmax is finite
                    mask = mask & padding[:, None, None, total - keys:] | (key == query)
                all_before = padding is None and (keys == count or count == 1) and not (window and keys > window)
                masks[keys] = None if all_before else mask
            return None if masks[keys] is None else masks[keys].to(device)

        states = []
        for layer in self.layers:
            states += [x] if keep_states else []
            x = layer(x, cos, sin, cache, mask_for)
        x = self.norm(x)
        return x, (*states, x) if keep_states else None


class WinnowForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = WinnowConfig
    base_model_prefix = "model"
    _no_split_modules = ["WinnowDecoderLayer"]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = False

    def __init__(self, config):
        super().__init__(config)
        self.model = WinnowModel(config)
        # Without a module of its own nothing has to be tied.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        where = ("cache_dir", "revision", "token", "subfolder", "local_files_only")
        hub = {key: kwargs[key] for key in where if key in kwargs}
        names = stored_names(path, hub) if path is not None else None
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):  # older libraries import this file twice: two WinnowConfig
            config = kwargs["config"] = WinnowConfig.from_pretrained(config or path, **hub)
        if names is not None:
            config.fused_layers = [i for i in range(config.num_hidden_layers)
                                   if f"model.layers.{i}.mlp.experts.gate_up_proj" in names]
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        missing = sorted({name for name, _ in model.named_parameters()} - names) if names is not None else []
        if missing:  # the library would go on with random numbers
            raise ValueError(f"winnow: {len(missing)} tensors are not in {path}, among them {missing[0]}")
        return loaded

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WinnowRMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0,
                num_items_in_batch=None, **_):
        cache = cache if cache is not None else past_key_values
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        x = inputs_embeds if inputs_embeds is not None else self.model.embed_tokens(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden, states = self.model(x, attention_mask, position_ids, cache, output_hidden_states)
        hidden = hidden[:, -logits_to_keep:]
        logits = F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        loss = None
        if labels is not None:
            total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].to(logits.device).flatten(),
                                    reduction="mean" if num_items_in_batch is None else "sum")
            loss = total if num_items_in_batch is None else total / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states,
                                        **{CACHE: cache if use_cache else None})
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, past_key_values=None,
                                      cache=None, use_cache=True, **kwargs):
        cache = cache if cache is not None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        inputs = {CACHE: cache, "use_cache": use_cache, "attention_mask": attention_mask}
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        if inputs_embeds is not None and past == 0:
            return {**inputs, "inputs_embeds": inputs_embeds}
        # The ids are all of them, those after inputs_embeds, or only the new ones; the mask covers all.
        total = input_ids.shape[1] + (inputs_embeds.shape[1] if inputs_embeds is not None else 0)
        new = (attention_mask.shape[1] if attention_mask is not None else total) - past
        return {**inputs, "input_ids": input_ids[:, -max(new, 0):].contiguous()}


def stored_names(path, hub):
    """The names of all tensors in a checkpoint's safetensors files; None if it has none."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if single is None:
        return None
    with safe_open(single, "pt") as file:
        return set(file.keys())
