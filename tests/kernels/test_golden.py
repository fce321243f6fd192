"""The recorded numbers of the published implementation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atomas_kernels import cluster_merge, dpc_knn, info_nce, segment_softmax, token_interaction


def _case(path: Path, number: int) -> dict[str, Tensor]:
    prefix = f"case{number}."
    return {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}


@pytest.mark.parametrize("number", range(4))
def test_clustering(golden: Path, each_backend: str, number: int) -> None:
    case = _case(golden / "clustering.safetensors", number)
    batch, n, width = case["tokens"].shape
    tokens = case["tokens"].reshape(-1, width)
    lengths = torch.full((batch,), n)
    ratio = round(case["ratio"].item(), 6)
    assignment, counts = dpc_knn(tokens, lengths, ratio=ratio, k=int(case["k"]))
    assert torch.equal(counts, torch.full((batch,), case["merged"].shape[1]))
    assert torch.equal(assignment.view(batch, n), case["assignment"])
    merged = cluster_merge(tokens, case["score"].exp().flatten(), assignment, lengths, counts)
    torch.testing.assert_close(merged.view_as(case["merged"]), case["merged"], atol=1e-6, rtol=1e-5)


def _importance(case: dict[str, Tensor], modality: str, tokens: Tensor, lengths: Tensor) -> Tensor:
    layer = {name: case[f"{modality}_weight.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = torch.nn.functional.linear(tokens, layer["0.weight"], layer["0.bias"]).relu()
    logits = torch.nn.functional.linear(hidden, layer["2.weight"], layer["2.bias"]).squeeze(-1)
    return segment_softmax(logits, lengths)


@pytest.mark.parametrize("number", range(3))
def test_token_interaction(golden: Path, each_backend: str, number: int) -> None:
    case = _case(golden / "token_interaction.safetensors", number)
    leaves = {name: value.clone() for name, value in case.items() if f"grad_{name}" in case}
    for leaf in leaves.values():
        leaf.requires_grad_()
    flat, lengths, weight = {}, {}, {}
    for modality in ("text", "smiles"):
        batch, n, width = leaves[modality].shape
        flat[modality] = leaves[modality].reshape(-1, width)
        lengths[modality] = torch.full((batch,), n)
        weight[modality] = _importance(leaves, modality, flat[modality], lengths[modality])
    scores = token_interaction(
        flat["text"], flat["smiles"], weight["text"], weight["smiles"], lengths["text"], lengths["smiles"]
    )
    loss = info_nce(scores, leaves["scale"].view(1))
    torch.testing.assert_close(scores, case["logits"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, case["loss"], atol=1e-6, rtol=1e-5)
    loss.backward()
    for name, leaf in leaves.items():
        expected = case[f"grad_{name}"]
        assert leaf.grad is not None
        deviation = (leaf.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-4)
        assert deviation < 1e-3, name
