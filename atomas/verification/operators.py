"""Clustering and token interaction, in isolation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from atomas.errors import AtomasError
from atomas.model.alignment import ImportanceMLP, Level, interaction
from atomas.verification.golden import Check, GoldenFile, compare, flat
from atomas_kernels import cluster_merge, dpc_knn, info_nce, segment_softmax


def verify_clustering(golden: GoldenFile) -> Iterator[Check]:
    """Assignments, merged tokens and the weight each token has in its cluster (method section 3.1)."""
    for case in golden.groups():
        tokens = golden[f"{case}.tokens"]
        x, lengths = flat(tokens)
        x = x.clone().requires_grad_()
        weight = flat(golden[f"{case}.score"])[0].squeeze(1).exp()
        # Stored in float32: 0.3 comes back as 0.30000001, of which ten tokens would make four clusters.
        ratio = round(float(golden[f"{case}.ratio"]), 7)
        assignment, cluster_lengths = dpc_knn(x, lengths, ratio=ratio, k=int(golden[f"{case}.k"]))
        merged = cluster_merge(x, weight, assignment, lengths, cluster_lengths)
        # The merge is linear in the tokens, so its gradient is the weight each of them has in its cluster.
        share = torch.autograd.grad(merged.sum(), x)[0][:, :1]

        ours = {
            "assignment": assignment.unflatten(0, tokens.shape[:2]),
            "token_to_cluster": assignment.unflatten(0, tokens.shape[:2]),
            "merged": merged.unflatten(0, (len(tokens), -1)),
            "aggregation_weight": share.unflatten(0, tokens.shape[:2]),
        }
        for name, value in ours.items():
            tensor = f"{case}.{name}"
            yield compare(f"clustering: {name}", tensor, "value", value, golden[tensor])


def verify_token_interaction(golden: GoldenFile) -> Iterator[Check]:
    """Scores, loss and gradients of one level (method section 3.2)."""
    for case in golden.groups():
        inputs = {side: golden[f"{case}.{side}"].clone().requires_grad_() for side in ("text", "smiles")}
        mlps = {side: _importance(golden, f"{case}.{side}_weight") for side in inputs}
        scale = golden[f"{case}.scale"].reshape(1).clone().requires_grad_()
        levels = {side: _level(inputs[side], mlps[side]) for side in inputs}
        scores = interaction(levels["text"], levels["smiles"])
        loss = info_nce(scores, scale)
        loss.backward()

        yield compare("interaction: scores", f"{case}.logits", "value", scores, golden[f"{case}.logits"])
        yield compare("interaction: loss", f"{case}.loss", "loss", loss, golden[f"{case}.loss"])
        leaves: dict[str, Tensor] = {"scale": scale, **inputs}
        for side, mlp in mlps.items():
            leaves |= {f"{side}_weight.{name}": parameter for name, parameter in mlp.named_parameters()}
        for name, leaf in leaves.items():
            part = "tokens" if name in inputs else "scale" if name == "scale" else "importance"
            expected = golden[f"{case}.grad_{name}"]
            assert leaf.grad is not None
            gradient = leaf.grad.reshape(expected.shape) if name == "scale" else leaf.grad
            yield compare(
                f"interaction: gradient of {part}", f"{case}.grad_{name}", "gradient", gradient, expected
            )


def _importance(golden: GoldenFile, prefix: str) -> ImportanceMLP:
    mlp = ImportanceMLP(golden[f"{prefix}.0.weight"].shape[-1]).to(golden.dtype)
    try:
        mlp.load_state_dict(dict(golden.under(prefix)))
    except RuntimeError as error:
        raise AtomasError(f"{golden.path}: {prefix}: {' '.join(str(error).split())}") from None
    return mlp


def _level(tokens: Tensor, mlp: ImportanceMLP) -> Level:
    x, lengths = flat(tokens)
    return Level(tokens=x, lengths=lengths, weight=segment_softmax(mlp(x), lengths), assignment=None)
