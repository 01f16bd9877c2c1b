"""The decoders of gin/models/ in PyTorch, as its users write them, and a train step under `torch.compile`.

GPT (LayerNorm, learned positions, biases, GELU, the head tied) or Llama (RMSNorm, rotary positions, grouped keys and
values, SwiGLU, no biases): the parts that a `DecoderConfig` names. In place of the query layer there is one more block
of the same size. Attention respects the documents of a batch, by `varlen_attn` (FlashAttention of packed documents) or
by `flex_attention` with a block mask.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ATTENTION = ("varlen", "flex")


def attention_of(kind: str, segments_BL: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A function from queries [B, H, L, K] and keys and values [B, G, L, K] to [B, H, L, K]."""
    batch, length = segments_BL.shape
    if kind == "dense":  # for tests, anywhere
        same = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
        mask = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape != k.shape)
    if kind == "flex":
        def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
            return (query >= key) & (segments_BL[row, query] == segments_BL[row, key])

        mask = create_block_mask(visible, batch, None, length, length, device=segments_BL.device.type)
        return lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape != k.shape)
    from torch.nn.attention.varlen import varlen_attn

    begins = torch.ones_like(segments_BL, dtype=torch.bool)
    begins[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    starts = torch.nonzero(begins.flatten()).flatten().int()
    edges = torch.cat([starts, starts.new_tensor([batch * length])])
    longest = int(edges.diff().max())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).reshape(batch * length, x.shape[1], -1) for x in (q, k, v))
        more = {"enable_gqa": True} if q.shape != k.shape else {}
        attended = varlen_attn(q, k, v, edges, edges, longest, longest, window_size=(-1, 0), **more)
        return attended.view(batch, length, *q.shape[1:]).transpose(1, 2)

    return attend


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        bias, hidden, size = config.biases != "none", config.hidden, config.size_of_head
        norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.heads, self.key_heads = config.heads, config.key_heads
        self.widths = [self.heads * size, self.key_heads * size, self.key_heads * size]
        self.norm1, self.norm2 = norm(hidden, eps=config.norm_epsilon), norm(hidden, eps=config.norm_epsilon)
        self.qkv, self.out = nn.Linear(hidden, sum(self.widths), bias), nn.Linear(self.widths[0], hidden, bias)
        self.gate = nn.Linear(hidden, config.feedforward, bias) if config.is_gated else None
        self.up, self.down = nn.Linear(hidden, config.feedforward, bias), nn.Linear(config.feedforward, hidden, bias)

    def forward(self, x: torch.Tensor, attend: Callable[..., torch.Tensor], turns: Any) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part, heads in zip(
            self.qkv(self.norm1(x)).split(self.widths, dim=2), (self.heads, self.key_heads, self.key_heads),
            strict=True))
        if turns is not None:
            q, k = turned(q, *turns), turned(k, *turns)
        x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(batch, length, -1))
        y = self.norm2(x)
        expanded = F.gelu(self.up(y), approximate="tanh") if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(expanded)


def turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions, by halves."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


class Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden
        self.tokens = nn.Embedding(config.vocabulary_size, hidden)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.length, hidden) if learned else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(hidden, eps=config.norm_epsilon)
        self.head = nn.Linear(hidden, config.vocabulary_size, bias=False)
        if config.tied_head:
            self.head.weight = self.tokens.weight
        size = config.size_of_head
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("frequencies", config.rotary_theta ** -(torch.arange(0, size, 2) / size), False)

    def forward(self, batch: Mapping[str, torch.Tensor], attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The mean loss over the counted targets."""
        x, turns = self.tokens(batch["inputs"]), None
        if self.positions is not None:
            x = x + self.positions(batch["positions"])
        else:
            angles = (batch["positions"][:, None, :, None] * self.frequencies)
            turns = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, attend, turns)
        logits = self.head(self.norm(x))
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return (losses * batch["weights"].flatten()).sum() / batch["weights"].sum()


class TrainStep:
    """A train step on one batch, which is reused: bfloat16 autocast on a GPU, fused AdamW, gradients clipped to 1."""

    def __init__(self, config: Any, batch: Mapping[str, Any], kind: str, device: str = "cuda") -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.batch = {name: torch.as_tensor(value, device=device).long() for name, value in batch.items()}
        self.batch["weights"] = self.batch["weights"].float()
        self.device, self.attend = device, attention_of(kind, self.batch.pop("segment_ids"))
        self.model = Model(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.compiled = torch.compile(self.model)

    def gradients(self) -> torch.Tensor:
        """The loss; compiles both passes at the first call, which takes no memory for the optimizer."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.compiled(self.batch, self.attend)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    def __call__(self) -> torch.Tensor:
        loss = self.gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss
