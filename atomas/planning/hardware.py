"""GPUs and clusters as a few numbers, and what is assumed of them where nothing was measured."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What its maker states of one GPU."""

    memory_bytes: float
    bf16_flops: float
    """Dense bf16 matrix products with float32 sums, FLOP/s"""
    tf32_flops: float
    """Dense tf32 products, FLOP/s; float32 tokens take three of them"""
    node_bytes_per_second: float
    """One direction of the link to the other GPUs of a node"""


GPUS = {
    "a100-80": Gpu(memory_bytes=80e9, bf16_flops=312e12, tf32_flops=156e12, node_bytes_per_second=300e9),
    "h100": Gpu(memory_bytes=80e9, bf16_flops=989e12, tf32_flops=494e12, node_bytes_per_second=450e9),
    "h200": Gpu(memory_bytes=141e9, bf16_flops=989e12, tf32_flops=494e12, node_bytes_per_second=450e9),
    "b200": Gpu(memory_bytes=180e9, bf16_flops=2250e12, tf32_flops=1125e12, node_bytes_per_second=900e9),
}
"""Without sparsity, SXM form. Sources: NVIDIA A100 Tensor Core GPU data sheet (2021): 80 GB, 312 / 156 TFLOP/s, NVLink
600 GB/s both ways; NVIDIA H100 data sheet (2023): 80 GB, 989 / 494 TFLOP/s, 900 GB/s; NVIDIA H200 data sheet (2024):
141 GB, as the H100 otherwise; NVIDIA DGX B200 data sheet (2024): 1,440 GB and 36 PFLOP/s bf16 with sparsity over 8
GPUs, 1.8 TB/s each. The data sheets give the H100's figures with sparsity, twice these."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no data sheet says. Replace them by measurements where there are any."""

    matmul_fraction: float = 0.45
    """Share of the bf16 peak that backbone and heads reach on ragged batches"""
    interaction_fraction: float = 0.5
    """Share of its peak that the token interaction reaches: the bf16 peak, in float32 a third of the tf32 peak"""
    link_fraction: float = 0.8
    """Share of a link's rate that collectives reach"""
    latency_seconds: float = 2e-5
    """Of one step of a collective between nodes"""
    overlap_fraction: float = 0.8
    """Share of backward time under which the gradient reduction (from stage 1 on, and under stage 3 the gathers of
    parameters) can hide; a ring hides its blocks under the interaction entirely"""
    usable_memory_fraction: float = 0.9
    """Share of a GPU's memory that tensors can fill; the rest is for CUDA, NCCL and fragmentation"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`nodes` x `gpus_per_node` equal GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    link_bytes_per_second: float
    """One direction of one GPU's port to the network between nodes"""

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.gpus_per_node

    @property
    def collective_bytes_per_second(self) -> float:
        """What a rank can send in a collective over all: NCCL lays as many rings as a node has ports, and every
        rank is on all of them.
        """
        within = self.gpu.node_bytes_per_second
        return within if self.nodes == 1 else min(within, self.gpus_per_node * self.link_bytes_per_second)

    @property
    def neighbour_bytes_per_second(self) -> float:
        """What a rank can send to the next one, where all do at once: the slowest hop is one port."""
        return self.gpu.node_bytes_per_second if self.nodes == 1 else self.link_bytes_per_second

    def of_size(self, ranks: int) -> "Cluster":
        """The same machines, as many as `ranks` need: whole nodes beyond the first one."""
        per_node = min(self.gpus_per_node, ranks)
        return Cluster(
            gpu=self.gpu,
            nodes=-(-ranks // per_node),
            gpus_per_node=per_node,
            link_bytes_per_second=self.link_bytes_per_second,
        )
