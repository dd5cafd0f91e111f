"""Small models of every causal language model family in the installed transformers.

A configuration is the family's default with every size reduced by the name of its field, so that
future families need no entry here.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Tuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LAYERS = 4
VOCABULARY = 260
CONTEXT = 128

# Sizes by the name of the field, set if the default configuration has the field.
_SIZES: List[Tuple[int, str]] = [
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base "
        "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
        "context_length keep_window_size max_source_positions max_target_positions",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers num_blocks",
    ),
    (
        32,
        "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim "
        "input_embedding_size output_embedding_size lru_width attention_hidden_size "
        "router_hidden_size dim_model_base pronunciation_embed_dim shape_embed_dim ple_embed_dim",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner "
        "ffn_hidden_size shared_intermediate_size intermediate_size_mlp dense_intermediate_size "
        "feed_forward_size prompt_mid_dim",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank qk_head_dim o_lora_rank hc_lowrank gated_norm_rank "
        "loop_gate_rank adapter_rank mamba_d_state ssm_state_size state_size d_rel rel_extent "
        "laurel_rank hidden_size_per_layer_input time_step_rank mamba_dt_rank global_head_dim "
        "chunk_size mamba_chunk_size attention_head_dim "
        "linear_key_head_dim linear_value_head_dim",
    ),
    (
        8,
        "head_dim d_head dim_head d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "swa_head_dim attention_head_size rotary_dim index_head_dim sliding_window "
        "sliding_window_size window_size attention_window_size attention_chunk_size "
        "local_attention linear_head_dim local_attn_chunk_length lsh_attn_chunk_length "
        "mamba_headdim mamba_head_dim "
        "mamba_d_head block_size n_mamba_heads mamba_n_heads mamba_num_heads index_topk",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "linear_num_key_heads linear_num_value_heads linear_num_heads num_query_groups "
        "zero_expert_num num_expert_group index_block_size",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_top_k moe_k index_n_heads heads_per_ngram "
        "num_layers_per_stack n_input_layers n_recurrent_layers n_output_layers n_groups "
        "n_layers_per_attn_res_block num_kv_shared_layers o_groups n_group topk_group",
    ),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

# Set if the default is None, which the model's code cannot use.
_NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")


# Settings that do not follow from the names: sizes that must agree, and switches.
_OVERRIDES: Dict[str, Dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "dots1": {"n_shared_experts": 1},
    "dory": {"num_hidden_layers": 6},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"expand": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64},
}


#: Families that are not built here, and the reasons.
NOT_BUILT = {
    "cohere_compass_text": "its default configuration has no rotary embeddings",
    "dbrx": "its default configuration has no rope_theta",
    "dots3_note": "its vision adapter must be as wide as the default text model",
    "gemma3n": "needs Pillow for its vision tower; see gemma3n_text",
    "gemma4_assistant": "its default configuration is not valid",
    "musicgen": "its configuration has no fields of a decoder",
    "musicgen_melody": "its configuration has no fields of a decoder",
    "qwen4_exp": "its default configuration has no sizes for its indexer",
    "qwen4_exp_text": "its default configuration has no sizes for its indexer",
    "reformer": "its axial positions must add up to the sizes",
}


def all_families() -> List[str]:
    """Return the ``model_type`` of every causal language model in the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in NOT_BUILT]


def small_config(family: str, **changes: Any) -> Any:
    """Return a small configuration of *family* (a ``model_type``), with *changes* to it."""
    return _small(CONFIG_MAPPING[family], {**_OVERRIDES.get(family, {}), **changes})


def _small(config_class: Any, changes: Mapping[str, Any]) -> Any:
    default = config_class()
    layers = _layer_count(default)
    changed: Dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if value is None and name in _NEEDED:
            changed[name] = SIZES[name]
        elif isinstance(value, list) and layers and len(value) == layers:
            kinds = [SIZES.get(name.replace("_per_layer", ""), kind) for kind in _unique(value)]
            changed[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            changed[name] = min(SIZES[name], value)
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = value % VOCABULARY
        elif isinstance(value, dict) and hasattr(getattr(default, name, None), "to_dict"):
            changed[name] = _small(type(getattr(default, name)), {}).to_dict()
    if "kv_lora_rank" in changed and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    return config_class(**{**changed, **changes})


def _unique(values: Iterable[Any]) -> List[Any]:
    return list(dict.fromkeys(values))


def _layer_count(config: Any) -> int:
    for name in _LAYER_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return 0


def small_model(config: Any) -> Any:
    """Return a random float32 model of *config* in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model
