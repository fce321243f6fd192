"""Bytes of one GPU by component, for every ZeRO stage, and the moment at which each is held.

Activations are freed while the gradients come, so they and the update are largest at different moments, and the peak
is `always + max(graph + max(forward, backward), update)`. Formulas follow the tensors that the code holds; on the CPU
they are checked against the bytes that torch allocates. Symbols: D width, I heads x head width, F feed-forward width,
H heads, V vocabulary, P parameters, e bytes of an activation of the backbone (heads are float32 throughout), T tokens,
n tokens and k clusters of a sequence, b pairs of this rank of B in the batch, W ranks.
"""

from dataclasses import dataclass
from typing import Any, Literal

from atomas.config import REDUCE_BUCKET
from atomas.model.flops import BackboneSizes
from atomas.planning.offload import SUB_GROUP, Swapped
from atomas.planning.sizes import matrix_sizes
from atomas.planning.workload import Level, Workload

Device = Literal["cpu", "cuda"]
Moment = Literal["always", "graph", "forward", "backward", "update"]
"""`graph` from the forward pass through the backward pass, `forward` and `backward` only in one of them, `update` after
the backward pass until the optimizer has stepped."""
Place = Literal["device", "host", "nvme"]
ZERO_STAGES = (0, 1, 2, 3)

_WHERE: dict[Place, str] = {"device": "", "host": ", on the host", "nvme": ", on NVMe"}
_LOGITS_PER_CHUNK: dict[Device, int] = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Of the language model's loss: entries of the logits that are held at once."""
_MATCH_LIMIT: dict[Device, tuple[int, int]] = {"cpu": (2, 64 * 2**20), "cuda": (6, 2 * 2**30)}
"""Bytes of a match of the token interaction, and up to which size all of them are kept for the backward pass."""
_REUSE_DISTANCE = 1e9
_PREFETCHED, _LIVE = 5e7, 1e9
"""Elements that stage 3 fetches ahead, and the most that it keeps gathered at once."""


@dataclass(frozen=True)
class Component:
    """One line of the table."""

    name: str
    bytes: float
    moment: Moment
    place: Place = "device"
    """Offloaded, it takes no memory of the GPU; on NVMe none at all"""


@dataclass(frozen=True)
class MemoryPlan:
    """All components of one rank."""

    components: tuple[Component, ...]

    def total(self, moment: Moment, place: Place = "device") -> float:
        """Bytes held at a moment beside what is always held."""
        return sum(c.bytes for c in self.components if c.moment == moment and c.place == place)

    @property
    def peak(self) -> float:
        """Most bytes at once."""
        step = self.total("graph") + max(self.total("forward"), self.total("backward"))
        return self.total("always") + max(step, self.total("update"))

    def lines(self) -> list[str]:
        """The components, largest first, for people."""
        return [
            f"  {c.name:30}{c.bytes / 2**20:12,.1f} MiB  {c.moment}{_WHERE[c.place]}"
            for c in sorted(self.components, key=lambda component: -component.bytes)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "components": {
                c.name: {"bytes": round(c.bytes), "held": c.moment, "place": c.place} for c in self.components
            },
            "peak_bytes": round(self.peak),
        }


def plan_memory(work: Workload, stage: int, device: Device = "cuda") -> MemoryPlan:
    """Memory of one rank under a ZeRO stage."""
    components = [
        *_weights(work, stage, device),
        *_momentum(work, stage, device),
        *_activations(work, device),
    ]
    components.append(_checkpoint_copies(work, stage, device))
    return MemoryPlan(tuple(component for component in components if component.bytes))


def _weights(work: Workload, stage: int, device: Device) -> list[Component]:
    """Parameters, gradients, optimizer, and DeepSpeed's buffers.

    Stages 1 to 3 step a flat float32 copy, also where the weights are float32 themselves. Under stages 1 and 2 the
    gradients lie in buckets until they are reduced.
    """
    total, width = work.parameters.total, work.weight_bytes
    share = 1 / work.ranks
    sharded = share if stage else 1
    has_masters = stage > 0 or width == 2
    offload = work.config.deepspeed.offload
    offloaded = is_offloaded(work, stage)
    host: Place = "host" if offloaded and device == "cuda" else "device"
    swapped = swapped_by(work) if offload == "nvme" and stage == 3 else Swapped.nothing()
    accumulates = work.config.training.gradient_accumulation_steps > 1 or work.micro_pairs < work.pairs
    bucket = _bucket_elements(work, total, device) if stage else 0
    # AdamW is fused, and makes nothing on the way, unless its states are on the host
    step = 2 * 4 * (swapped.largest_sub_group or total * sharded) if offloaded else 0
    # with offload stage 3 keeps gradients on the host; stages 1 and 2 have none but in buckets and in float32
    keeps, copies = offloaded and stage == 3, offloaded and stage < 3
    # in 16 bits the gradient of a sub-group is made float32 in turn
    in_turn = swapped.largest_sub_group * (width != 4)
    fp32_gradients = total * sharded - swapped.states + in_turn
    components = [
        Component(
            "parameters",
            width * (total * (share if stage == 3 else 1) - swapped.parameters),
            "always",
            host if stage == 3 else "device",
        ),
        Component("fp32 masters", 4 * (total * sharded - swapped.states) * has_masters, "always", host),
        Component("optimizer states", 8 * (total * sharded - swapped.states), "always", host),
        Component("swap buffers", swapped.buffers(width), "always", host),
        Component("parameters, swapped", width * swapped.parameters, "always", "nvme"),
        Component("masters and states, swapped", 12 * swapped.states, "always", "nvme"),
        Component(
            "gradients",
            width * total * (share if stage >= 2 else 1) * (accumulates or not copies),
            "always" if accumulates or keeps else "update",
            host if keeps else "device",
        ),
        Component(
            "fp32 gradients", 4 * fp32_gradients * has_masters, "always" if offloaded else "update", host
        ),
        Component(
            "buffers of the offload", width * (total * share + _largest(work)) * copies, "always", host
        ),
        Component("optimizer step", step, "update", host),
        # a bucket is taken when the backward pass begins, and given back when it ends
        Component("gradient buckets", width * bucket, "backward"),
    ]
    if stage == 0 and work.ranks > 1:
        components.append(Component("flattened gradients", width * total, "update"))
    if stage == 3:
        kept = stage_3_reuse(work) * total
        prefetched = 0 if offload == "nvme" else _PREFETCHED
        gathered = min(total, _LIVE, kept + prefetched + _largest(work))
        components.append(Component("gathered parameters", width * gathered, "graph"))
    if work.config.training.precision == "bf16_autocast":
        components.append(Component("bf16 copies of weights", 2 * total, "graph"))
    return components


def is_offloaded(work: Workload, stage: int) -> bool:
    """Whether the optimizer runs on the host under a stage."""
    offload = work.config.deepspeed.offload
    return stage == 3 if offload == "nvme" else stage > 0 and offload == "cpu"


def swapped_by(work: Workload) -> Swapped:
    """What one rank has in files with `deepspeed.offload: nvme`."""
    matrices = matrix_sizes(work.config, work.t5)
    others = work.parameters.total - sum(matrices)
    extra = work.config.deepspeed.extra.get("zero_optimization", {})
    limit = int(extra.get("sub_group_size", SUB_GROUP))
    return Swapped.of([matrices, [others]], work.ranks, work.weight_bytes, limit)


def stage_3_reuse(work: Workload) -> float:
    """Share of the parameters that stage 3 keeps gathered from the forward to the backward pass.

    DeepSpeed does not release what is read again within `stage3_max_reuse_distance` elements; for the first layer
    that distance is twice the model.
    """
    zero = work.config.deepspeed.extra.get("zero_optimization", {})
    default = 0 if work.config.deepspeed.offload == "nvme" else _REUSE_DISTANCE
    distance = float(zero.get("stage3_max_reuse_distance", default))
    return min(1.0, distance / (2 * work.parameters.total))


def _bucket_elements(work: Workload, total: float, device: Device) -> float:
    """Two buckets where communication is overlapped, which on the CPU it is not."""
    zero = work.config.deepspeed.extra.get("zero_optimization", {})
    size = float(zero.get("reduce_bucket_size", min(REDUCE_BUCKET, total)))
    return size if device == "cpu" else 2 * size


def _largest(work: Workload) -> float:
    sizes = work.t5.backbone
    return float(max(sizes.vocabulary * sizes.width, sizes.width * sizes.feed_forward))


def _momentum(work: Workload, stage: int, device: Device) -> list[Component]:
    """What runs, whole or in pieces; float32 masters, sharded as the optimizer is and where it is; the queue.

    In float32 the masters are a part of what runs, where that is in the same place.
    """
    if not work.has_momentum:
        return []
    size, share = work.momentum_bytes, work.slow_share(stage)
    layerwise = stage == 3 and work.config.momentum.forward == "layerwise"
    host: Place = "host" if device == "cuda" and is_offloaded(work, stage) else "device"
    apart = size != 4 or host == "host"
    components = [
        Component("momentum weights", size * (share if layerwise else work.parameters.slow), "always"),
        Component("momentum masters", 4 * share * apart, "always", host),
    ]
    pair = 2 * (4 * work.width + 8)
    components.append(Component("queue", work.config.momentum.queue_size * pair, "always"))
    return components


def _checkpoint_copies(work: Workload, stage: int, device: Device) -> Component:
    """What a rank writes of a checkpoint while it trains on: copied to host memory, and kept for the next one."""
    config = work.config
    beside = config.checkpoint.asynchronous and (config.checkpoint.every or config.evaluation.every)
    # masters and both moments; momentum masters; at stage 0 all ranks hold the same, and each writes a part
    written = 12 * work.parameters.total / work.ranks
    if work.has_momentum:
        written += 4 * work.slow_share(stage) / (1 if stage else work.ranks)
    if (
        config.deepspeed.offload == "nvme"
    ):  # what lies there is written a sub-group at a time, while training waits
        beside = False
    return Component(
        "checkpoint copies", written if beside else 0, "always", "host" if device == "cuda" else "device"
    )


def _activations(work: Workload, device: Device) -> list[Component]:
    b, tokens = work.micro_pairs, work.tokens
    sizes = work.t5.backbone
    both = b * (tokens["text"] + tokens["smiles"])
    layer = _layer(work, device, both)
    encoder_again = _one_pass(work, both, layer + _layer_gradients(work, both))
    encoder = _stack_bytes(work, both, sizes.layers, layer, device)
    decoder = decoder_again = head = 0.0
    for source, target in work.written:
        written = b * tokens[target]
        layer = _layer(work, device, written) + _attention(work, device, written, b * tokens[source])
        decoder += _stack_bytes(work, written, sizes.decoder_layers, layer, device)
        gradients = _layer_gradients(work, written)
        decoder_again = max(decoder_again, _one_pass(work, written, layer + gradients))
        head += work.element_bytes * (written * sizes.width + sizes.vocabulary * sizes.width)
    others = [
        Component("decoder", decoder, "graph"),
        Component("gradients of the output layer", head, "graph"),
        *_alignment(work, device),
    ]
    if work.config.loss.global_weight:
        features = 4 * work.width * (8 * b + 4 * work.batch)
        mask = (work.batch + work.config.momentum.queue_size * work.has_momentum) * b
        others.append(Component("global features and masks", features + 2 * mask, "graph"))
    again = 0.0
    if work.config.model.activation_checkpointing:
        # when the encoder's layers are run again, all that came after the encoder is free
        free = MemoryPlan(tuple(others)).total("graph")
        again = max(decoder_again, encoder_again - free)
    return [
        Component("encoder", encoder, "graph"),
        *others,
        Component("one recomputed layer", again, "backward"),
        Component("logits", _logits(work, sizes, device), "forward"),
    ]


def _one_pass(work: Workload, tokens: float, layer: float) -> float:
    """Of what a layer keeps of all tokens, the part of one pass."""
    return layer * min(1.0, work.config.data.token_budget / tokens)


def _layer_gradients(work: Workload, tokens: float) -> float:
    """What the backward pass of one layer makes on the way: gradients of the widest states."""
    return 2 * work.element_bytes * tokens * work.t5.backbone.feed_forward


def _stack_bytes(work: Workload, tokens: float, layers: int, layer: float, device: Device) -> float:
    """Layers, the embedding's and the final dropout and norm, and the states that come out."""
    e, width = work.element_bytes, work.width
    masks = 2 * _mask_bytes(work, device) * tokens * width
    inputs = tokens * width * e
    kept = inputs if work.config.model.activation_checkpointing else layer
    return layers * kept + masks + _norm(work, device, tokens) - e * tokens * width + inputs


def _layer(work: Workload, device: Device, tokens: float) -> float:
    """Self-attention and feed-forward layer."""
    sizes, e, mask = work.t5.backbone, work.element_bytes, _mask_bytes(work, device)
    dropped = work.config.model.dropout_rate > 0
    # ReLU's output, and that after dropout; the gated form's GELU of transformers is made of products, each of which
    # keeps its factors: its input, four steps on the way, the gate, and what the output layer reads
    states = 7 * e + mask if sizes.gated else e + (mask + e if dropped else 0)
    feed_forward = tokens * (sizes.feed_forward * states + mask * sizes.width)
    return _attention(work, device, tokens, tokens) + _norm(work, device, tokens) + feed_forward


def _attention(work: Workload, device: Device, queries: float, keys: float) -> float:
    """Norm, projections, and what the attention itself keeps: its output and one number for every query and head.

    On the CPU (with the compiled kernels) it is computed in float32, and its output is what the next product reads
    where that is float32 too.
    """
    sizes, e, mask = work.t5.backbone, work.element_bytes, _mask_bytes(work, device)
    computed = 4 if device == "cpu" else e
    shared = device == "cpu" and e == 4
    states = sizes.inner * (computed * (queries + 2 * keys) + e * queries)
    inside = (0 if shared else computed * sizes.inner * queries) + 4 * work.t5.heads * queries
    return _norm(work, device, queries) + states + inside + mask * sizes.width * queries


def _norm(work: Workload, device: Device, tokens: float) -> float:
    """Input in float32, on the CPU also the normalised states, and the output that the projections read."""
    normalised = 4 if device == "cpu" else 0
    return tokens * (work.width * (4 + normalised + work.element_bytes) + 4)


def _mask_bytes(work: Workload, device: Device) -> int:
    """Of one element under dropout: a bool, but nothing where the backward pass draws it again."""
    return int(device == "cuda" and work.config.model.dropout_rate > 0)


def _logits(work: Workload, sizes: BackboneSizes, device: Device) -> float:
    """What the loss holds beside its gradients while it runs: a chunk of logits, and in half precision its copy."""
    if not work.written:
        return 0.0
    longest = max(work.micro_pairs * work.tokens[target] for _, target in work.written)
    rows = min(longest, max(1, _LOGITS_PER_CHUNK[device] // sizes.vocabulary))
    per_logit = 4 if work.element_bytes == 4 else 6
    accumulated = 0 if work.element_bytes == 4 else 4 * sizes.vocabulary * sizes.width
    return per_logit * rows * sizes.vocabulary + accumulated


def _alignment(work: Workload, device: Device) -> list[Component]:
    """Heads, this rank's tokens of every level, those of others, matches and scores."""
    b, levels = work.micro_pairs, work.levels
    if not levels["text"]:
        return []
    row, gradient = work.token_row_bytes, work.token_gradient_bytes
    cached = b < work.pairs
    ring = work.config.loss.exchange == "ring"
    own = others = arriving = returning = matches = 0.0
    for text, smiles in zip(levels["text"], levels["smiles"], strict=True):
        if not text.aligned:
            continue
        sent = (smiles if work.travelling == "smiles" else text).tokens
        if cached:
            own += (row + gradient) * work.pairs * (text.tokens + smiles.tokens)
        elif work.element_bytes != 4:  # in float32 the heads keep the same tensors
            own += row * b * (text.tokens + smiles.tokens)
        if work.ranks > 1 and (ring or cached):
            # the block in use and the one that arrives, and as many gradients; of the chunk in turn
            arriving = max(arriving, 2 * (row + gradient) * sent * (b if ring else b * work.ranks))
        elif work.ranks > 1:
            others += row * sent * work.batch
            # as the ranks' parts, and joined
            arriving = max(arriving, 2 * row * sent * work.batch)
            returning = max(returning, 2 * gradient * sent * work.batch)
        if not work.tiled:
            matches += _matches(work, device, text, smiles)
    place = work.config.training.feature_cache
    where: Place = "host" if cached and place == "host" and device == "cuda" else "device"
    count = sum(level.aligned for level in levels["text"])
    return [
        Component("heads", sum(_hierarchy(work, device, levels[m], b) for m in ("text", "smiles")), "graph"),
        Component("own token blocks", own * (place != "disk"), "graph", where),
        Component("token blocks of other ranks", others, "graph"),
        Component("arriving token blocks", arriving, "forward"),
        Component("gradients of token blocks", returning, "backward"),
        Component("matches", matches, "graph"),
        Component("scores", 4 * b * work.batch * (3 if ring or cached else count + 3), "graph"),
    ]


def _matches(work: Workload, device: Device, text: Level, smiles: Level) -> float:
    size, limit = _MATCH_LIMIT[device]
    needed = size * work.pairs * work.batch * (text.tokens + smiles.tokens)
    return needed if needed <= limit else 0.0


def _hierarchy(work: Workload, device: Device, levels: list[Level], pairs: int) -> float:
    """What the polymerisations and importance MLPs of one modality keep.

    Of every token below: inputs of convolution and key projection (e), of norm and of what follows it, keys and values
    (float32); of every cluster: merged tokens and queries (float32), inputs of query and output projection (e). The
    attention keeps one weight for every pair of cluster and token and head, on the CPU its output in their place.
    """
    e, width, heads = work.weight_bytes, work.width, work.config.model.polymerization_heads
    rounded = e != 4
    total = 0.0
    for level, above in zip(levels, [*levels[1:], None], strict=True):
        if above is not None:
            per_token = 4 * 4 + (3 if rounded else 2) * e
            if level is levels[0] and not rounded:
                per_token -= e  # the convolution reads the encoder's states, which are counted there
            per_cluster = 2 * 4 + 2 * e
            total += width * (level.tokens * per_token + above.tokens * per_cluster)
            if device == "cuda":
                total += 4 * heads * level.products
            else:
                total += 4 * (heads + width * rounded) * above.tokens
            total += 3 * width**2 * e / pairs
        if level.aligned:
            shared = above is not None and not rounded
            hidden = 2 * (4 + (e if rounded else 0))
            total += level.tokens * width * (hidden + (0 if shared else e))
    return pairs * total
