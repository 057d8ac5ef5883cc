"""`linear_cross_entropy`: validate, choose the backend, call."""

from __future__ import annotations

from torch import Tensor

from statescan.ops._checks import transforms_active
from statescan.ops._dispatch import Facts, attempt
from statescan.ops.cross_entropy.validation import check_linear_cross_entropy, compute_dtype

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projects hidden states onto a vocabulary and takes the cross-entropy, without ever holding all logits.

    For every token that is not ignored::

        logits = weight hidden + bias
        loss   = log(sum(exp(logits))) - logits[target]

    Args:
        hidden: (..., d); float64, float32, bfloat16 or float16.
        weight: (vocabulary, d), laid out as nn.Linear's, in the dtype of hidden (under autocast any).
        targets: (...), int64 or int32, in [0, vocabulary) or `ignore_index`.
        bias: (vocabulary,), any float dtype. Default: none.
        ignore_index: tokens with this target count nothing. Default -100.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``. Default "mean".
        chunk_size: tokens whose logits exist at once. Default: as many as make 64 MB of float32 logits, on "cuda" 512
            MB of logits, at least 256.
            It moves the result by rounding only, and two runs with one chunk_size are equal to the bit.
        backend: ``"auto"``, ``"cuda"`` or ``"torch"`` (in chunks), or ``"reference"`` (all logits at once).

    Returns:
        The mean or sum, a scalar, or with "none" the losses, shaped as targets, 0 where ignored; float32 (float64 for
        float64). Where no token counts the mean is 0 and so are its gradients, where torch's cross_entropy gives nan:
        a batch of padding alone leaves training unharmed. Gradients flow once into hidden, weight and bias.

    Raises:
        ShapeError: a shape or device does not fit, or a target (on the CPU) is outside of the vocabulary; "cuda" makes
            its loss and gradients NaN.
        DTypeError: a dtype is not taken.
        ConfigError: an unknown reduction or backend, or a chunk_size below 1.

    Numerics: the products run in the dtype of weight, under autocast in autocast's; the softmax, the losses and the
    sums over chunks in float32 (float64 for float64).

    Source: the gradient (softmax - onehot) is taken chunk by chunk while the logits exist, as in Wijmans et al., "Cut
    Your Losses in Large-Vocabulary Language Models" (2024), section 4, but with the logits of a chunk held in memory.
    """
    check_linear_cross_entropy(hidden, weight, targets, bias, ignore_index, reduction, chunk_size)
    compute = compute_dtype(hidden, weight)
    facts = Facts(hidden.device.type, compute, transformed=transforms_active())
    rows = hidden.reshape(-1, hidden.shape[-1])

    def run(name: str) -> Tensor:
        if name == "cuda":
            from statescan.ops.cross_entropy.cuda import linear_cross_entropy as loss
        elif name == "torch":
            from statescan.ops.cross_entropy.torch_chunked import linear_cross_entropy as loss
        else:
            from statescan.ops.cross_entropy.reference import linear_cross_entropy as loss
        return loss(rows, weight, targets.reshape(-1), bias, ignore_index, reduction, chunk_size, compute)

    losses = attempt("linear_cross_entropy", backend, facts, run)
    return losses.reshape(targets.shape) if reduction == "none" else losses
