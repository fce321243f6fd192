"""The T5 backbone on ragged batches (method section 1).

Rows of like length are padded and run together, then gathered back: no caller ever sees padding, and cost
follows the real tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, T5Config, T5EncoderModel, T5ForConditionalGeneration

from atomas.config import ModelConfig
from atomas.data.batching import RaggedTokens, length_buckets, split_groups
from atomas.distributed.gather import gather_sizes
from atomas.errors import AtomasError
from atomas.model.layers import full_precision
from atomas.model.ragged import PaddedRows, flatten
from atomas_kernels import lm_cross_entropy

UNKNOWN_ID = 2
VOCABULARY_LAYERS = ("shared", "embed_tokens", "lm_head")


class Backbone(nn.Module):
    """One T5 encoder for both modalities, and its decoder where something is generated."""

    def __init__(self, t5: Any, *, token_budget: int, activation_checkpointing: bool = False) -> None:
        """Take over `t5`, a T5ForConditionalGeneration or T5EncoderModel.

        `token_budget` bounds the padded tokens of one pass of encoder or decoder.
        """
        super().__init__()
        if hasattr(t5, "lm_head"):
            t5.lm_head = LanguageModelHead.around(t5.lm_head)
        if activation_checkpointing:
            # transformers renames it in the course of version 5
            enable = getattr(t5, "activation_checkpointing_enable", t5.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.t5 = t5
        self.token_budget = token_budget
        self.in_step = False
        """Run equally many passes on every rank: ZeRO stage 3 gathers weights in each of them, collectively."""

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return int(self.t5.config.d_model)

    def encode(self, tokens: RaggedTokens) -> Tensor:
        """Encoder states [T, D] of B sequences, in the order of `tokens`."""
        blocks = [PaddedRows.of(tokens.lengths, rows) for rows in self._passes(tokens.lengths)]
        states = [
            self.t5.encoder(input_ids=block.pad(tokens.ids), attention_mask=block.mask).last_hidden_state
            for block in blocks
        ]
        return flatten(blocks, states)

    def decode(self, states: Tensor, lengths: Tensor, targets: RaggedTokens) -> Tensor:
        """Decoder outputs [T_target, D], teacher-forced: the one of a token has read the target before it.

        Args:
            states: [T, D] encoder states of B sequences.
            lengths: [B] int64, sum T.
            targets: B sequences to be written.
        """
        pairs = self._passes(lengths + targets.lengths)
        sources = [PaddedRows.of(lengths, rows) for rows in pairs]
        written = [PaddedRows.of(targets.lengths, rows) for rows in pairs]
        hidden = [
            self.t5.decoder(
                # Padding follows the tokens of a row, so causality alone keeps it from being read.
                input_ids=self._shift_right(write.pad(targets.ids)),
                encoder_hidden_states=source.pad(states),
                encoder_attention_mask=source.mask,
                use_cache=False,
            ).last_hidden_state
            for source, write in zip(sources, written, strict=True)
        ]
        outputs = flatten(written, hidden)
        # T5 v1.0 shares the embedding with the output layer and scales before it; v1.1 does neither.
        return outputs * self.width**-0.5 if self.t5.config.scale_decoder_outputs else outputs

    def language_model_loss(self, states: Tensor, lengths: Tensor, targets: RaggedTokens) -> Tensor:
        """Cross entropy of `targets` given encoder states, mean over target tokens (method section 4)."""
        loss: Tensor = self.t5.lm_head(self.decode(states, lengths, targets), targets.ids)
        return loss

    def _passes(self, lengths: Tensor) -> list[Tensor]:
        """Rows of each pass, of like length."""
        groups = length_buckets(lengths, self.token_budget)
        if self.in_step:
            groups = split_groups(groups, max(gather_sizes(len(groups), lengths.device)))
        return groups

    def _shift_right(self, ids: Tensor) -> Tensor:
        config = self.t5.config
        start = getattr(config, "decoder_start_token_id", None)
        shifted = ids.roll(1, dims=1)
        shifted[:, 0] = config.pad_token_id if start is None else start
        return shifted


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
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
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
