"""Where the token rows of a batch wait that is larger than what the device can hold."""

import tempfile
from typing import Literal, Protocol

import torch
from torch import Tensor

from atomas.errors import AtomasError

StorePlace = Literal["device", "host", "disk"]


class RowStore(Protocol):
    """A list of float tensors [n, C], which may lie anywhere."""

    def __len__(self) -> int:
        """Return how many tensors there are."""
        ...

    def __getitem__(self, number: int) -> Tensor:
        """One of them, on the device."""
        ...

    def __setitem__(self, number: int, rows: Tensor) -> None:
        """Put another of the same shape in its place."""
        ...

    def append(self, rows: Tensor) -> None:
        """Put one more at the end."""
        ...


def row_store(place: StorePlace, device: torch.device) -> RowStore:
    """An empty store whose tensors come back on `device`."""
    if place == "disk":
        return DiskStore(device)
    return MemoryStore(device, torch.device("cpu") if place == "host" else device)


class MemoryStore:
    """Tensors in the memory of the device or of the host."""

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self._device, self._home = device, home
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._rows)

    def __getitem__(self, number: int) -> Tensor:
        """One of them, on the device."""
        return self._rows[number].to(self._device)

    def __setitem__(self, number: int, rows: Tensor) -> None:
        """Put another of the same shape in its place."""
        self._rows[number] = rows.detach().to(self._home)

    def append(self, rows: Tensor) -> None:
        """Put one more at the end."""
        self._rows.append(rows.detach().to(self._home))


class DiskStore:
    """Tensors in a file without a name, in the folder that TMPDIR names; it is gone with the store."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the store lives
        self._end = 0
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._places)

    def __getitem__(self, number: int) -> Tensor:
        """One of them, on the device."""
        offset, shape, dtype = self._places[number]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype, device=self._device)
        self._file.seek(offset)
        size = shape.numel() * dtype.itemsize
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).view(shape).to(self._device)

    def __setitem__(self, number: int, rows: Tensor) -> None:
        """Put another of the same shape in its place."""
        self._write(self._places[number][0], rows)

    def append(self, rows: Tensor) -> None:
        """Put one more at the end."""
        self._places.append((self._end, rows.shape, rows.dtype))
        self._write(self._end, rows)
        self._end += rows.nbytes

    def _write(self, offset: int, rows: Tensor) -> None:
        content = rows.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(offset)
            self._file.write(content.data)
            self._file.flush()  # a full disk is said here
        except OSError as error:
            raise AtomasError(
                f"features cannot wait in {tempfile.gettempdir()}: {error.strerror}; let TMPDIR name a folder with "
                "more room, or set training.feature_cache = host"
            ) from error
