"""What distinguishes our step from the published one, thing by thing, and how each is switched off for a measurement;
and the options that a run may switch on.

Every provider is a process of its own, so that what is switched off there stays off.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from atomas.benchmarks.step.plain import PaddedBackbone, TwoPassEncoder, loop_adamw
from atomas.benchmarks.step.presets import Preset
from atomas.config import Config
from atomas.model.atomas import AtomasModel
from atomas.training import allocator
from atomas_kernels import registry

PLAIN = "atomas.benchmarks.step.plain"


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One thing that our step does otherwise."""

    on: str
    """What it is, for people"""
    off: str
    """What is in its place when it is off"""
    operators: tuple[tuple[str, str], ...] = ()
    """Operators, and the `module:function` in their place; an empty one stands for the reference backend"""
    model: Callable[[AtomasModel, Preset], None] | None = None
    """Changes the model when it is off"""
    optimizer: Callable[[Any], None] | None = None
    """Changes the optimizer when it is off"""
    process: Callable[[], None] | None = None
    """Changes the process when it is off"""


def _pad_to_full_length(model: AtomasModel, preset: Preset) -> None:
    model.encoder.backbone = PaddedBackbone.around(model.encoder.backbone, preset.length)


def _pad_to_longest(model: AtomasModel, preset: Preset) -> None:
    del preset
    if not isinstance(model.encoder.backbone, PaddedBackbone):
        model.encoder.backbone = PaddedBackbone.around(model.encoder.backbone, None)


def _two_passes(model: AtomasModel, preset: Preset) -> None:
    del preset
    old = model.encoder
    model.encoder = TwoPassEncoder(old.backbone, text_pooler=old.text_pooler, smiles_pooler=old.smiles_pooler)


def _return_freed_memory() -> None:
    allocator.keeps_freed_memory = False


SWITCHES = {
    "longest": Switch(
        on="backbone padded to the longest sequence of a batch",
        off="padded to 512",
        model=_pad_to_full_length,
    ),
    "packing": Switch(
        on="backbone packed, nothing padded", off="padded to the longest, eager", model=_pad_to_longest
    ),
    "attention": Switch(
        on="attention fused, neither logits nor dropout masks kept",
        off="torch's, length by length",
        operators=(("packed_attention", ""),),
    ),
    "dropout": Switch(
        on="dropout drawn again in the backward pass",
        off="dropout with a mask",
        operators=(("dropout", ""),),
    ),
    "allocator": Switch(
        on="freed memory kept for the next tensors",
        off="returned to the kernel",
        process=_return_freed_memory,
    ),
    "one_pass": Switch(on="both modalities in one pass", off="one pass each", model=_two_passes),
    "lm_chunks": Switch(
        on="LM loss in chunks, its gradient with it",
        off="all logits at once",
        operators=(("lm_cross_entropy", f"{PLAIN}:lm_cross_entropy"),),
    ),
    "interaction": Switch(
        on="token interaction fused",
        off="similarities materialised",
        operators=(("token_interaction", f"{PLAIN}:token_interaction"),),
    ),
    "clustering": Switch(
        on="clustering native", off="sequence by sequence", operators=(("dpc_knn", ""), ("cluster_merge", ""))
    ),
    "contrastive": Switch(
        on="queue read in place, contrast fused",
        off="queue copied, logits held",
        operators=(("contrastive_cross_entropy", ""),),
    ),
    "momentum": Switch(
        on="momentum update fused",
        off="tensor by tensor",
        operators=(("momentum_update", f"{PLAIN}:momentum_update"),),
    ),
    "adamw": Switch(on="AdamW fused", off="tensor by tensor", optimizer=loop_adamw),
}
"""In the order in which they lead from the published form to ours. Before the first of them the losses are ours: masks
carried through, clusters by real lengths."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a run may be told to do, and ours does not by itself."""

    on: str
    """What it is, for people"""
    config: Callable[[Config], Config]
    """Switches it on"""


def _compiled(config: Config) -> Config:
    return replace(config, training=replace(config.training, compile=True))


def _recomputed(config: Config) -> Config:
    return replace(config, model=replace(config.model, activation_checkpointing=True))


def _half(config: Config) -> Config:
    return replace(config, training=replace(config.training, precision="bf16"))


OPTIONS = {
    "compile": Option(on="blocks through torch.compile", config=_compiled),
    "checkpointing": Option(on="activations of a block computed again", config=_recomputed),
    "bf16": Option(on="weights and products in bfloat16, fp32 masters", config=_half),
}
"""Beside ours, each by itself."""

OURS, PUBLISHED = "ours", "published"
HEADS = "path:losses"
"""The first step from the published form: everything of SWITCHES still off."""


def switched_off(provider: str) -> tuple[str, ...]:
    """The switches that are off in a provider of ours: `path:NAME` is where a path stands."""
    names = list(SWITCHES)
    if provider == OURS or provider.startswith("with:"):
        return ()
    if provider == HEADS:
        return tuple(names)
    kind, _, name = provider.partition(":")
    return (name,) if kind == "without" else tuple(names[names.index(name) + 1 :])


def path_providers() -> list[str]:
    """From the published form to ours, each with one more switch on."""
    return [PUBLISHED, HEADS, *(f"path:{name}" for name in list(SWITCHES)[:-1]), OURS]


def ablation_providers() -> list[str]:
    """Ours with one switch off. Without padding to the longest there is no packing either: that is on the path."""
    return [f"without:{name}" for name in SWITCHES if name != "longest"]


def option_providers(config: Config) -> list[str]:
    """Ours with one option; those that `config` has already are ours."""
    return [f"with:{name}" for name, option in OPTIONS.items() if option.config(config) != config]


def configured(provider: str, config: Config) -> Config:
    """The configuration that a provider runs with."""
    kind, _, name = provider.partition(":")
    return OPTIONS[name].config(config) if kind == "with" else config


def description(provider: str) -> str | None:
    """What distinguishes a provider: what stands for what is off, what an option does, what a path has gained last."""
    kind, _, name = provider.partition(":")
    if kind == "with":
        return OPTIONS[name].on
    if kind == "without":
        return SWITCHES[name].off
    if provider == HEADS:
        return "losses with every mask, clusters by real lengths"
    if provider == OURS:
        name = list(SWITCHES)[-1]
    return SWITCHES[name].on if name else None


def change_process(off: tuple[str, ...]) -> None:
    """Put what stands for switched-off operators into the registry of this process, and what else is off, for good."""
    for name in off:
        for operator, target in SWITCHES[name].operators:
            known = registry._IMPLEMENTATIONS[operator]
            reference = tuple(entry for entry in known if entry.backend == "reference")
            plain = registry.Implementation(backend="reference", target=target)
            registry._IMPLEMENTATIONS[operator] = (plain,) if target else reference
        if change := SWITCHES[name].process:
            change()
