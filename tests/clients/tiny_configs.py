"""Tiny configurations for any family, by the names that families give to their sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from weights import stir

MOST_PARAMETERS = 3e7
"""A model with more was not made tiny."""

_NAMES: dict[int, tuple[str, ...]] = {
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
        *("decoder_layers", "num_key_value_heads", "num_kv_heads", "type_vocab_size"),
        *("num_experts_per_tok", "moe_k", "linear_num_key_heads", "index_n_heads"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"),
        *("moe_num_experts", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"),
    ),
    8: ("mamba_d_state", "qk_rope_head_dim"),
    12: ("index_topk",),
    16: (
        *("head_dim", "global_head_dim", "attention_head_dim", "kv_channels", "rotary_dim"),
        *("sliding_window", "attention_chunk_size", "local_attention", "kv_lora_rank"),
        *("qk_nope_head_dim", "v_head_dim", "index_head_dim", "query_pre_attn_scalar"),
        *("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"),
    ),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"),
        *("expert_intermediate_size", "mamba_d_head", "mamba_head_dim"),
    ),
    64: (
        *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim"),
        *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "mlp_dim"),
        *("encoder_ffn_dim", "decoder_ffn_dim", "word_embed_proj_dim", "intermediate_size_mlp"),
        *("vocab_size", "vocab_size_per_layer_input", "dense_intermediate_size"),
    ),
    128: (
        *("max_position_embeddings", "n_positions", "max_seq_len"),
        "original_max_position_embeddings",
    ),
    1: (
        *("n_group", "topk_group", "first_k_dense_replace", "max_window_layers", "bos_token_id"),
        *("num_shared_experts", "n_shared_experts"),
    ),
    0: ("pad_token_id", "num_kv_shared_layers", "router_jitter_noise", "decoder_start_token_id"),
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names} | {"eos_token_id": 2}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def _tiny(model_type: str) -> Any:
    kind = CONFIG_MAPPING[model_type]
    usual = vars(kind())
    changed: dict[str, Any] = {
        name: 0.0 if "drop" in name else _SIZES[name]
        for name, value in usual.items()
        if (name in _SIZES and value is not None)
        or ("drop" in name and type(value) in (int, float) and not name.startswith("_"))
    }
    kinds = list(dict.fromkeys(usual.get("layer_types") or ()))
    if kinds:
        changed["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        changed |= {name: len(changed["layer_types"]) for name in _LAYERS if name in changed}
    if usual.get("kv_lora_rank"):
        changed["num_key_value_heads"] = 4
    return kind(**changed)


def make(model_type: str, model: str, implementation: str) -> nn.Module:
    """A tiny model in training mode without dropout, with the same weights each time.

    Raises:
        ValueError: the sizes of this family have other names.
    """
    kind = getattr(hf, model)
    with torch.device("meta"):
        empty = kind._from_config(_tiny(model_type), attn_implementation="eager")
    if sum(p.numel() for p in empty.parameters()) > MOST_PARAMETERS:
        raise ValueError(f"{model} is not tiny")
    torch.manual_seed(0)
    made = kind._from_config(
        _tiny(model_type), attn_implementation=implementation, dtype=torch.float32
    )
    for module in stir(made).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and type(value) in (int, float):
                setattr(module, name, 0.0)
    return made.train()
