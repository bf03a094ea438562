"""Tiny random models of transformers, a line for each family: the rows of the matrix.

All have two layers, heads of 16 numbers where the family lets one choose, and no dropout but that
of attention, so that few kernels serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from weights import stir

VOCABULARY = 64
LENGTH = 40
WINDOW = 16

_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LLAMA = dict(
    **_TOKENS,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
_BERT = dict(
    **_TOKENS,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
)
_VISION = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=24,
    patch_size=4,
)
_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
_SLIDING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A kind of model: how one is made, and what it takes."""

    name: str
    kind: str
    """"decoder", "encoder", "seq2seq", "images", "vision" or "audio"."""
    model: str
    """The name of the class in transformers."""
    config: Callable[[], Any]
    dropout: tuple[str, ...] = ("attention_dropout",)
    """Where the dropout of attention stands: in the configuration, or in a class of modules."""
    without: tuple[str, ...] = ()
    """Situations that the family does not know, with eager attention either."""

    def make(self, implementation: str, dropout: float = 0.0) -> nn.Module:
        """A model with the same weights for any implementation."""
        config = self.config()
        of_config = [name for name in self.dropout if "." not in name]
        for name in of_config if dropout else ():
            setattr(config, name, dropout)
        torch.manual_seed(0)
        model = getattr(hf, self.model)._from_config(config, attn_implementation=implementation)
        for kind, name in (x.split(".") for x in self.dropout if "." in x):
            for module in model.modules():
                if type(module).__name__ == kind:
                    setattr(module, name, dropout)
        stir(model)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model

    def inputs(self, batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
        """What a forward takes, without any mask."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "vision":
            return {"pixel_values": torch.randn((batch, 3, 24, 24), generator=generator)}
        if self.kind == "audio":
            return {"input_values": torch.randn((batch, 400), generator=generator)}
        ids = torch.randint(3, VOCABULARY - 1, (batch, length), generator=generator)
        if self.name == "gemma3_images":
            return _with_images(ids, generator)
        if self.name == "mllama":
            return _with_image_states(ids, generator)
        if self.kind != "seq2seq":
            return {"input_ids": ids}
        decoder = torch.randint(3, VOCABULARY - 1, (batch, 12), generator=generator)
        if self.name == "whisper":
            features = torch.randn((batch, 8, 2 * LENGTH), generator=generator)
            return {"input_features": features, "decoder_input_ids": decoder}
        return {"input_ids": ids, "decoder_input_ids": decoder}


IMAGE_TOKENS = 4


def _with_images(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Two images a row, of four tokens each, which see each other (Gemma 3)."""
    types = torch.zeros_like(ids)
    for row, firsts in enumerate(((14, 20), (15, 16 + IMAGE_TOKENS))):
        for first in firsts:
            types[row, first : first + IMAGE_TOKENS] = 1
    ids = ids.masked_fill(types.bool(), VOCABULARY - 1)
    pixels = torch.randn((2 * len(ids), 3, 16, 16), generator=generator)
    return {"input_ids": ids, "token_type_ids": types, "pixel_values": pixels}


def _with_image_states(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What Mllama's text model gets of images: states, and a float mask of each query's own."""
    batch, length = ids.shape
    seen = torch.rand((batch, 1, length, 8), generator=generator) > 0.4
    seen[:, :, :5] = False
    rows = seen.any(-1, keepdim=True)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) * rows
    return {
        "input_ids": ids,
        "cross_attention_states": torch.randn((batch, 8, 64), generator=generator),
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": rows.float(),
    }


def _gemma3_images() -> Any:
    text = {
        **_LLAMA,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING,
        "query_pre_attn_scalar": 16,
    }
    vision = {**_VISION, "image_size": 16, "vision_use_head": False}
    return hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=VOCABULARY - 1,
        boi_token_index=1,
        eoi_token_index=2,
    )


def _decoder(
    name: str, config: str, model: str, more: dict[str, Any] | None = None, **rest: Any
) -> Family:
    arguments = {**_LLAMA, **(more or {})}
    return Family(name, "decoder", model, lambda: getattr(hf, config)(**arguments), **rest)


def _encoder(
    name: str, config: str, model: str, more: dict[str, Any] | None = None, **rest: Any
) -> Family:
    arguments = {**_BERT, **(more or {})}
    rest.setdefault("dropout", ("attention_probs_dropout_prob",))
    return Family(
        name,
        "encoder",
        model,
        lambda: getattr(hf, config)(**{"attention_probs_dropout_prob": 0.0, **arguments}),
        **rest,
    )


def _vision(name: str, config: str, model: str, **more: Any) -> Family:
    dropout = more.pop("dropout", ("attention_probs_dropout_prob",))
    rest = {"without": more.pop("without", ())}
    arguments = {**_VISION, **more}
    return Family(
        name, "vision", model, lambda: getattr(hf, config)(**arguments), dropout=dropout, **rest
    )


def _clip() -> Any:
    text = {**_LLAMA, "attention_dropout": 0.0}
    text.pop("num_key_value_heads")
    return hf.CLIPTextConfig(**text)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MLA = dict(
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    num_key_value_heads=4,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=64,
    d_kv=16,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
_BART = dict(
    **_TOKENS,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=128,
    dropout=0.0,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)

FAMILIES = {
    family.name: family
    for family in (
        _decoder("llama", "LlamaConfig", "LlamaForCausalLM"),
        _decoder("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
        _decoder("qwen3", "Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=16)),
        _decoder("mistral", "MistralConfig", "MistralForCausalLM", dict(sliding_window=WINDOW)),
        _decoder("mixtral", "MixtralConfig", "MixtralForCausalLM", _MOE),
        _decoder(
            "phi3",
            "Phi3Config",
            "Phi3ForCausalLM",
            dict(sliding_window=WINDOW, resid_pdrop=0.0, original_max_position_embeddings=128),
        ),
        _decoder("phi", "PhiConfig", "PhiForCausalLM", dict(resid_pdrop=0.0)),
        _decoder("granite", "GraniteConfig", "GraniteForCausalLM", dict(attention_multiplier=0.3)),
        _decoder("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
        _decoder(
            "starcoder2",
            "Starcoder2Config",
            "Starcoder2ForCausalLM",
            dict(sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0),
        ),
        _decoder("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
        _decoder("glm4", "Glm4Config", "Glm4ForCausalLM", dict(head_dim=16)),
        _decoder("cohere", "CohereConfig", "CohereForCausalLM"),
        _decoder(
            "cohere2",
            "Cohere2Config",
            "Cohere2ForCausalLM",
            dict(sliding_window=WINDOW, layer_types=_SLIDING),
        ),
        _decoder("gemma", "GemmaConfig", "GemmaForCausalLM", dict(head_dim=16)),
        _decoder(
            "gemma2",
            "Gemma2Config",
            "Gemma2ForCausalLM",
            dict(
                head_dim=16,
                sliding_window=WINDOW,
                layer_types=_SLIDING,
                attn_logit_softcapping=4.0,
                query_pre_attn_scalar=16,
            ),
        ),
        _decoder(
            "gemma3",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            dict(
                head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING, query_pre_attn_scalar=16
            ),
        ),
        _decoder(
            "gemma4",
            "Gemma4TextConfig",
            "Gemma4ForCausalLM",
            dict(
                head_dim=16,
                global_head_dim=16,
                num_hidden_layers=4,
                layer_types=_SLIDING * 2,
                sliding_window=WINDOW,
                num_kv_shared_layers=2,
                hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=VOCABULARY,
            ),
        ),
        _decoder(
            "llama4",
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            dict(
                head_dim=16,
                intermediate_size_mlp=64,
                attention_chunk_size=WINDOW,
                layer_types=["chunked_attention", "full_attention"],
                no_rope_layers=[1, 0],
                num_local_experts=2,
                interleave_moe_layer_step=2,
            ),
        ),
        _decoder(
            "gpt_oss",
            "GptOssConfig",
            "GptOssForCausalLM",
            dict(head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING, **_MOE),
        ),
        _decoder("deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA),
        _decoder(
            "deepseek_v32",
            "DeepseekV32Config",
            "DeepseekV32ForCausalLM",
            dict(**_MLA, index_topk=12, index_n_heads=2, index_head_dim=16),
        ),
        _decoder(
            "gpt2",
            "GPT2Config",
            "GPT2LMHeadModel",
            dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0)
            | dict(attn_pdrop=0.0),
            dropout=("attn_pdrop",),
        ),
        _decoder("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", dict(hidden_dropout=0.0)),
        _decoder(
            "opt",
            "OPTConfig",
            "OPTForCausalLM",
            dict(ffn_dim=64, word_embed_proj_dim=64, dropout=0.0),
            without=("packed", "flat", "mask4d"),
        ),
        _decoder(
            "bloom",
            "BloomConfig",
            "BloomForCausalLM",
            dict(n_layer=2, n_head=4, hidden_dropout=0.0),
            without=("packed", "flat", "mask4d", "static", "dropout"),
            dropout=(),
        ),
        _decoder(
            "mpt",
            "MptConfig",
            "MptForCausalLM",
            dict(d_model=64, n_layers=2, n_heads=4, expansion_ratio=1, max_seq_len=128),
            without=("packed", "flat", "mask4d", "static", "dropout"),
            dropout=(),
        ),
        _encoder("bert", "BertConfig", "BertModel"),
        _encoder("roberta", "RobertaConfig", "RobertaModel"),
        _encoder("electra", "ElectraConfig", "ElectraModel", dict(embedding_size=64)),
        _encoder(
            "distilbert",
            "DistilBertConfig",
            "DistilBertModel",
            dict(dim=64, hidden_dim=64, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0),
            dropout=("attention_dropout",),
        ),
        _encoder(
            "modernbert",
            "ModernBertConfig",
            "ModernBertModel",
            dict(local_attention=WINDOW, layer_types=_SLIDING, cls_token_id=1, sep_token_id=2),
            dropout=("ModernBertAttention.attention_dropout",),
        ),
        Family("clip_text", "encoder", "CLIPTextModel", _clip, without=("mask4d", "left")),
        Family(
            "t5",
            "seq2seq",
            "T5ForConditionalGeneration",
            lambda: hf.T5Config(**_T5),
            dropout=("T5Attention.dropout",),
        ),
        Family("bart", "seq2seq", "BartForConditionalGeneration", lambda: hf.BartConfig(**_BART)),
        Family(
            "whisper",
            "seq2seq",
            "WhisperForConditionalGeneration",
            lambda: hf.WhisperConfig(
                **_BART,
                num_mel_bins=8,
                max_source_positions=LENGTH,
                max_target_positions=64,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            ),
            without=("right", "left", "holes"),
        ),
        Family(
            "gemma3_images",
            "images",
            "Gemma3ForConditionalGeneration",
            _gemma3_images,
            dropout=("Gemma3Attention.attention_dropout",),
        ),
        Family(
            "mllama",
            "images",
            "MllamaForCausalLM",
            lambda: hf.models.mllama.MllamaTextConfig(
                **_LLAMA, cross_attention_layers=[1], rope_parameters=_ROPE
            ),
            dropout=("MllamaTextSelfAttention.dropout", "MllamaTextCrossAttention.dropout"),
        ),
        _vision("vit", "ViTConfig", "ViTModel"),
        _vision("dinov2", "Dinov2Config", "Dinov2Model"),
        _vision(
            "siglip", "SiglipVisionConfig", "SiglipVisionModel", dropout=("attention_dropout",)
        ),
        Family(
            "swin",
            "vision",
            "SwinModel",
            lambda: hf.SwinConfig(
                image_size=24,
                patch_size=2,
                embed_dim=32,
                depths=[2, 1],
                num_heads=[2, 4],
                window_size=3,
                drop_path_rate=0.0,
            ),
            dropout=("attention_probs_dropout_prob",),
        ),
        Family(
            "wav2vec2",
            "audio",
            "Wav2Vec2Model",
            lambda: hf.Wav2Vec2Config(
                **{k: v for k, v in _VISION.items() if "size" not in k or k == "hidden_size"},
                intermediate_size=64,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                hidden_dropout=0.0,
                feat_proj_dropout=0.0,
                activation_dropout=0.0,
                attention_dropout=0.0,
                layerdrop=0.0,
                mask_time_prob=0.0,
                apply_spec_augment=False,
            ),
        ),
    )
}
