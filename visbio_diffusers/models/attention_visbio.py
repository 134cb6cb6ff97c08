"""The attention of VisBioUNet, and the transformer blocks over image and over text tokens.

Shapes in trailing comments: B batch, N image tokens, L text tokens, D token width.
"""

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class VisBioAttnProcessor:
    """Compute scaled dot-product attention through Diffusers' dispatcher, so that every attention backend works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, key_value=None):
        """Return attention of `hidden_states` (B, N, D) to itself, to `encoder_hidden_states`, or to a `key_value`."""
        if attn.fused_projections and not attn.is_cross_attention:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            key_value = attn.heads_of_keys(key, value)
        else:
            query = attn.to_q(hidden_states)
        if key_value is None:
            key_value = attn.key_value(hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        key, value = key_value
        query = attn.norm_q(query.unflatten(-1, (attn.heads, -1))).to(value.dtype)  # (B, N, heads, D / heads)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))


class VisBioAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with normalised queries and keys (Dehghani et al. 2023, ViT-22B), which bf16 and fp16 need.

    Args:
        query_dim (`int`): width of the tokens that ask, and of the output.
        heads (`int`): number of heads; `query_dim` is split among them.
        cross_attention (`bool`): keys and values come from `encoder_hidden_states` instead of the tokens themselves.
        dropout (`float`): after the output projection.
    """

    _default_processor_cls = VisBioAttnProcessor
    _available_processors = [VisBioAttnProcessor]

    def __init__(self, query_dim, heads, cross_attention=False, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.is_cross_attention = cross_attention
        self.use_bias = False
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(query_dim, query_dim, bias=False)
        self.norm_q = nn.RMSNorm(query_dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(query_dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(VisBioAttnProcessor())

    def heads_of_keys(self, key, value):
        """Split projected keys and values into heads and normalise the keys: two of (B, L, heads, D / heads)."""
        value = value.unflatten(-1, (self.heads, -1))
        return self.norm_k(key.unflatten(-1, (self.heads, -1))).to(value.dtype), value

    def key_value(self, hidden_states):
        """Project tokens (B, L, D) to keys and values, split into heads."""
        if self.is_cross_attention and self.fused_projections:
            return self.heads_of_keys(*self.to_kv(hidden_states).chunk(2, dim=-1))
        return self.heads_of_keys(self.to_k(hidden_states), self.to_v(hidden_states))

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, key_value=None):
        """Apply the processor; arguments as in `VisBioAttnProcessor.__call__`."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, key_value)


class VisBioTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; FiLM of time and text on the first and the last.

    FiLM (scale, shift, gate) starts at zero, so that each new block begins as the identity apart from the text
    (Perez et al. 2018; Peebles & Xie 2023, adaLN-Zero).
    """

    def __init__(self, dim, heads, film_dim, cross_attention, mlp_ratio, dropout):
        super().__init__()
        self.film = nn.Linear(film_dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn1 = VisBioAttention(dim, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6) if cross_attention else None
        self.attn2 = VisBioAttention(dim, heads, cross_attention=True, dropout=dropout) if cross_attention else None
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu", dropout=dropout)

    def forward(self, hidden_states, film, attention_mask=None, key_value=None):
        """Map tokens (B, N, D) to tokens, given the FiLM vector (B, F) and the text's keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.film(film).unsqueeze(1).chunk(6, dim=-1)  # (B, 1, D)
        normed = torch.addcmul(shift1, self.norm1(hidden_states), 1 + scale1)
        hidden_states = torch.addcmul(hidden_states, gate1, self.attn1(normed))
        if self.attn2 is not None:
            text = self.attn2(self.norm2(hidden_states), attention_mask=attention_mask, key_value=key_value)
            hidden_states = hidden_states + text
        normed = torch.addcmul(shift2, self.norm3(hidden_states), 1 + scale2)
        return torch.addcmul(hidden_states, gate2, self.ff(normed))


class VisBioTextBlock(nn.Module):
    """One pre-norm transformer block over text tokens, which adapts a frozen text encoder to images."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn1 = VisBioAttention(dim, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=2 * dim, activation_fn="gelu", dropout=dropout)

    def forward(self, hidden_states, attention_mask):
        """Map text tokens (B, L, D) to text tokens."""
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        return hidden_states + self.ff(self.norm2(hidden_states))
