"""The three small vision transformers of the zoo, in plain torch with eager attention.

All take ``images`` [N, 1, 28, 28] float32 (normalised) and return logits [N, 10] float32 in evaluation mode.
Attention is MatMul, Softmax, MatMul on purpose: that is what published exports hold.
"""

import torch
from torch import Tensor, nn

IMAGE_SIZE = 28
CLASS_COUNT = 10
NORM_EPSILON = 1e-6
MASK_VALUE = -100.0  # what the published Swin models add to pairs of tokens that are not neighbours


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv Linear; ``bias`` is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend within each row of x [B, T, C]; bias [heads, T, T]; mask [windows, T, T], B a multiple of windows."""
        tokens, width = x.shape[1], x.shape[2]
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.reshape(-1, windows, self.heads, tokens, tokens) + mask[:, None]
            scores = scores.reshape(-1, self.heads, tokens, tokens)
        mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(-1, tokens, width))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis of x [..., C]; the shape stays."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block on tokens [N, T, C]."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [N, T, C] after attention and MLP."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A ViT with a class token; with ``distilled``, a DeiT with a second token and head (their mean at inference)."""

    def __init__(
        self, *, patch: int, width: int, depth: int, heads: int, ratio: int = 4, distilled: bool = False
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, patch, stride=patch)
        self.distilled = distilled
        self.special_tokens = nn.Parameter(torch.zeros(1, 2 if distilled else 1, width))
        token_count = (IMAGE_SIZE // patch) ** 2 + self.special_tokens.shape[1]
        self.position = nn.Parameter(torch.zeros(1, token_count, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.head = nn.Linear(width, CLASS_COUNT)
        self.head_distilled = nn.Linear(width, CLASS_COUNT) if distilled else None
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [N, 10]; while training a distilled model, the pair (label head, teacher head)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.special_tokens.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.head(x[:, 0])
        if self.head_distilled is None:
            return logits
        logits_distilled = self.head_distilled(x[:, 1])
        if self.training:
            return logits, logits_distilled
        return (logits + logits_distilled) / 2


class SwinBlock(nn.Module):
    """A Swin block on a feature map [N, H, W, C]: attention inside windows, shifted and masked where ``shift`` > 0."""

    def __init__(self, width: int, heads: int, ratio: int, resolution: int, window: int, shift: int) -> None:
        super().__init__()
        self.resolution, self.window, self.shift = resolution, window, shift
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, ratio)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_index", _relative_index(window), persistent=False)
        self.register_buffer("mask", _shift_mask(resolution, window, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map [N, H, W, C] after windowed attention and MLP."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        side, window, width = self.resolution, self.window, x.shape[3]
        per_side, tokens = side // window, window * window
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.reshape(-1, per_side, window, per_side, window, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, tokens, width)
        bias = self.relative_bias[self.relative_index.reshape(-1)].reshape(tokens, tokens, -1).permute(2, 0, 1)
        x = self.attn(x, bias, self.mask)
        x = x.reshape(-1, per_side, per_side, window, window, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, width)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


class PatchMerging(nn.Module):
    """Each 2×2 square of tokens becomes one token of twice the width: [N, H, W, C] → [N, H/2, W/2, 2C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=NORM_EPSILON)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge the feature map x [N, H, W, C], H and W even."""
        side, width = x.shape[1], x.shape[3]
        x = x.reshape(-1, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(-1, side // 2, side // 2, 4 * width)))


class SwinTransformer(nn.Module):
    """A two-stage Swin: 4×4 windows on an 8×8 grid (every second block shifted), merging, then one 4×4 window.

    Images are padded to 32×32 by the patch embedding, as Swin pads what its patches and windows do not divide.
    """

    def __init__(
        self, *, patch: int = 4, width: int = 64, depths: tuple[int, int] = (2, 2), heads: int = 2, ratio: int = 4
    ) -> None:
        super().__init__()
        window, padding = 4, 2
        side = (IMAGE_SIZE + 2 * padding) // patch
        self.patch_embed = nn.Conv2d(1, width, patch, stride=patch, padding=padding)
        self.patch_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.stage1 = nn.Sequential(
            *(SwinBlock(width, heads, ratio, side, window, (i % 2) * (window // 2)) for i in range(depths[0]))
        )
        self.merging = PatchMerging(width)
        # One window covers the whole 4×4 grid: there is nothing to shift.
        self.stage2 = nn.Sequential(
            *(SwinBlock(2 * width, 2 * heads, ratio, side // 2, window, 0) for _ in range(depths[1]))
        )
        self.norm = nn.LayerNorm(2 * width, eps=NORM_EPSILON)
        self.head = nn.Linear(2 * width, CLASS_COUNT)
        _initialise(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # A standard deviation of 0.02 is meant for widths of 768; at 64 it starts slowly.
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 10]."""
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))
        x = self.stage2(self.merging(self.stage1(x)))
        return self.head(self.norm(x).mean(dim=(1, 2)))


def build(name: str) -> nn.Module:
    """Return the untrained zoo model ``name`` (vit, deit or swin), initialised from torch's global seed."""
    if name == "vit":
        return VisionTransformer(patch=7, width=128, depth=4, heads=4)
    if name == "deit":
        return VisionTransformer(patch=7, width=128, depth=4, heads=4, distilled=True)
    if name == "swin":
        return SwinTransformer()
    raise ValueError(f"unknown zoo model {name!r}; known: vit, deit, swin")


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in {"special_tokens", "position", "relative_bias"}:
            nn.init.trunc_normal_(parameter, std=0.02)


def _relative_index(window: int) -> Tensor:
    """Row of the bias table for each pair of window positions, int64 [T, T]."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    positions = torch.stack([rows.reshape(-1), columns.reshape(-1)])
    offsets = positions[:, :, None] - positions[:, None, :] + window - 1
    return offsets[0] * (2 * window - 1) + offsets[1]


def _shift_mask(resolution: int, window: int, shift: int) -> Tensor:
    """0 for pairs that were neighbours before the roll, MASK_VALUE for the rest: float32 [windows, T, T]."""
    coordinate = torch.arange(resolution)
    band = (coordinate >= resolution - window).long() + (coordinate >= resolution - shift).long()
    region = 3 * band[:, None] + band[None, :]
    per_side = resolution // window
    region = region.reshape(per_side, window, per_side, window).permute(0, 2, 1, 3).reshape(-1, window * window)
    return (region[:, None, :] != region[:, :, None]).float() * MASK_VALUE
