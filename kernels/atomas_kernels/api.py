"""Public operators over ragged tokens: checked at the edge, then handed to the backend in use.

A ragged batch is a flat tensor `[T, D]` of tokens, sequence after sequence, and `lengths` `[B]` (int64, sum
T; `lengths_from_cu_seqlens` makes them from the running sum). Wherever `[T, ...]` tokens are asked for with
their lengths, padded ones `[B, N, ...]` are taken too, and every result per token or per cluster is then padded
alike. A sequence of length zero is legal everywhere: it contributes 0. Symbols: T tokens, D width, N places of
a padded row, A / Bc text / SMILES sequences, K_i clusters of sequence i, V vocabulary, M contrastive keys, Q
queued ones. What is made of half-precision tokens is float32 inside; products of two of them are exact there.

Every operator raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device or length;
the message starts with the argument's name.
"""

from collections.abc import Sequence

from torch import Tensor

from atomas_kernels import checks
from atomas_kernels.layout import PaddedBatch, pad
from atomas_kernels.registry import implementation


def segment_softmax(logits: Tensor, lengths: Tensor) -> Tensor:
    """Softmax over the tokens of each sequence.

    Args:
        logits: [T], floating.
        lengths: [B] int64, sum T.

    Returns:
        [T], same dtype; sums to 1 over every sequence. A sequence whose logits are all -inf gets zeros.
        Padded: [B, N] -> [B, N], 0 behind each sequence.
    """
    if checks.dims("logits", logits) == 2:
        rows = PaddedBatch("logits", logits, "lengths", lengths)
        return rows.pad(segment_softmax(rows.pack("logits", logits), lengths))
    checks.floating("logits", logits, dims=1)
    checks.lengths("lengths", lengths, device=logits.device)
    return implementation("segment_softmax", logits)(logits, lengths)


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int = 3) -> tuple[Tensor, Tensor]:
    """Density-peak clustering of each sequence (method.md 3.1; Du et al. 2016, as used by TCFormer). No
    gradient.

    With d_ij = ||x_i - x_j|| / sqrt(D): density rho_i = exp(-mean over the min(k, N) nearest, itself
    included, of d_ij^2); delta_i = distance to the nearest token of higher density, for the densest token the
    largest distance of the sequence. Centres are the K_i tokens of largest rho * delta; every token joins its
    nearest centre, a centre joins itself. All ties are broken by order: of equal densities the lower index is
    the denser, of equal rho * delta the lower index comes first, of equally near centres the lower cluster
    number wins. A distance that is NaN counts as infinite, so a token that is not finite never hurts memory
    safety or another sequence.

    Args:
        tokens: [T, D], floating; distances are float32.
        lengths: [B] int64, sum T.
        ratio: clusters per token, 0 < ratio <= 1.
        k: neighbours in the density, >= 1; may exceed a sequence's length.

    Returns:
        assignment: [T] int64, cluster number within the token's own sequence, numbered in descending rho *
            delta.
        cluster_lengths: [B] int64, K_i = ceil(ratio * N_i) (0 for an empty sequence).
        Padded: [B, N, D] -> assignment [B, N], -1 behind each sequence.
    """
    if checks.dims("tokens", tokens) == 3:
        rows = PaddedBatch("tokens", tokens, "lengths", lengths)
        assignment, counts = dpc_knn(rows.pack("tokens", tokens), lengths, ratio=ratio, k=k)
        return rows.pad(assignment, fill=-1), counts
    checks.floating("tokens", tokens, dims=2)
    checks.lengths("lengths", lengths, device=tokens.device)
    checks.fraction("ratio", ratio)
    checks.positive_int("k", k)
    return implementation("dpc_knn", tokens)(tokens.detach(), lengths, ratio=float(ratio), k=k)


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """Weighted mean of the members of every cluster: sum(w_i x_i) / (sum(w_i) + 1e-6) (method.md 3.1, step
    3).

    Args:
        tokens: [T, D], floating; differentiable.
        weight: [T], floating, exp(score); differentiable.
        assignment: [T] int64, cluster of each token within its own sequence.
        lengths: [B] int64, sum T.
        cluster_lengths: [B] int64, clusters of each sequence.

    Returns:
        [sum K_i, D], dtype of `tokens`; a cluster without members is zero.
        Padded: tokens [B, N, D], weight and assignment [B, N] -> [B, max K_i, D], zeros behind the clusters of
        each sequence.
    """
    if checks.dims("tokens", tokens) == 3:
        rows = PaddedBatch("tokens", tokens, "lengths", lengths)
        packed = (
            rows.pack("tokens", tokens),
            rows.pack("weight", weight),
            rows.pack("assignment", assignment),
        )
        return pad(cluster_merge(*packed, lengths, cluster_lengths), cluster_lengths)
    checks.floating("tokens", tokens, dims=2)
    checks.floating("weight", weight, dims=1, device=tokens.device)
    checks.same_size("weight", weight, 0, "tokens", tokens, 0)
    checks.integer("assignment", assignment, dims=1, device=tokens.device)
    checks.same_size("assignment", assignment, 0, "tokens", tokens, 0)
    checks.lengths("lengths", lengths, device=tokens.device)
    checks.lengths("cluster_lengths", cluster_lengths, device=tokens.device)
    checks.same_size("cluster_lengths", cluster_lengths, 0, "lengths", lengths, 0)
    return implementation("cluster_merge", tokens)(tokens, weight, assignment, lengths, cluster_lengths)


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """Weighted token interaction of every text with every SMILES (method.md 3.2; WTI of Wang et al. 2022,
    arXiv 2203.07111).

    With L2-normalised tokens, S(a, b) = (sum_i w_ai max_j <t_ai, s_bj> + sum_j v_bj max_i <t_ai, s_bj>) / 2.
    A pair with an empty side scores 0. Where several tokens attain a maximum the lowest index takes the
    gradient. A token of length below 1e-12 counts as zero and gets no gradient. A token that is not finite
    makes the scores of its own sequence NaN and no others.

    Half-precision tokens are multiplied as they are, on a GPU six times as fast as float32 ones, and summed in
    float32; lengths and scores are float32. So are their gradients, until autograd rounds them to the tokens' dtype:
    a leaf whose `grad_dtype` is float32 gets them as they are.

    Args:
        text: [T_t, D], floating, not normalised; differentiable. Padded: [A, N, D] with text_weight [A, N].
        smiles: [T_s, D], same dtype; differentiable. Padded: [Bc, N, D] with smiles_weight [Bc, N].
        text_weight: [T_t], floating, softmaxed over each text (`segment_softmax`); differentiable.
        smiles_weight: [T_s], floating; differentiable.
        text_lengths: [A] int64, sum T_t.
        smiles_lengths: [Bc] int64, sum T_s.

    Returns:
        [A, Bc] float32 (float64 for float64 tokens).
    """
    if checks.dims("text", text) == 3:
        rows = PaddedBatch("text", text, "text_lengths", text_lengths)
        text, text_weight = rows.pack("text", text), rows.pack("text_weight", text_weight)
    if checks.dims("smiles", smiles) == 3:
        rows = PaddedBatch("smiles", smiles, "smiles_lengths", smiles_lengths)
        smiles, smiles_weight = rows.pack("smiles", smiles), rows.pack("smiles_weight", smiles_weight)
    checks.floating("text", text, dims=2)
    checks.floating("smiles", smiles, dims=2, device=text.device)
    checks.same_dtype("smiles", smiles, "text", text)
    checks.same_size("smiles", smiles, 1, "text", text, 1)
    checks.floating("text_weight", text_weight, dims=1, device=text.device)
    checks.same_size("text_weight", text_weight, 0, "text", text, 0)
    checks.floating("smiles_weight", smiles_weight, dims=1, device=text.device)
    checks.same_size("smiles_weight", smiles_weight, 0, "smiles", smiles, 0)
    checks.lengths("text_lengths", text_lengths, device=text.device)
    checks.lengths("smiles_lengths", smiles_lengths, device=text.device)
    run = implementation("token_interaction", text)
    return run(text, smiles, text_weight, smiles_weight, text_lengths, smiles_lengths)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    distance_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every sequence of queries to its own sequence of keys, as T5 does it: softmax of q k^T, which
    is not scaled, plus a bias of the distance, plus a bias of the key (method.md 3.1, step 4).

    Args:
        query: [T_q, H, d], floating, H heads of width d; differentiable.
        key: [T_k, H, d], same dtype; differentiable.
        value: [T_k, H, d], same dtype; differentiable.
        query_lengths: [B] int64, sum T_q. May be on the CPU whatever the device of the tokens: a caller with
            many layers then spares each of them a copy.
        key_lengths: [B] int64, sum T_k; as `query_lengths`.
        distance_bias: [H, 2 R + 1], floating, added to the logits of keys whose place in their sequence, minus
            that of the query, is -R to R; what is farther takes the nearest of these (see `distance_buckets`).
            Differentiable. None for no bias.
        key_bias: [T_k], floating, added to the logits of each key; differentiable. None for no bias.
        causal: a query reads only the keys at its own place and before.
        dropout: probability with which an attention weight is dropped, 0 <= dropout <= 1; the others are scaled up.

    Returns:
        [T_q, H, d], dtype of `query`; zero for the queries of a sequence without keys.
        Padded: query [B, N, H, d], key and value [B, M, H, d], key_bias [B, M] -> [B, N, H, d], 0 behind each
        sequence.
    """
    if checks.dims("query", query) == 4:
        rows = PaddedBatch("query", query, "query_lengths", query_lengths)
        others = PaddedBatch("key", key, "key_lengths", key_lengths)
        attended = packed_attention(
            rows.pack("query", query),
            others.pack("key", key),
            others.pack("value", value),
            query_lengths,
            key_lengths,
            distance_bias=distance_bias,
            key_bias=None if key_bias is None else others.pack("key_bias", key_bias),
            causal=causal,
            dropout=dropout,
        )
        return rows.pad(attended)
    checks.floating("query", query, dims=3)
    checks.floating("key", key, dims=3, device=query.device)
    checks.floating("value", value, dims=3, device=query.device)
    for name, tensor in (("key", key), ("value", value)):
        checks.same_dtype(name, tensor, "query", query)
        checks.same_size(name, tensor, 1, "query", query, 1)
        checks.same_size(name, tensor, 2, "query", query, 2)
    checks.same_size("value", value, 0, "key", key, 0)
    for name, lengths in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        checks.integer(name, lengths, dims=1)
        if lengths.device.type != "cpu":
            checks.lengths(name, lengths, device=query.device)
    checks.same_size("key_lengths", key_lengths, 0, "query_lengths", query_lengths, 0)
    if distance_bias is not None:
        checks.floating("distance_bias", distance_bias, dims=2, device=query.device)
        checks.same_size("distance_bias", distance_bias, 0, "query", query, 1)
        if distance_bias.shape[1] % 2 == 0:
            raise ValueError(f"distance_bias: expected 2 R + 1 distances, got {distance_bias.shape[1]}")
    if key_bias is not None:
        checks.floating("key_bias", key_bias, dims=1, device=query.device)
        checks.same_size("key_bias", key_bias, 0, "key", key, 0)
    checks.fraction("dropout", dropout, zero=True)
    run = implementation("packed_attention", query)
    return run(
        query,
        key,
        value,
        query_lengths,
        key_lengths,
        distance_bias=distance_bias,
        key_bias=key_bias,
        causal=causal,
        dropout=float(dropout),
    )


def dropout(values: Tensor, rate: float) -> Tensor:
    """Set values to zero with probability `rate`, and scale the others so that the mean stays.

    Args:
        values: any shape, floating; differentiable.
        rate: 0 <= rate <= 1.

    Returns:
        Shape and dtype of `values`.
    """
    if not values.is_floating_point():
        raise ValueError(f"values: expected a floating dtype, got {values.dtype}")
    checks.fraction("rate", rate, zero=True)
    result: Tensor = implementation("dropout", values)(values, float(rate))
    return result


def info_nce(scores: Tensor, scale: Tensor, *, negative_mask: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: mean of the row and the column cross entropy of scores * scale, positives on the
    diagonal.

    Args:
        scores: [A, A], floating; differentiable.
        scale: [1], inverse temperature, already exponentiated; differentiable.
        negative_mask: [A, A] bool or None; True leaves a pair out of both denominators. The diagonal is never
            left out.

    Returns:
        Scalar, float32 at least; 0 for A = 0.
    """
    checks.floating("scores", scores, dims=2)
    checks.same_size("scores", scores, 1, "scores", scores, 0)
    checks.floating("scale", scale, dims=1, device=scores.device)
    checks.size("scale", scale, 0, 1)
    if negative_mask is not None:
        checks.boolean("negative_mask", negative_mask, shape=scores.shape, device=scores.device)
    return implementation("info_nce", scores)(scores, scale, negative_mask=negative_mask)


def contrastive_cross_entropy(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    queue: Tensor | None = None,
    ignore: Tensor | None = None,
) -> Tensor:
    """Soft-target cross entropy against in-batch and queued keys (method.md 2; ALBEF, arXiv 2107.07651,
    equations 4-6).

    With K the keys followed by the queue: logits x = query @ K^T / temperature; targets
    alpha * softmax(momentum_query @ K^T / temperature) + (1 - alpha) * onehot(positive), which carry no
    gradient.

    Args:
        query: [b, D], L2-normalised features; differentiable.
        momentum_query: [b, D], features of the momentum encoder; no gradient.
        keys: [M, D]; differentiable (momentum features usually need no gradient).
        positive: [b] int64, column of the own key.
        temperature: [1], > 0; differentiable through the logits.
        alpha: share of the momentum targets, 0 <= alpha <= 1.
        queue: [Q, D] further keys or None; any floating dtype, no gradient. Read where it lies: no backend but
            the reference copies it.
        ignore: [b, M + Q] bool or None; True leaves a key out of logits and targets alike. The own key is never
            left out.

    Returns:
        Scalar, float32 at least, mean over b; 0 for b = 0.
    """
    checks.floating("query", query, dims=2)
    checks.floating("momentum_query", momentum_query, dims=2, device=query.device)
    checks.floating("keys", keys, dims=2, device=query.device)
    checks.same_dtype("momentum_query", momentum_query, "query", query)
    checks.same_dtype("keys", keys, "query", query)
    checks.same_size("momentum_query", momentum_query, 0, "query", query, 0)
    checks.same_size("momentum_query", momentum_query, 1, "query", query, 1)
    checks.same_size("keys", keys, 1, "query", query, 1)
    checks.integer("positive", positive, dims=1, device=query.device)
    checks.same_size("positive", positive, 0, "query", query, 0)
    checks.floating("temperature", temperature, dims=1, device=query.device)
    checks.size("temperature", temperature, 0, 1)
    checks.fraction("alpha", alpha, zero=True)
    if queue is not None:
        checks.floating("queue", queue, dims=2, device=query.device)
        checks.same_size("queue", queue, 1, "query", query, 1)
    if ignore is not None:
        total = keys.shape[0] + (0 if queue is None else queue.shape[0])
        checks.boolean("ignore", ignore, shape=(query.shape[0], total), device=query.device)
    queue = None if queue is None else queue.detach()
    run = implementation("contrastive_cross_entropy", query)
    return run(
        query, momentum_query, keys, positive, temperature, alpha=float(alpha), queue=queue, ignore=ignore
    )


def lm_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy of the vocabulary logits hidden @ weight^T, in chunks, ignored rows dropped before the
    product.

    Peak logits memory is one chunk: the gradient is computed in the forward pass, chunk by chunk, and kept
    instead.

    Args:
        hidden: [T, D], floating, decoder states with any output scale applied; differentiable once.
        weight: [V, D], same dtype, output embedding; differentiable once.
        labels: [T] int64 in [0, V) or `ignore_index`.
        ignore_index: label of the rows that do not count.

    Returns:
        Scalar, float32 at least, mean over the valid labels; 0 when there are none.
    """
    checks.floating("hidden", hidden, dims=2)
    checks.floating("weight", weight, dims=2, device=hidden.device)
    checks.same_dtype("weight", weight, "hidden", hidden)
    checks.same_size("weight", weight, 1, "hidden", hidden, 1)
    checks.integer("labels", labels, dims=1, device=hidden.device)
    checks.same_size("labels", labels, 0, "hidden", hidden, 0)
    return implementation("lm_cross_entropy", hidden)(hidden, weight, labels, ignore_index=ignore_index)


def momentum_update(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """In place: target <- momentum * target + (1 - momentum) * source, for every pair (method.md 2).

    Args:
        targets: float32 masters (in bfloat16 a momentum of 0.995 rounds most updates away).
        sources: same shapes and devices, any floating dtype.
        momentum: 0 <= momentum <= 1.
    """
    checks.momentum_pairs(targets, sources)
    checks.fraction("momentum", momentum, zero=True)
    if targets:
        implementation("momentum_update", targets[0])(list(targets), list(sources), float(momentum))
