"""What the tests of training libraries share: a tokenizer and texts made in code, kernel calls counted."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import importlib
from collections import Counter

import pytest
import torch

import ligerfx.kernels

VOCAB = 256


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word: "w4" to "w255"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCAB)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text():
    """A function of (length, seed): few different words, so that a tiny model soon gets some of them right."""

    def words(length, seed):
        generator = torch.Generator().manual_seed(seed)
        return " ".join(f"w{int(i)}" for i in torch.randint(4, 10, (length,), generator=generator))

    return words


@pytest.fixture(scope="module")
def plain_kernels():
    """On the CPU plain PyTorch runs in place of kernels. Gives how often each was called, by the file that it is in."""
    counts = Counter()
    names = {"_runtime", *ligerfx.kernels._MODULE_OF.values()}
    modules = {name: importlib.import_module(f"ligerfx.kernels.{name}") for name in names}  # before any is changed
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, module in modules.items():
            choose = getattr(module, "use_triton", None)
            if choose is not None:

                def counting(*tensors, name=name, choose=choose, **options):
                    counts[name] += 1
                    return torch.cuda.is_available() and choose(*tensors, **options)

                monkeypatch.setattr(module, "use_triton", counting)
        yield counts


@pytest.fixture
def calls(plain_kernels):
    """How often each kernel was called in this test."""
    plain_kernels.clear()
    return plain_kernels


@pytest.fixture
def materialized(monkeypatch):
    """Counts under "logits" the deferred logits that were computed."""
    counts = Counter()
    compute = ligerfx.DeferredTensor.materialize

    def counting(self):
        counts["logits"] += self._value is None and bool(self._needs)  # casts and views of others need nothing
        return compute(self)

    monkeypatch.setattr(ligerfx.DeferredTensor, "materialize", counting)
    return counts
