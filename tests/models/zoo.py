"""Hugging Face models as people bring them: small configurations, random weights, nothing changed.

`MODELS` names a `Subject` for each: a model in training mode, a batch with rows of different lengths, padding masks and
labels of -100, and the loss of each row, from the model's logits or as the model itself computes it.

Legend: N rows, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.agreement import Batch, Subject

N, T, V, PAD = 5, 6, 29, 1
PICTURE = V  # a token
FLOAT32 = 1e-5  # where a model computes in float32 whatever its weights are

TOKENS = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = TOKENS | SIZES | {"max_position_embeddings": 16}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 6}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = TEXT | NO_DROPOUT
GPT2 = TOKENS | {
    "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0
}  # fmt: skip
T5 = TOKENS | {
    "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE = SIZES | NO_DROPOUT | {"image_size": 8, "patch_size": 4, "num_labels": 3}

# ------------------------------------------------------------------------------------------------------------ batches


def random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def tokens() -> Batch:
    """Token ids, padded on the right; the first row and the last are whole, and no two in between are alike."""
    ids = torch.randint(4, V, (N, T), generator=random())
    lengths = torch.tensor([T, 3, 2, 4, T])
    mask = torch.arange(T) < lengths[:, None]
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def language() -> Batch:
    """Each token is its own label; padding has none."""
    batch = tokens()
    return batch | {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}


def masked_language() -> Batch:
    """Labels at every second position."""
    batch = language()
    return batch | {"labels": torch.where(torch.arange(T) % 2 == 0, batch["labels"], -100)}


def classes() -> Batch:
    return tokens() | {"labels": torch.arange(N) % 3}


def translation() -> Batch:
    """An encoder's tokens, and labels of another length, which the decoder is given shifted by one."""
    labels = language()["labels"][:, 1:]
    ids = F.pad(labels, (1, 0), value=0)[:, :-1]
    return tokens() | {"labels": labels, "decoder_input_ids": torch.where(ids == -100, PAD, ids)}


def images(size: int = 8) -> Batch:
    pixels = torch.randn(N, 3, size, size, generator=random(), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.arange(N) % 3}


def pictures_and_text() -> Batch:
    """Four tokens that stand for the picture's patches, then text."""
    batch, front = language(), torch.full((N, 4), PICTURE)
    return {
        "input_ids": torch.cat([front, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), batch["labels"]], 1),
        "pixel_values": images()["pixel_values"],
    }


def pixels() -> Batch:
    return {"pixel_values": images()["pixel_values"]}


def speech() -> Batch:
    """Spectrograms, and a decoder's tokens."""
    features = torch.randn(N, 5, 16, generator=random(), dtype=torch.float64)
    return {"input_features": features, **{name: translation()[name] for name in ("labels", "decoder_input_ids")}}


def sound() -> Batch:
    return {"input_values": torch.randn(N, 64, generator=random(), dtype=torch.float64), "labels": torch.arange(N) % 3}


# ------------------------------------------------------------------------------------------------------------- losses


def next_token_losses(outputs: Any, batch: Batch) -> Tensor:
    return _token_losses(outputs.logits[:, :-1], batch["labels"][:, 1:])


def token_losses(outputs: Any, batch: Batch) -> Tensor:
    return _token_losses(outputs.logits, batch["labels"])


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / T


def class_losses(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")


def hidden_losses(outputs: Any, batch: Batch) -> Tensor:
    return (outputs.last_hidden_state - 0.3).square().flatten(1).mean(1)


def pooled_losses(outputs: Any, batch: Batch) -> Tensor:
    return hidden_losses(outputs, batch) + (outputs.pooler_output - 0.1).square().sum(1)


def own_loss(outputs: Any, batch: Batch) -> Tensor:
    """As the model computes it."""
    return outputs.loss


# ------------------------------------------------------------------------------------------------------------- models


def build(architecture: str, config: dict[str, Any], attention: str | None = None) -> nn.Module:
    """In its initial state, the same on every call, in float64 and in training mode."""
    kind = getattr(transformers, architecture)
    made = kind.config_class(**config)
    if attention is not None:
        made._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(made)
        with torch.no_grad():  # norms and biases start at ones and zeros, where mistakes can hide
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().train()


def architecture(of: Subject) -> str:
    """The name of its class."""
    assert isinstance(of.model, functools.partial)
    return str(of.model.args[0])


def subject(
    architecture: str, config: dict[str, Any], batch: Any, losses: Any, *, attention: str | None = None, **options: Any
) -> Subject:
    made = functools.partial(build, architecture, config, attention)
    return Subject(model=made, batch=batch, losses=losses, **options)


WINDOWED = NO_DROPOUT | {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 6,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "num_labels": 3,
}
WIDE_GROUPED = GROUPED | {"query_pre_attn_scalar": 6}  # Gemma 2 and 3
SEQ2SEQ = TOKENS | {
    "d_model": 12, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 16, "dropout": 0.0,
    "decoder_start_token_id": 2,
}  # fmt: skip
WAV2VEC2 = SIZES | {
    "conv_dim": [6, 6], "conv_stride": [3, 2], "conv_kernel": [5, 3], "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer", "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
DISENTANGLED = ENCODER | {
    "num_labels": 3, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0,
    "pooler_hidden_size": 12,
}  # fmt: skip
DISENTANGLED_V2 = DISENTANGLED | {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
EXPERTS = GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}
BY_TOKEN = {"experts_implementation": "batched_mm"}
STATES = TOKENS | {"hidden_size": 12, "num_hidden_layers": 2, "state_size": 4}
MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4
}  # fmt: skip
LLAVA = {
    "text_config": GROUPED | {"model_type": "llama", "vocab_size": V + 1},
    "vision_config": SIZES | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
    "image_token_id": PICTURE,
    "vision_feature_layer": -1,
}
RESNET = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "num_labels": 3}


def lm(architecture: str, config: dict[str, Any], **options: Any) -> Subject:
    return subject(architecture, config, language, next_token_losses, **options)


def mlm(architecture: str, config: dict[str, Any], **options: Any) -> Subject:
    return subject(architecture, config, masked_language, token_losses, **options)


MODELS: dict[str, Subject] = {
    "GPT-2": lm("GPT2LMHeadModel", GPT2),
    "GPT-NeoX": lm("GPTNeoXForCausalLM", TEXT | {"hidden_dropout": 0.0}),
    "GPT-J": lm("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),
    "OPT": lm("OPTForCausalLM", TEXT | {"ffn_dim": 20, "word_embed_proj_dim": 12, "dropout": 0.0}),
    "Bloom": lm(
        "BloomForCausalLM",
        TOKENS | {"hidden_size": 12, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "Llama": lm("LlamaForCausalLM", GROUPED, tolerance=FLOAT32),
    "Mistral": lm("MistralForCausalLM", GROUPED | {"sliding_window": 4}, tolerance=FLOAT32),
    "Qwen2": lm("Qwen2ForCausalLM", GROUPED, tolerance=FLOAT32),
    "Qwen3": lm("Qwen3ForCausalLM", GROUPED, tolerance=FLOAT32),
    "Gemma": lm("GemmaForCausalLM", GROUPED, tolerance=FLOAT32),
    "Gemma 3": lm("Gemma3ForCausalLM", WIDE_GROUPED, tolerance=FLOAT32),
    "Phi-3": lm("Phi3ForCausalLM", TEXT | {"num_key_value_heads": 1}, tolerance=FLOAT32),
    "OLMo 2": lm("Olmo2ForCausalLM", TEXT | {"num_key_value_heads": 1}, tolerance=FLOAT32),
    "Mixtral, batched experts": lm("MixtralForCausalLM", EXPERTS | BY_TOKEN, tolerance=FLOAT32),
    "Qwen3-MoE, batched experts": lm(
        "Qwen3MoeForCausalLM",
        GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8} | BY_TOKEN,
        tolerance=FLOAT32,
    ),
    "Mamba": lm("MambaForCausalLM", STATES),
    "Mamba 2": lm("Mamba2ForCausalLM", STATES | {"num_heads": 4, "head_dim": 6, "n_groups": 1, "chunk_size": 4}),
    "Falcon-Mamba": lm("FalconMambaForCausalLM", STATES),
    "Jamba, batched experts": lm(
        "JambaForCausalLM",
        GROUPED
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
        | BY_TOKEN,
    ),
    "Bamba": lm("BambaForCausalLM", GROUPED | MAMBA2 | {"attn_layer_indices": [1]}),
    "Falcon-H1": lm("FalconH1ForCausalLM", GROUPED | MAMBA2 | {"mamba_d_ssm": 24}),
    "Granite 4 hybrid": lm(
        "GraniteMoeHybridForCausalLM",
        GROUPED
        | MAMBA2
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 20},
    ),
    "LFM2": lm("Lfm2ForCausalLM", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "Qwen3-Next, batched experts": lm(
        "Qwen3NextForCausalLM",
        GROUPED
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_experts": 3}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
        | BY_TOKEN,
        tolerance=FLOAT32,
    ),
    "Gemma 2": lm("Gemma2ForCausalLM", WIDE_GROUPED, tolerance=FLOAT32),
    "Granite": lm("GraniteForCausalLM", GROUPED, tolerance=FLOAT32),
    "Falcon": lm("FalconForCausalLM", TEXT | {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "MPT": lm("MptForCausalLM", TOKENS | {"d_model": 12, "n_heads": 2, "n_layers": 2, "max_seq_len": 16}),
    "StarCoder2": lm(
        "Starcoder2ForCausalLM", TEXT | {"num_key_value_heads": 1, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    ),
    "Cohere 2": lm("Cohere2ForCausalLM", TEXT | {"num_key_value_heads": 1}, tolerance=FLOAT32),
    "RWKV": lm("RwkvForCausalLM", TOKENS | {"hidden_size": 12, "num_hidden_layers": 2, "context_length": 16}),
    "OLMoE, batched experts": lm(
        "OlmoeForCausalLM", TEXT | {"num_experts": 3, "num_experts_per_tok": 2} | BY_TOKEN, tolerance=FLOAT32
    ),
    "GPT-OSS, batched experts": lm(
        "GptOssForCausalLM",
        EXPERTS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4} | BY_TOKEN,
        tolerance=FLOAT32,
    ),
    "DeepSeek-V3, batched experts": lm(
        "DeepseekV3ForCausalLM",
        TEXT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
        | {"q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
        | {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "num_key_value_heads": 2}
        | BY_TOKEN,
        tolerance=FLOAT32,
    ),
    "LLaVA": subject("LlavaForConditionalGeneration", LLAVA, pictures_and_text, next_token_losses, tolerance=FLOAT32),
    "BERT": mlm("BertForMaskedLM", ENCODER),
    "BERT, classes": subject("BertForSequenceClassification", ENCODER | {"num_labels": 3}, classes, class_losses),
    "RoBERTa": mlm("RobertaForMaskedLM", ENCODER),
    "DistilBERT": mlm(
        "DistilBertForMaskedLM",
        TOKENS
        | {
            "dim": 12,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 20,
            "max_position_embeddings": 16,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "ALBERT": mlm("AlbertForMaskedLM", ENCODER | {"embedding_size": 8}),
    "ELECTRA": mlm("ElectraForMaskedLM", ENCODER | {"embedding_size": 8}),
    "ModernBERT": mlm(
        "ModernBertForMaskedLM", ENCODER | {"mlp_dropout": 0.0, "embedding_dropout": 0.0}, tolerance=FLOAT32
    ),
    "DeBERTa": subject("DebertaForSequenceClassification", DISENTANGLED, classes, class_losses),
    "DeBERTa-v2": subject("DebertaV2ForSequenceClassification", DISENTANGLED_V2, classes, class_losses),
    "LayoutLMv3": subject(
        "LayoutLMv3ForSequenceClassification",
        ENCODER
        | {"num_labels": 3, "max_2d_position_embeddings": 16, "coordinate_size": 2, "shape_size": 2}
        | {"visual_embed": False, "has_relative_attention_bias": True, "has_spatial_attention_bias": True}
        | {"rel_pos_bins": 4, "rel_2d_pos_bins": 4},
        classes,
        class_losses,
    ),
    "MobileBERT": mlm(
        "MobileBertForMaskedLM",
        ENCODER
        | {"embedding_size": 8, "intra_bottleneck_size": 6, "true_hidden_size": 6, "num_feedforward_networks": 2},
    ),
    "T5": subject("T5ForConditionalGeneration", T5, translation, token_losses, tolerance=FLOAT32),
    "Flan-T5": subject(
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        translation,
        token_losses,
        tolerance=FLOAT32,
    ),
    "BART": subject("BartForConditionalGeneration", SEQ2SEQ, translation, token_losses),
    "mBART": subject("MBartForConditionalGeneration", SEQ2SEQ, translation, token_losses),
    "Marian": subject("MarianMTModel", SEQ2SEQ | {"decoder_vocab_size": V}, translation, token_losses),
    "Pegasus": subject("PegasusForConditionalGeneration", SEQ2SEQ, translation, token_losses),
    "Whisper": subject(
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 5, "max_source_positions": 8, "max_target_positions": 16},
        speech,
        token_losses,
    ),
    "ViT": subject("ViTForImageClassification", IMAGE, images, class_losses),
    "DeiT": subject("DeiTForImageClassification", IMAGE, images, class_losses),
    "BEiT": subject(
        "BeitForImageClassification",
        IMAGE | {"layer_scale_init_value": 0.1, "use_relative_position_bias": True, "drop_path_rate": 0.0},
        images,
        class_losses,
    ),
    "DINOv2": subject(
        "Dinov2ForImageClassification", IMAGE | {"mlp_ratio": 2, "drop_path_rate": 0.0}, images, class_losses
    ),
    "Swin": subject(
        "SwinForImageClassification",
        WINDOWED,
        functools.partial(images, 16),
        class_losses,
    ),
    "Swin v2": subject(
        "Swinv2ForImageClassification",
        WINDOWED,
        functools.partial(images, 16),
        class_losses,
    ),
    "ConvNeXt": subject(
        "ConvNextForImageClassification",
        {
            "hidden_sizes": [6, 8],
            "depths": [1, 1],
            "num_stages": 2,
            "image_size": 16,
            "patch_size": 2,
            "drop_path_rate": 0.0,
            "num_labels": 3,
        },
        functools.partial(images, 16),
        class_losses,
    ),
    "SegFormer": subject(
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [6, 8], "num_labels": 3}
        | {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        | {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
        | NO_DROPOUT,
        functools.partial(images, 16),
        class_losses,
    ),
    "CLIP text": subject("CLIPTextModel", TEXT, tokens, pooled_losses),
    "CLIP vision": subject("CLIPVisionModel", SIZES | {"image_size": 8, "patch_size": 4}, pixels, pooled_losses),
    "SigLIP vision": subject("SiglipVisionModel", SIZES | {"image_size": 8, "patch_size": 4}, pixels, pooled_losses),
    "Wav2Vec2": subject("Wav2Vec2ForSequenceClassification", WAV2VEC2, sound, class_losses),
    "HuBERT": subject("HubertForSequenceClassification", WAV2VEC2, sound, class_losses),
}

REFUSED: dict[str, tuple[Subject, str]] = {
    "Mixtral, other experts": (
        lm("MixtralForCausalLM", EXPERTS | {"experts_implementation": "eager"}),
        "experts.gate_up_proj' is given entries that were picked from all rows by the data",
    ),
    "ResNet": (
        subject("ResNetForImageClassification", RESNET, functools.partial(images, 16), class_losses),
        "BatchNorm2d mixes the rows of a batch",
    ),
}
"""Models, and what they are told."""
