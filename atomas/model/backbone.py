"""The T5 backbone on ragged batches (method section 1).

Encoder and decoder run over the flat tokens of a batch, and only attention knows where a sequence ends: nothing
is padded, and cost follows the tokens. The layers are those of transformers, for its checkpoints and its
generation.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from atomas.config import ModelConfig
from atomas.data.batching import RaggedTokens, split_groups, token_passes
from atomas.distributed.collectives import all_gather_sizes
from atomas.errors import AtomasError
from atomas.model.layers import Dropout, RMSNorm, full_precision, product_dtype
from atomas.model.ragged import positions
from atomas.phases import phase
from atomas_kernels import distance_buckets, lm_cross_entropy, packed_attention

END_ID = 1
UNKNOWN_ID = 2
VOCABULARY_LAYERS = ("shared", "embed_tokens", "lm_head")

_LARGEST_HALF = torch.finfo(torch.float16).max - 1000
"""Bound of float16 states between layers, with room for a sum."""

_Flat = tuple[Tensor, Tensor]
"""Flat values [T, ...] of some sequences, and the lengths [B] of these."""


class Backbone(nn.Module):
    """One T5 encoder for both modalities, and its decoder where something is generated."""

    def __init__(self, t5: Any, *, token_budget: int, activation_checkpointing: bool = False) -> None:
        """Take over `t5`, a T5ForConditionalGeneration or T5EncoderModel.

        `token_budget` bounds the tokens of one pass of encoder or decoder, unless one sequence is longer.
        """
        super().__init__()
        if hasattr(t5, "lm_head"):
            t5.lm_head = LanguageModelHead.around(t5.lm_head)
        _replace_layers(t5)
        self.t5 = t5
        self.token_budget = token_budget
        self.activation_checkpointing = activation_checkpointing
        self._pieces = _EAGER
        self.in_step = False
        """Run equally many passes on every rank: ZeRO stage 3 gathers weights in each of them, collectively."""

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return int(self.t5.config.d_model)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run everything in a block but attention through `torch.compile`, at any number of tokens with one graph."""
        self._pieces = _compiled(backend)

    def encode(self, tokens: RaggedTokens) -> Tensor:
        """Encoder states [T, D] of B sequences, in the order of `tokens`."""
        passes = self._passes(tokens.lengths)
        states = [self._run(self.t5.encoder, part) for part in _parts(tokens.ids, tokens.lengths, passes)]
        return torch.cat(states)

    @property
    def start_id(self) -> int:
        """The decoder's first input, unless another one is asked for."""
        start = getattr(self.t5.config, "decoder_start_token_id", None)
        return int(self.t5.config.pad_token_id if start is None else start)

    def decode(
        self, states: Tensor, lengths: Tensor, targets: RaggedTokens, *, start_id: int | None = None
    ) -> Tensor:
        """Decoder outputs [T_target, D], teacher-forced: the one of a token has read the target before it.

        Args:
            states: [T, D] encoder states of B sequences.
            lengths: [B] int64, sum T.
            targets: B sequences to be written.
            start_id: first input of each, in place of T5's own.
        """
        passes = self._passes(lengths + targets.lengths)
        written = _parts(self._shift_right(targets, start_id), targets.lengths, passes)
        read = _parts(states, lengths, passes)
        hidden = [
            self._run(self.t5.decoder, target, source) for target, source in zip(written, read, strict=True)
        ]
        outputs = torch.cat(hidden)
        # T5 v1.0 shares the embedding with the output layer and scales before it; v1.1 does neither.
        return outputs * self.width**-0.5 if self.t5.config.scale_decoder_outputs else outputs

    def language_model_loss(
        self, states: Tensor, lengths: Tensor, targets: RaggedTokens, *, start_id: int | None = None
    ) -> Tensor:
        """Cross entropy of `targets` given encoder states, mean over target tokens (method section 4)."""
        with phase("decoder"):
            outputs = self.decode(states, lengths, targets, start_id=start_id)
        with phase("lm_loss"):
            loss: Tensor = self.t5.lm_head(outputs, targets.ids)
        return loss

    def _passes(self, lengths: Tensor) -> list[int]:
        """Number of consecutive sequences in each pass."""
        counts = token_passes(lengths.tolist(), self.token_budget)
        if self.in_step:
            most = max(all_gather_sizes(len(counts), lengths.device, "number of sequences"))
            rows = torch.arange(len(lengths)).split(counts)
            counts = [len(part) for part in split_groups(rows, min(most, len(lengths)))]
            # a rank with fewer sequences than another has passes makes the rest of them with nothing
            counts += [0] * (most - len(counts))
        return counts

    def _run(self, stack: Any, part: _Flat, read: _Flat | None = None) -> Tensor:
        """States [T, D] of the last layer of the encoder, or of the decoder, which reads the encoder's."""
        ids, lengths = part
        # By modules alone, because ZeRO stage 3 holds a weight together only while its own module runs.
        bias = _distance_bias(stack, ids.device)
        hidden = stack.dropout(stack.embed_tokens(ids))
        for block in stack.block:
            arguments = (self._pieces, block, (hidden, lengths), bias, read)
            if self.activation_checkpointing and self.training:
                hidden = checkpoint(_block, *arguments, use_reentrant=False)
            else:
                hidden = _block(*arguments)
        last: Tensor = stack.dropout(stack.final_layer_norm(hidden))
        return last

    def _shift_right(self, targets: RaggedTokens, start_id: int | None) -> Tensor:
        """[T] ids that the decoder reads: the one before each token."""
        first = positions(targets.lengths) == 0
        return targets.ids.roll(1).masked_fill(first, self.start_id if start_id is None else start_id)


def _replace_layers(t5: Any) -> None:
    """Put layers of ours, with the same weights and names, in place of T5's norms and dropouts."""
    for parent in list(t5.modules()):
        for name, child in parent.named_children():
            if isinstance(child, T5LayerNorm):
                setattr(parent, name, RMSNorm(child.weight, t5.config.layer_norm_epsilon))
            elif isinstance(child, nn.Dropout):
                setattr(parent, name, Dropout(child.p))


def _parts(flat: Tensor, lengths: Tensor, passes: list[int]) -> list[_Flat]:
    """The tokens of each pass, and their lengths on the CPU: every layer needs them there."""
    parts = lengths.cpu().split(passes)
    return list(zip(flat.split([int(part.sum()) for part in parts]), parts, strict=True))


def _distance_bias(stack: Any, device: torch.device) -> Tensor:
    """[H, distances], shared by all layers."""
    buckets = distance_buckets(
        buckets=stack.config.relative_attention_num_buckets,
        max_distance=stack.config.relative_attention_max_distance,
        bidirectional=not stack.is_decoder,
        device=device,
    )
    bias: Tensor = stack.block[0].layer[0].SelfAttention.relative_attention_bias(buckets).T
    return bias


def _block(pieces: "_Pieces", block: Any, part: _Flat, bias: Tensor, read: _Flat | None) -> Tensor:
    """One layer, [T, D] -> [T, D]: tokens read their own sequence, in the decoder also the encoder's."""
    hidden, lengths = part
    layer = block.layer[0]
    own = layer.SelfAttention
    query, key, value = pieces.project(layer.layer_norm, (own.q, own.k, own.v), hidden)
    attended = _attend(own, (query, lengths), (key, lengths), value, bias, causal=block.is_decoder)
    hidden = pieces.add(own.o, layer.dropout, hidden, attended)
    if read is not None:
        states, sizes = read
        layer = block.layer[1]
        other = layer.EncDecAttention
        (query,) = pieces.project(layer.layer_norm, (other.q,), hidden)
        key, value = pieces.project(None, (other.k, other.v), states)
        attended = _attend(other, (query, lengths), (key, sizes), value)
        hidden = pieces.add(other.o, layer.dropout, hidden, attended)
    return pieces.feed_forward(block.layer[-1], hidden)


def _attend(
    attention: Any,
    query: _Flat,
    key: _Flat,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """[T_q, H * d]: where a sequence ends matters here only, so that all else compiles without lengths."""
    queries, keys, values = (x.unflatten(1, (attention.n_heads, -1)) for x in (query[0], key[0], value))
    attended = packed_attention(
        queries,
        keys,
        values,
        query[1],
        key[1],
        distance_bias=bias,
        causal=causal,
        dropout=attention.dropout if attention.training else 0.0,
    )
    return attended.flatten(1)


class _Pieces(NamedTuple):
    """What a block does before, between and after its attentions."""

    project: Callable[[Any, tuple[nn.Module, ...], Tensor], tuple[Tensor, ...]]
    add: Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]
    feed_forward: Callable[[nn.Module, Tensor], Tensor]


def _project(norm: nn.Module | None, layers: tuple[nn.Module, ...], hidden: Tensor) -> tuple[Tensor, ...]:
    """[T, D] -> [T, H * d] of every layer."""
    x = hidden if norm is None else norm(hidden)
    return tuple(layer(x) for layer in layers)


def _add(output: nn.Module, dropout: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """[T, D] and [T, H * d] -> [T, D]."""
    return _finite(hidden + dropout(output(attended)))


def _feed_forward(layer: nn.Module, hidden: Tensor) -> Tensor:
    """[T, D] -> [T, D]."""
    return _finite(layer(hidden))


_EAGER = _Pieces(_project, _add, _feed_forward)


@lru_cache
def _compiled(backend: str) -> _Pieces:
    """One graph for all layers of a kind: weights are inputs, and the number of tokens is a symbol."""

    def compiled(piece: Any) -> Any:
        return torch.compile(piece, fullgraph=True, dynamic=True, backend=backend)

    return _Pieces(*map(compiled, _EAGER))


def _finite(hidden: Tensor) -> Tensor:
    """Large T5 models leave the range of float16."""
    return hidden.clamp(-_LARGEST_HALF, _LARGEST_HALF) if hidden.dtype == torch.float16 else hidden


class LanguageModelHead(nn.Linear):
    """T5's output layer that can also close with the loss: its weight is only read inside its forward.

    ZeRO stage 3 holds a weight together only while its own module runs.
    """

    @classmethod
    def around(cls, linear: nn.Linear) -> "LanguageModelHead":
        """The same layer, sharing the (possibly tied) weight."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [..., V]; with `labels` [T] the mean cross entropy instead, without holding the logits."""
        if labels is None:
            return super().forward(input)
        dtype = product_dtype(self.weight)
        with full_precision(input.device):
            return lm_cross_entropy(input.to(dtype), self.weight.to(dtype), labels)


def build_t5(model: ModelConfig, vocab_size: int, *, decoder: bool) -> Any:
    """T5 from a checkpoint or from scratch, without its decoder where nothing is generated.

    Raises AtomasError if `model.pretrained` holds no T5 checkpoint.
    """
    if model.pretrained:
        return _load_t5(model, vocab_size, decoder=decoder)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=model.d_model,
        d_kv=model.d_kv,
        d_ff=model.d_ff,
        num_layers=model.num_layers,
        num_decoder_layers=model.num_decoder_layers,
        num_heads=model.num_heads,
        feed_forward_proj=model.feed_forward,
        dropout_rate=model.dropout_rate,
        tie_word_embeddings=model.tie_word_embeddings,
        decoder_start_token_id=0,
    )
    return t5_from_config(config, decoder=decoder, tied=model.tie_word_embeddings)


def t5_from_config(config: Any, *, decoder: bool, tied: bool) -> Any:
    """T5 with random weights from a `T5Config`.

    `tied` says whether embedding and output layer share their weight: transformers 5 always builds T5 tied,
    and takes `tie_word_embeddings` to say whether the decoder's outputs are scaled.
    """
    config._attn_implementation = "sdpa"
    if not decoder:
        return T5EncoderModel(config)
    t5 = T5ForConditionalGeneration(config)
    if not tied:
        # The input of an output layer of its own is not scaled: this spread starts logits at unit variance.
        t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.shared.weight) * config.d_model**-0.5)
        t5._tied_weights_keys = {k: v for k, v in t5._tied_weights_keys.items() if k != "lm_head.weight"}
        t5.all_tied_weights_keys.pop("lm_head.weight", None)
    return t5


def _load_t5(model: ModelConfig, vocab_size: int, *, decoder: bool) -> Any:
    kind = T5ForConditionalGeneration if decoder else T5EncoderModel
    where = f"model.pretrained = {model.pretrained!r}"
    try:
        config = AutoConfig.from_pretrained(model.pretrained)
        if config.model_type != "t5":
            raise AtomasError(f"{where} is a {config.model_type!r} model; give a T5 checkpoint")
        t5 = kind.from_pretrained(
            model.pretrained, dropout_rate=model.dropout_rate, attn_implementation="sdpa", dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AtomasError(
            f"{where}: no T5 checkpoint there ({reason}); give a folder or a hub name"
        ) from error
    if vocab_size > t5.config.vocab_size:
        _grow_vocabulary(t5, vocab_size)
    return t5


@torch.no_grad()
def _grow_vocabulary(t5: Any, vocab_size: int) -> None:
    """Append rows to the embedding and the output layer, as copies of the row of <unk>.

    By hand, because transformers 5 ties an output layer of its own to the embedding when it resizes.
    """
    layers = [layer for name, layer in t5.named_modules() if name.split(".")[-1] in VOCABULARY_LAYERS]
    grown: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        old = layer.weight
        if old not in grown:
            # What the checkpoint has never seen starts as what it would have been read as.
            new_rows = old[UNKNOWN_ID].expand(vocab_size - len(old), -1)
            grown[old] = nn.Parameter(torch.cat([old, new_rows]))
        layer.weight = grown[old]
        setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", vocab_size)
    for config in (t5.config, t5.encoder.config, *([t5.decoder.config] if hasattr(t5, "decoder") else [])):
        config.vocab_size = vocab_size
