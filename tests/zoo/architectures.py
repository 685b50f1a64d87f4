"""Whole architectures from their configs, small and with random weights: model and inputs.

Every width is divisible by 16, so that any structure fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Built", "build"]

Built = tuple[nn.Module, dict[str, Any]]
VOCABULARY, TOKENS, WIDTH, HEADS, LAYERS, HIDDEN = 96, 8, 32, 2, 2, 64


def build(name: str) -> Built:
    """Return the model in eval mode and float64, and keyword inputs; seeded, torch's own RNG kept.

    Args:
        name: of ``ARCHITECTURES``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = ARCHITECTURES[name]()
        for parameter in model.parameters():
            if parameter.dim() < 2:  # biases and norms that start at 0 and 1 would hide mistakes
                nn.init.normal_(parameter, 0.5, 0.2)
    doubled = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return model.double().eval(), doubled


def ids(*shape: int) -> Tensor:
    """Return token numbers; 0 to 2 are special in several architectures."""
    return torch.randint(3, VOCABULARY, shape or (2, TOKENS))


def pixels(size: int = 32) -> Tensor:
    """Return images."""
    return torch.randn(2, 3, size, size)


def gpt2() -> Built:
    """Projections are Conv1D, whose weight is (i, o)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    return GPT2LMHeadModel(config), {"input_ids": ids()}


def _encoder(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
    } | more


def bert() -> Built:
    """Post-norm encoder, with a masked language model's head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**_encoder(vocab_size=VOCABULARY, max_position_embeddings=16))
    return BertForMaskedLM(config), {"input_ids": ids()}


def vit() -> Built:
    """Patches, a class token, pre-norm."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_encoder(image_size=32, patch_size=8, num_labels=10))
    return ViTForImageClassification(config), {"pixel_values": pixels()}


def deit() -> Built:
    """As ViT with a distillation token."""
    from transformers import DeiTConfig, DeiTForImageClassification

    config = DeiTConfig(**_encoder(image_size=32, patch_size=8, num_labels=10))
    return DeiTForImageClassification(config), {"pixel_values": pixels()}


def swin() -> Built:
    """Shifted windows and patch merging."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    )
    return SwinForImageClassification(config), {"pixel_values": pixels()}


def _decoder(**more: Any) -> dict[str, Any]:
    return _encoder(vocab_size=VOCABULARY, max_position_embeddings=32) | more


def llama() -> Built:
    """RoPE, RMS norm, SwiGLU, grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_decoder(num_key_value_heads=1))
    return LlamaForCausalLM(config), {"input_ids": ids()}


def mistral() -> Built:
    """As Llama with a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**_decoder(num_key_value_heads=1, sliding_window=4))
    return MistralForCausalLM(config), {"input_ids": ids()}


def qwen2() -> Built:
    """As Llama with biases in q, k, v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_decoder(num_key_value_heads=1))
    return Qwen2ForCausalLM(config), {"input_ids": ids()}


def gemma() -> Built:
    """Norms scale by 1 + w; the head is the embedding."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**_decoder(num_key_value_heads=1, head_dim=16, pad_token_id=0))
    return GemmaForCausalLM(config), {"input_ids": ids()}


def phi() -> Built:
    """Attention beside the MLP, RoPE on part of a head."""
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**_decoder())), {"input_ids": ids()}


def t5() -> Built:
    """Encoder and decoder, relative positions, cross attention."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=16,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
    )
    return T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids()}


def _two_towers(**more: Any) -> dict[str, Any]:
    return {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": HIDDEN,
        "decoder_ffn_dim": HIDDEN,
        "vocab_size": VOCABULARY,
    } | more


def bart() -> Built:
    """Encoder and decoder with learned positions."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**_two_towers(max_position_embeddings=32))
    inputs = {"input_ids": ids(), "decoder_input_ids": ids()}
    return BartForConditionalGeneration(config), inputs


def whisper() -> Built:
    """Two convolutions before the encoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    special: dict[str, Any] = {
        f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "decoder_start")
    }
    config = WhisperConfig(
        **_two_towers(num_mel_bins=16, max_source_positions=16, max_target_positions=16), **special
    )
    inputs = {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids()}
    return WhisperForConditionalGeneration(config), inputs


def clip() -> Built:
    """Two encoders that meet in a product of features."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=_decoder(eos_token_id=2, bos_token_id=1, pad_token_id=0),
        vision_config=_encoder(image_size=32, patch_size=8),
        projection_dim=32,
    )
    return CLIPModel(config), {"input_ids": ids(), "pixel_values": pixels()}


def mixtral() -> Built:
    """Stacked experts behind a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(num_key_value_heads=1, num_local_experts=4))
    config._experts_implementation = "eager"  # the others multiply no float64
    return MixtralForCausalLM(config), {"input_ids": ids()}


def mamba() -> Built:
    """State space layers with a depthwise convolution."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=16,
        num_hidden_layers=LAYERS,
        time_step_rank=32,
    )
    return MambaForCausalLM(config), {"input_ids": ids()}


def dinov2() -> Built:
    """As ViT with scales behind every branch."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(**_encoder(image_size=32, patch_size=8, num_labels=10, mlp_ratio=2))
    return Dinov2ForImageClassification(config), {"pixel_values": pixels()}


def convnext() -> Built:
    """Depthwise convolutions and MLPs with channels last."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 2], num_stages=2)
    return ConvNextForImageClassification(config), {"pixel_values": pixels()}


def opt() -> Built:
    """Pre-norm decoder, ReLU."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=HIDDEN,
        max_position_embeddings=16,
        word_embed_proj_dim=WIDTH,
    )
    return OPTForCausalLM(config), {"input_ids": ids()}


def bloom() -> Built:
    """q, k and v in one layer, head by head; ALiBi."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS)
    return BloomForCausalLM(config), {"input_ids": ids()}


def falcon() -> Built:
    """One key and value head for all; attention beside the MLP."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
    )
    return FalconForCausalLM(config), {"input_ids": ids()}


def gpt_neox() -> Built:
    """q, k and v in one layer, head by head; RoPE."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_decoder())), {"input_ids": ids()}


def torch_transformer() -> Built:
    """torch's own: packed in-projections, cross attention, the encoder's fast path."""
    model = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, HIDDEN, dropout=0.0, batch_first=True)
    return model, {"src": torch.randn(2, TOKENS, WIDTH), "tgt": torch.randn(2, 6, WIDTH)}


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        gpt2,
        bert,
        vit,
        deit,
        swin,
        llama,
        mistral,
        qwen2,
        gemma,
        phi,
        t5,
        bart,
        whisper,
        clip,
        mixtral,
        mamba,
        dinov2,
        convnext,
        opt,
        bloom,
        falcon,
        gpt_neox,
        torch_transformer,
    )
}
"""Every architecture by its name."""
