"""Bytes of a model's weights on one rank, from its geometry: what the modules of `gdnjax.models` hold; and an estimate
of the workspace beside them, for where there is no compiler.
"""

from gdnjax.cache_kinds import ITEMSIZE
from gdnjax.config import EngineConfig, MlpKind, ModelConfig
from gdnjax.config.checks import check_choice
from gdnjax.config.quantization import GRIDS, Quantization


def weight_bytes(
    model: ModelConfig,
    *,
    tp: int,
    dtype: str,
    mtp: bool = False,
    draft_head: bool = False,
    quantization: str | Quantization | None = None,
) -> int:
    """Bytes of all weights of one of `tp` ranks in `dtype`, with the MTP head if `mtp`, and with a copy of the head of
    one byte a number and a float32 scale for each token if `draft_head`.

    With `quantization`, a name of GRIDS or one of a single grid, all projections but those to the gates of heads are
    codes of one byte and float32 scales. Raises ValueError for another name.
    """
    rank = model.shard(tp)
    layers = rank.layers(mtp=mtp)
    width = rank.hidden_size
    size = rank.vocab_size * width * (1 if rank.tie_word_embeddings else 2) + width
    size += sum(rank.mixer(kind).num_weights(width) + _mlp(rank, mlp) + 2 * width for kind, mlp in layers)
    if mtp:
        # Two norms before the product of embedding and hidden state, and one at the end.
        size += 2 * width * width + 3 * width
    gates = sum(rank.mixer(kind).num_float32_weights for kind, _ in layers)
    if rank.moe is not None:
        gates += rank.moe.num_float32_weights * [mlp for _, mlp in layers].count(MlpKind.MOE)
    plain = size * ITEMSIZE[dtype] + gates * ITEMSIZE["float32"]
    if draft_head:
        plain += rank.vocab_size * (width + ITEMSIZE["float32"])
    if quantization is None:
        return plain
    if isinstance(quantization, str):
        check_choice("quantization", quantization, tuple(GRIDS))
        grid = GRIDS[quantization]
    else:
        (grid,) = quantization.grids
    projections = [projection for mixer, mlp in layers for projection in rank.projections(mixer, mlp)]
    codes = sum(projection.num_weights for projection in projections)
    scales = sum(projection.num_scales(grid, tp) for projection in projections)
    return plain - codes * (ITEMSIZE[dtype] - 1) + scales * ITEMSIZE["float32"]


def _mlp(rank: ModelConfig, kind: MlpKind) -> int:
    if kind is MlpKind.DENSE:
        return 3 * rank.hidden_size * rank.intermediate_size
    assert rank.moe is not None, "checked where the configuration is made"
    return rank.moe.num_weights(rank.hidden_size)


def workspace_estimate(model: ModelConfig, engine: EngineConfig, dtype: str) -> int:
    """Bytes of temporaries of the largest step on one rank, about: a little more than was compiled for an AMD GPU.

    A decode step holds its logits, with rejection those of the drafts too, and some rows beside them; a prefill step
    the activations of a layer, or a few copies of the logits of 64 positions.
    """
    rank, drafts = model.shard(engine.tensor_parallel_size), engine.num_speculative_tokens
    rows = 1 + drafts + (drafts if engine.draft_acceptance == "rejection" else 0)
    logits = 4 * rank.vocab_size
    decode = (engine.max_num_seqs * rows + max(64, engine.max_num_seqs * (1 + drafts) // 3)) * logits
    ffn = rank.intermediate_size
    if rank.moe is not None:
        ffn = max(ffn, rank.moe.experts_per_token * rank.moe.intermediate_size + rank.moe.shared_intermediate_size)
    width = 4 * rank.hidden_size + 2 * ffn + max(rank.mixer(kind).activation_width for kind in rank.layer_kinds)
    return max(decode, 4 * 64 * logits, engine.max_num_batched_tokens * width * ITEMSIZE[dtype])
