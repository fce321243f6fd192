"""The compiled CPU module (csrc/module.cpp): addresses of tensors, sizes as integers.

Matrices of keys are (dtype, address, rows, numbers from one row to the next).
"""

def instruction_sets() -> list[str]: ...
def interaction_forward(
    isa: str,
    threads: int,
    dtype: str,
    width: int,
    text_lengths: list[int],
    smiles_lengths: list[int],
    /,
    *addresses: int,
) -> None: ...
def interaction_backward(
    isa: str,
    threads: int,
    dtype: str,
    width: int,
    text_lengths: list[int],
    smiles_lengths: list[int],
    /,
    *addresses: int,
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
def contrastive_forward(
    isa: str,
    threads: int,
    count: int,
    width: int,
    alpha: float,
    temperature: float,
    keys: tuple[str, int, int, int],
    queue: tuple[str, int, int, int],
    /,
    *addresses: int,
) -> None: ...
def contrastive_key_gradient(
    isa: str,
    threads: int,
    count: int,
    width: int,
    alpha: float,
    temperature: float,
    keys: tuple[str, int, int, int],
    queue: tuple[str, int, int, int],
    /,
    *addresses: int,
) -> None: ...
def attention_forward(
    isa: str,
    threads: int,
    shape: tuple[int, int, int, bool],
    dropout: tuple[int, int, float],
    query_lengths: list[int],
    key_lengths: list[int],
    query: tuple[int, int],
    key: tuple[int, int],
    value: tuple[int, int],
    /,
    *addresses: int,
) -> None: ...
def attention_backward(
    isa: str,
    threads: int,
    shape: tuple[int, int, int, bool],
    dropout: tuple[int, int, float],
    query_lengths: list[int],
    key_lengths: list[int],
    query: tuple[int, int],
    key: tuple[int, int],
    value: tuple[int, int],
    /,
    *addresses: int | tuple[int, int],
) -> None: ...
def dropout(
    isa: str, threads: int, rule: tuple[int, int, float], count: int, source: int, destination: int, /
) -> None: ...
