"""Models of other code bases than transformers, captured with `example_inputs`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ligerfx

WIDTH, HEADS, KV_HEADS, HEAD, VOCABULARY, LAYERS = 64, 4, 2, 16, 96, 2


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5) * self.scale


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD, bias=False)
        self.out = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=-1)
        q = rotate(q.view(B, T, HEADS, HEAD).transpose(1, 2), cos, sin)
        k = rotate(k.view(B, T, KV_HEADS, HEAD).transpose(1, 2), cos, sin)
        v = v.view(B, T, KV_HEADS, HEAD).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = Norm(WIDTH), Attention(), Norm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.down = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class TinyLlama(nn.Module):
    """A language model in one file of plain PyTorch, in the manner of nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        angles = torch.outer(torch.arange(64.0), 10000 ** -(torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.shape[1]
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x, self.cos[None, None, :T], self.sin[None, None, :T])
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def assert_same(model: nn.Module, optimised: nn.Module, *call: Tensor) -> None:
    """Loss, logits and every gradient; `call` is of a model that gives (logits, loss)."""
    results = []
    for candidate in (model, optimised):
        model.zero_grad()
        logits, loss = candidate(*call)
        loss.backward()
        results.append((loss.detach(), logits + 0, *(p.grad for p in model.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def tokens(batch: int, seq: int) -> tuple[Tensor, Tensor]:
    idx = torch.randint(VOCABULARY, (batch, seq))
    targets = torch.where(torch.rand(idx.shape) < 0.2, -1, idx.roll(-1, 1))
    targets[0, 0] = idx[0, -1]
    return idx, targets


def test_one_file_of_plain_pytorch(references):
    model = TinyLlama()
    optimised = ligerfx.optimize(model, tokens(2, 9))
    assert not optimised.report.opaque
    found = {"rms_norm": 2 * LAYERS + 1, "glu": LAYERS, "rope": LAYERS, "linear_cross_entropy": 1}
    assert optimised.report.idioms == found
    for batch, seq in ((2, 9), (3, 14), (1, 1)):
        assert_same(model, optimised, *tokens(batch, seq))


class WithLoss(nn.Module):
    """A model that gives logits, and their loss as its training loop computes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(idx)
        return logits, F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def litgpt_model() -> nn.Module:
    litgpt = pytest.importorskip("litgpt")
    config = litgpt.Config.from_name(
        "Llama-3.2-1B", n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_query_groups=KV_HEADS, head_size=HEAD,
        intermediate_size=96, padded_vocab_size=VOCABULARY, block_size=64,
    )  # fmt: skip
    return litgpt.GPT(config)


def torchtune_model() -> nn.Module:
    pytest.importorskip("torchtune", exc_type=ImportError)  # it is bound to versions of torchao
    from torchtune.models.llama3_2 import llama3_2

    return llama3_2(
        vocab_size=VOCABULARY, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, embed_dim=WIDTH,
        max_seq_len=64, intermediate_dim=96,
    )  # fmt: skip


@pytest.mark.parametrize("make", [litgpt_model, torchtune_model])
def test_builders(make, references):
    """Of libraries that are tested where they happen to be installed."""
    model = WithLoss(make())
    optimised = ligerfx.optimize(model, tokens(2, 9))
    for batch, seq in ((2, 9), (3, 14)):
        assert_same(model, optimised, *tokens(batch, seq))
    found = optimised.report.idioms
    assert not optimised.report.opaque and found["rms_norm"] == 2 * LAYERS + 1 and found["glu"] == LAYERS
    assert found["rope"] and found["cross_entropy"] == 1  # q and k may be rotated together or one after the other
