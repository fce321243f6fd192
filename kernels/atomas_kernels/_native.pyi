"""The compiled CPU module (csrc/module.cpp): addresses of contiguous tensors, sizes as integers."""

def instruction_sets() -> list[str]: ...
def interaction_forward(
    isa: str, threads: int, width: int, text_lengths: list[int], smiles_lengths: list[int], /, *addresses: int
) -> None: ...
def interaction_backward(
    isa: str, threads: int, width: int, text_lengths: list[int], smiles_lengths: list[int], /, *addresses: int
) -> None: ...
def cluster(
    isa: str,
    threads: int,
    width: int,
    neighbours: int,
    lengths: list[int],
    cluster_lengths: list[int],
    /,
    *addresses: int,
) -> None: ...
def merge_forward(
    isa: str, threads: int, width: int, lengths: list[int], cluster_lengths: list[int], /, *addresses: int
) -> None: ...
def merge_backward(
    isa: str, threads: int, width: int, lengths: list[int], cluster_lengths: list[int], /, *addresses: int
) -> None: ...
