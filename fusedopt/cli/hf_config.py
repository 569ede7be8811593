"""Parameter shapes of a Hugging Face config.json, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fusedopt.cli import UsageError

Shapes = list[tuple[int, ...]]


class Table(tuple):
    """The shape (entries, width) of an embedding."""


class _Config:
    """Keys of a config, under any of several names."""

    def __init__(self, content: dict, path: str):
        self.content, self.path = content, path

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.content.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return int(value)
        if default is None:
            raise UsageError(f"{self.path}: the config has no {' or '.join(names)}")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name)
        return default if value is None else bool(value)

    def builds(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for name in self.content.get("architectures") or [])


def _linear(inputs: int, outputs: int, bias: bool) -> Shapes:
    return [(outputs, inputs)] + [(outputs,)] * bias


def _decoder(c: _Config, *, qkv_bias=False, head_norms=False, layer_norms=2, tied=False) -> Shapes:
    """Llama and its relatives: rotary positions, RMS norms, gated MLP, grouped-query attention, perhaps experts."""
    hidden, inner, vocab = c.number("hidden_size"), c.number("intermediate_size"), c.number("vocab_size")
    heads = c.number("num_attention_heads")
    groups = c.number("num_key_value_heads", default=heads)
    head = c.number("head_dim", default=hidden // heads)
    bias = c.flag("attention_bias", False)
    layer = _linear(hidden, heads * head, bias or qkv_bias)
    layer += 2 * _linear(hidden, groups * head, bias or qkv_bias)
    layer += _linear(heads * head, hidden, bias)
    layer += [(head,)] * 2 * head_norms + [(hidden,)] * layer_norms
    mlp_bias = c.flag("mlp_bias", False)
    mlp = 2 * _linear(hidden, inner, mlp_bias) + _linear(inner, hidden, mlp_bias)
    experts = c.number("num_local_experts", default=0)
    layer += [(experts, hidden)] + experts * mlp if experts else mlp
    head_matrix = [] if c.flag("tie_word_embeddings", tied) else [(vocab, hidden)]
    return [Table((vocab, hidden)), *c.number("num_hidden_layers") * layer, (hidden,), *head_matrix]


def _block(hidden: int, inner: int) -> Shapes:
    """A classic transformer layer: attention and MLP with biases, two layer norms."""
    attention = 3 * _linear(hidden, hidden, True) + _linear(hidden, hidden, True)
    return attention + _linear(hidden, inner, True) + _linear(inner, hidden, True) + [(hidden,)] * 4


def _fused_block(hidden: int, inner: int) -> Shapes:
    """The same with query, key and value in one matrix."""
    return _linear(hidden, 3 * hidden, True) + _block(hidden, inner)[6:]


def _gpt2(c: _Config) -> Shapes:
    hidden, vocab = c.number("n_embd", "hidden_size"), c.number("vocab_size")
    layers = c.number("n_layer", "num_hidden_layers")
    inner = c.number("n_inner", default=4 * hidden)
    positions = c.number("n_positions", "n_ctx", "max_position_embeddings")
    head = [] if c.flag("tie_word_embeddings", True) else [(vocab, hidden)]
    return [
        Table((vocab, hidden)),
        Table((positions, hidden)),
        *layers * _fused_block(hidden, inner),
        (hidden,),
        (hidden,),
        *head,
    ]


def _neox(c: _Config) -> Shapes:
    hidden, vocab = c.number("hidden_size"), c.number("vocab_size")
    block = _fused_block(hidden, c.number("intermediate_size"))
    head = [] if c.flag("tie_word_embeddings", False) else [(vocab, hidden)]
    return [Table((vocab, hidden)), *c.number("num_hidden_layers") * block, (hidden,), (hidden,), *head]


def _bert(c: _Config) -> Shapes:
    """The encoder with its pooler, or with the masked language model's head, whose matrix is the embedding."""
    hidden, vocab = c.number("hidden_size"), c.number("vocab_size")
    tables = [Table((n, hidden)) for n in (vocab, c.number("max_position_embeddings"), c.number("type_vocab_size"))]
    layers = c.number("num_hidden_layers") * _block(hidden, c.number("intermediate_size"))
    dense = _linear(hidden, hidden, True)
    head = [*dense, (hidden,), (hidden,), (vocab,)] if c.builds("ForMaskedLM") else dense
    return [*tables, (hidden,), (hidden,), *layers, *head]


FAMILIES: dict[str, Callable[[_Config], Shapes]] = {
    "llama": _decoder,
    "mistral": _decoder,
    "mixtral": _decoder,
    "phi3": _decoder,
    "qwen2": lambda c: _decoder(c, qkv_bias=True),
    "qwen3": lambda c: _decoder(c, head_norms=True),
    "gemma": lambda c: _decoder(c, tied=True),
    "gemma2": lambda c: _decoder(c, layer_norms=4, tied=True),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "bert": _bert,
    "roberta": _bert,
}


def read_config(path: str) -> tuple[str, Shapes]:
    """Name of the model type and the shape of every parameter. Raises UsageError where the file is not understood."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a model configuration: expected a JSON object")
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(
            f"{file}: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}. "
            "Use --model module:callable, or --params N"
        )
    return f"{kind} ({file})", FAMILIES[kind](_Config(content, str(file)))
