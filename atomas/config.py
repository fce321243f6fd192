"""A whole run as frozen dataclasses: the one place where every key, its default and its meaning stand.

`Config` is read from strict YAML by `atomas.config_file` and changed by `--section.field value`. Nothing here
imports torch, so that a mistake is answered at once, before any process starts. Symbols are those of the method:
B pairs in the contrastive batch of all ranks, D model width, N tokens of one sequence.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from atomas.addresses import check_address
from atomas.errors import AtomasError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    """Folder of the run inside `output_dir`."""
    output_dir: str = "runs"
    """Parent folder of all runs."""
    seed: int = 0
    """Seed of initial weights, dropout and sample order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one; `cuda` fails where there is none."""
    threads: int = 0
    """CPU threads of one rank; 0 divides the visible cores by the ranks of this host."""
    kernels: Literal["auto", "reference", "native", "triton"] = "auto"
    """Backend of the fused operators; an explicit one that cannot run is an error."""
    collective_timeout_seconds: float = 1800.0
    """A collective, a pass, an optimizer step, a checkpoint or a wait for data that takes longer ends the run."""
    silence_timeout_seconds: float = 300.0
    """A rank that has said nothing for so long, once a second otherwise, counts as dead or stopped."""
    grace_seconds: float = 0.0
    """Time from a signal to the end of the run. Where the step in flight and the checkpoint after it take longer, the
    run ends without that checkpoint, with exit code 75 all the same, and continues the one before. 0: as long as it
    takes."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text and SMILES share one SentencePiece vocabulary (method section 1)."""

    source: str = "corpus"
    """A folder with a T5 `tokenizer.json` or `spiece.model`, a hub name, or `corpus` to train one on the corpus."""
    vocab_size: int = 2048
    """Pieces when trained on the corpus, bytes and printable ASCII included; a given tokenizer keeps its own size."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it becomes batches."""

    corpus: str | tuple[str, ...] | dict[str, float] = "corpus"
    """A folder that `atomas data build` or `atomas data demo` wrote, or its address: `https://...`, `s3://bucket/...`.
    Several are mixed: as `{a: 1, s3://bucket/b: 3}` by these shares of the stream; as `[a, b]` every pair comes as
    often as any other, but for the weights that the build gave its files."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str = "validation"
    """Split that is evaluated during training."""
    batch_size: int = 64
    """B: pairs in the contrastive batch over all ranks. Constant whatever the world size, which must divide it."""
    token_budget: int = 16384
    """Tokens in one pass of the encoder or decoder: sequences are run together up to this many, none is padded."""
    max_text_tokens: int = 512
    """A longer text is cut where it is only read, and its pair is dropped, and counted, where it must be written."""
    max_smiles_tokens: int = 512
    """A pair with a longer SMILES is dropped and counted: a cut SMILES is not a molecule."""
    window_blocks: int = 64
    """Blocks of 256 records that are shuffled together; all of them are in memory at once."""
    group_shards: int = 64
    """Shards whose blocks are shuffled together: a cache of the node needs room for twice as many of each corpus."""
    num_workers: int = 1
    """Loader processes of one rank; 0 loads in the training process."""
    on_error: Literal["raise", "skip"] = "raise"
    """A block that cannot be read or does not match its checksum ends the run, or other samples stand in for its own
    and `bad_samples.jsonl` names each."""
    max_consecutive_skips: int = 100
    """`skip` ends with an error all the same after so many samples in a row, of one rank in one batch."""
    max_skips: int = 10000
    """And after so many samples of all ranks since the run began."""
    tokens: Literal["use", "ignore"] = "use"
    """`use` reads what `atomas data tokenize` wrote, where the corpus has any, and refuses that of another tokenizer;
    `ignore` tokenizes while training."""

    @property
    def corpora(self) -> dict[str, float | None]:
        """Every corpus with its weight, where one is given."""
        if isinstance(self.corpus, str):
            return {self.corpus: None}
        return dict(self.corpus) if isinstance(self.corpus, dict) else dict.fromkeys(self.corpus)

    def __post_init__(self) -> None:
        """Check the corpora."""
        for name in self.corpora:
            check_address(name, "data.corpus = ")
        weights = [weight for weight in self.corpora.values() if weight is not None]
        if not self.corpora or not all(0 < weight < float("inf") for weight in weights):
            raise AtomasError(f"data.corpus = {self.corpus}: one corpus at least, and weights above 0")
        if isinstance(self.corpus, tuple) and len(self.corpora) < len(self.corpus):
            raise AtomasError(
                f"data.corpus = {list(self.corpus)}: one is given twice; give it a weight instead"
            )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How the shards of a corpus that lies elsewhere come to a node, and stay there."""

    cache_dir: str = ""
    """Folder on a disk of the node, by default the one that TMPDIR names. All processes of a user share
    `atomas-shards-UID` in it."""
    cache_gib: float = 100.0
    """Largest size of that folder in GiB. The shards that were not read for longest make room."""
    timeout_seconds: float = 30.0
    """A server that says nothing for so long is asked again."""
    attempts: int = 6
    """Requests in a row that bring nothing before a shard counts as unreadable; between them are growing pauses."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and the heads on it. Sizes are read only where the model starts from scratch."""

    pretrained: str = ""
    """A folder or hub name of a T5-family checkpoint to start from; empty starts from scratch with the sizes below."""
    d_model: int = 192
    """D: width of the encoder states. Must be divisible by `polymerization_heads`."""
    d_kv: int = 32
    """Width of one attention head."""
    d_ff: int = 768
    """Width of the feed-forward layers."""
    num_layers: int = 3
    """Encoder layers."""
    num_decoder_layers: int = 2
    """Decoder layers."""
    num_heads: int = 6
    """Attention heads of the backbone."""
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    """`relu` as in T5 v1.0 and MolT5, `gated-gelu` as in T5 v1.1."""
    tie_word_embeddings: bool = True
    """Share the input embedding with the output layer, as T5 v1.0 does."""
    dropout_rate: float = 0.1
    """Dropout of the backbone."""
    pooling: Literal["position_linear", "mean", "attention"] = "mean"
    """Sequence to one vector. `position_linear` is the published form: one learned weight per position."""
    ratios: tuple[float, ...] = (0.25, 0.5)
    """Share of tokens kept as clusters from level l to l + 1; as many levels above the tokens as there are ratios."""
    neighbours: int = 3
    """k of the density in DPC-KNN, the token itself included."""
    polymerization_heads: int = 8
    """Attention heads of the polymerisation block."""
    activation_checkpointing: bool = False
    """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.pretrained and self.d_model % self.polymerization_heads:
            raise AtomasError(
                f"model.d_model = {self.d_model} is not divisible by model.polymerization_heads = "
                f"{self.polymerization_heads}; change one of them"
            )
        if any(not 0.0 < ratio <= 1.0 for ratio in self.ratios):
            raise AtomasError(f"model.ratios = {list(self.ratios)}: every ratio must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = w_global L_ga + w_hierarchical L_haa + w_lm L_lm (method section 5). A weight of 0 leaves the part out."""

    task: Literal["genmol", "gentext", "both"] = "genmol"
    """What the decoder writes: SMILES from text, text from SMILES, or both in one step."""
    global_weight: float = 1.0
    """Weight of the global momentum contrast."""
    hierarchical_weight: float = 1.0
    """Weight of the hierarchical adaptive alignment."""
    lm_weight: float = 10.0
    """Weight of the generation loss."""
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Weight of each level inside L_haa: tokens, fragments, molecule. 0 leaves a level out."""
    alpha: float = 0.4
    """Share of the momentum model's soft targets in the global loss."""
    temperature: float = 0.07
    """Initial temperature of the global loss; learned, kept within [0.001, 0.5]."""
    logit_scale: float = 14.285714285714286
    """Initial scale of the hierarchical scores, 1 / 0.07; learned in log space, one for all levels."""
    false_negatives: Literal["keep", "mask", "multi_positive"] = "mask"
    """Pairs of the batch or the queue with the same text or the same molecule: `mask` leaves them out of the negatives,
    `multi_positive` makes them positives with equal shares, `keep` takes them for negatives."""
    exchange: Literal["allgather", "ring"] = "allgather"
    """How the tokens of other ranks come to a rank that scores its own against them. `allgather` brings all at once;
    `ring` brings one rank's after the other while the last one is worked on: for B x tokens beyond the memory."""


@dataclass(frozen=True, kw_only=True)
class MomentumConfig:
    """The momentum copy of backbone and poolers, and the queues of its features (method section 2)."""

    enabled: bool = True
    """Off: the keys are the batch's own features, with gradient, and there are no soft targets."""
    coefficient: float = 0.995
    """m in theta_m <- m theta_m + (1 - m) theta."""
    queue_size: int = 13200
    """Q: past features kept per modality; 0 keeps none."""
    forward: Literal["replica", "layerwise"] = "replica"
    """What runs: a whole copy on every rank, or under ZeRO stage 3 pieces that are gathered layer by layer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; applied to matrices only."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear rise from 0."""
    final_ratio: float = 0.05
    """Learning rate of the last step over the peak, for `cosine`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The step loop."""

    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 0
    """Pairs of one rank whose activations are held at once; 0 holds all B / W of them. The loss stays that of the
    whole contrastive batch (gradient caching): the encoder runs twice, and memory no longer grows with B."""
    feature_cache: Literal["device", "host", "disk"] = "device"
    """Where the features of the other micro-batches wait; `disk` is the folder that TMPDIR names."""
    gradient_accumulation_steps: int = 1
    """Contrastive batches, each of B pairs, whose gradients are averaged into one optimizer step."""
    precision: Literal["fp32", "bf16", "bf16_autocast", "fp16"] = "fp32"
    """`bf16` casts the weights, with fp32 masters in the optimizer; `bf16_autocast` keeps fp32 weights.
    T5 overflows in `fp16`, which needs ZeRO stage 1 to 3."""
    compile: bool = False
    """Run the backbone's blocks through `torch.compile`, attention apart. Not under ZeRO stage 3."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl` on the console; the file holds every step."""
    trace_steps: str = ""
    """Steps to profile, as `12` or `12-14`, counted from 1: attempts/N/trace/rank_R.json. A few: a step is many MB."""

    @property
    def traced(self) -> range:
        """The steps that `trace_steps` names."""
        first, dash, last = self.trace_steps.partition("-")
        return range(int(first), int(last if dash else first) + 1) if self.trace_steps else range(0)

    def __post_init__(self) -> None:
        """Check the steps to profile."""
        try:
            good = not self.trace_steps or (bool(self.traced) and self.traced[0] > 0)
        except ValueError:
            good = False
        if not good:
            raise AtomasError(
                f"training.trace_steps = {self.trace_steps!r}: give a step or a range, as 12 or 12-14"
            )


REFUSED_DEEPSPEED_KEYS = {
    "elasticity": "DeepSpeed removed it; restart at another world size instead",
    "amp": "DeepSpeed removed it; use training.precision",
    "train_batch_size": "use data.batch_size",
    "train_micro_batch_size_per_gpu": "use data.batch_size",
    "gradient_accumulation_steps": "use training.gradient_accumulation_steps",
    "gradient_clipping": "use optimizer.gradient_clipping",
    "optimizer": "use the optimizer section",
    "scheduler": "use the schedule section",
    "fp16": "use training.precision",
    "bf16": "use training.precision",
    "zero_optimization.stage": "use deepspeed.zero_stage",
}

REDUCE_BUCKET = 25_000_000
"""Elements of gradients that are sent together. DeepSpeed's own 500 million hold all of most T5s: nothing would be on
its way before the backward pass has ended, and on a GPU two such buffers lie beside the model."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What is handed to DeepSpeed beside what the other sections say."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0 plain data parallel; 1 shards the optimizer, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """`cpu` keeps optimizer state, and under stage 3 parameters, in host memory; `nvme`, under stage 3 alone, keeps
    both in files below `nvme_path`."""
    nvme_path: str = ""
    """Folder on a local disk of the node for `offload: nvme`. Every rank has a folder of its own in it, which goes when
    the rank ends; one that a killed rank left goes at the next start on the node."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into the generated DeepSpeed JSON. Keys that DeepSpeed has removed or that Atomas sets are refused."""

    def __post_init__(self) -> None:
        """Refuse keys that would silently not do what they say."""
        if self.offload == "nvme" and self.zero_stage != 3:
            raise AtomasError(
                f"deepspeed.offload = 'nvme' needs deepspeed.zero_stage = 3, not {self.zero_stage}; set it, or take "
                "offload = 'cpu'"
            )
        if (self.offload == "nvme") != bool(self.nvme_path):
            raise AtomasError(
                "deepspeed.offload = 'nvme' and deepspeed.nvme_path, a folder on a local disk, need each other; "
                f"they are {self.offload!r} and {self.nvme_path!r}"
            )
        zero = self.extra.get("zero_optimization")
        given = [
            *self.extra,
            *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, dict) else {})),
        ]
        for key in given:
            if key in REFUSED_DEEPSPEED_KEYS:
                raise AtomasError(
                    f"deepspeed.extra: {key!r} cannot be set there: {REFUSED_DEEPSPEED_KEYS[key]}"
                )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Dashboards beside `metrics.jsonl`; they need the extra `tracking`."""

    tensorboard: bool = False
    """Write TensorBoard event files to attempts/N/tensorboard."""
    wandb_project: str = ""
    """Log to this project of Weights & Biases; empty does not. `WANDB_MODE=offline` keeps it in attempts/N/wandb."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and what is continued."""

    every: int = 500
    """Steps between two checkpoints; the last step is always saved. 0 saves only the last."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; the last checkpoint of a run is waited for. Off: every
    rank waits until a checkpoint is published."""
    keep_last: int = 2
    """Newest checkpoints that are kept; the best one is kept besides."""
    keep_every: int = 0
    """The first checkpoint at or after every multiple of this step is kept for ever; 0 keeps none for that reason."""
    failures_allowed: int = 3
    """Checkpoints in a row that may fail, as on a full disk, before the run ends; each failure is one line in the log,
    and the next checkpoint tries again. The last checkpoint of a run must not fail."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues the newest good checkpoint of the run; `never` refuses a run folder that has one."""


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What happens when the numbers go wrong. A step whose loss or gradient is not finite is left out on all ranks."""

    skipped_limit: int = 10
    """Steps among the last 100 that may be left out. One more is trouble: the run goes back, or ends."""
    spike_score: float = 10.0
    """A loss so many robust standard deviations above the median of the last ones is a spike; 0 looks for none."""
    spike_window: int = 128
    """Losses that a new one is compared with; before there are so many nothing is a spike."""
    spike_steps: int = 3
    """Spikes in a row that are trouble, where `rollbacks` is not 0; else they are only logged."""
    rollbacks: int = 0
    """How often a run may go back to its newest checkpoint on trouble, and on without the data since then. When they
    are used up, trouble ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval on the validation split during training."""

    every: int = 500
    """Steps between two evaluations, and one at the end; 0 switches it off."""
    max_pairs: int = 500
    """Pairs of the validation split that are used, from its start."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def longest_smiles(self) -> int | None:
        """Tokens of the longest SMILES that the model can read at all; None where any length will do."""
        return self.data.max_smiles_tokens if self.model.pooling == "position_linear" else None

    def __post_init__(self) -> None:
        """Check what spans sections, and the ranges of numbers."""
        for key, low in _LOWER_BOUNDS.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if value < low:
                raise AtomasError(f"{key} = {value}: must be at least {low}")
        if self.training.compile and self.deepspeed.zero_stage == 3:
            raise AtomasError(
                "training.compile with deepspeed.zero_stage = 3: weights come and go there while a block runs; "
                "use stage 2, or leave compile off"
            )
        if self.training.precision == "fp16" and self.deepspeed.zero_stage == 0:
            raise AtomasError(
                "training.precision = fp16 with deepspeed.zero_stage = 0: DeepSpeed divides gradients by the loss "
                "scale there, but never multiplies the loss by it; use stage 1, also on one GPU, or bf16"
            )
        if not 0.0 <= self.loss.alpha <= 1.0:
            raise AtomasError(f"loss.alpha = {self.loss.alpha}: must be in [0, 1]")
        if not 0.0 <= self.momentum.coefficient < 1.0:
            raise AtomasError(f"momentum.coefficient = {self.momentum.coefficient}: must be in [0, 1)")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self.optimizer, name) < 1.0:
                raise AtomasError(f"optimizer.{name} = {getattr(self.optimizer, name)}: must be in [0, 1)")
        if self.momentum.forward == "layerwise" and self.deepspeed.zero_stage < 3:
            raise AtomasError(
                f"momentum.forward = 'layerwise' needs deepspeed.zero_stage = 3, not {self.deepspeed.zero_stage}; "
                "set one of them"
            )
        if min(self.loss.level_weights, default=0) < 0:
            raise AtomasError(f"loss.level_weights = {list(self.loss.level_weights)}: must not be negative")
        if not 0.0 <= self.model.dropout_rate < 1.0:
            raise AtomasError(f"model.dropout_rate = {self.model.dropout_rate}: must be in [0, 1)")
        if self.loss.global_weight == self.loss.hierarchical_weight == self.loss.lm_weight == 0:
            raise AtomasError("every loss weight is 0: set one of loss.{global,hierarchical,lm}_weight")
        levels = 1 + len(self.model.ratios)
        if len(self.loss.level_weights) != levels:
            raise AtomasError(
                f"loss.level_weights has {len(self.loss.level_weights)} entries, model.ratios makes {levels} levels; "
                "give one weight per level"
            )


_LOWER_BOUNDS: dict[str, float] = {
    "run.threads": 0,
    "run.collective_timeout_seconds": 5,
    "run.silence_timeout_seconds": 5,
    "run.grace_seconds": 0,
    "tokenizer.vocab_size": 354,
    "data.batch_size": 2,
    "data.token_budget": 1,
    "data.max_text_tokens": 4,
    "data.max_smiles_tokens": 4,
    "data.window_blocks": 1,
    "data.num_workers": 0,
    "data.group_shards": 1,
    "data.max_consecutive_skips": 0,
    "data.max_skips": 0,
    "storage.cache_gib": 1e-6,
    "storage.timeout_seconds": 0.1,
    "storage.attempts": 1,
    "model.d_model": 1,
    "model.d_kv": 1,
    "model.d_ff": 1,
    "model.num_layers": 1,
    "model.num_decoder_layers": 1,
    "model.num_heads": 1,
    "model.neighbours": 1,
    "model.polymerization_heads": 1,
    "loss.global_weight": 0,
    "loss.hierarchical_weight": 0,
    "loss.lm_weight": 0,
    "loss.temperature": 1e-3,
    "loss.logit_scale": 1e-3,
    "momentum.queue_size": 0,
    "optimizer.learning_rate": 0,
    "optimizer.epsilon": 0,
    "optimizer.weight_decay": 0,
    "optimizer.gradient_clipping": 0,
    "schedule.warmup_steps": 0,
    "schedule.final_ratio": 0,
    "training.max_steps": 1,
    "training.micro_batch_size": 0,
    "training.gradient_accumulation_steps": 1,
    "training.log_every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "checkpoint.failures_allowed": 0,
    "stability.skipped_limit": 0,
    "stability.spike_score": 0,
    "stability.spike_window": 8,
    "stability.spike_steps": 1,
    "stability.rollbacks": 0,
    "evaluation.every": 0,
    "evaluation.max_pairs": 2,
}
