"""The names of a checkpoint: what belongs to the language model, and what is skipped knowingly."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from gdnjax.checkpoint.sources import abbreviate
from gdnjax.config import LayerKind, ModelConfig

# The language model's tensors, under each prefix that is published; the group is the name that the modules use.
LANGUAGE = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
    r"((?:embed_tokens|layers|norm|lm_head)\..+)"
)
VISION = re.compile(r"(?:model\.)?visual\..+")
MTP = re.compile(r"mtp\..+")

# An embedding or a head that the MTP head has for itself, in the spellings of the families that do so.
MTP_TABLES = re.compile(r"mtp\.(?:.+\.)?(?:embed_tokens|lm_head|shared_head)\..+")

# Where a head is stored as a layer behind the last one: what the modules call what such a layer has beside a decoder
# layer's own. The embedding and the head are there as copies of the target's.
MTP_LAYER = {
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj.weight": "mtp.fc.weight",
    "shared_head.norm.weight": "mtp.norm.weight",
}
MTP_COPIES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}

LM_HEAD = "lm_head.weight"

# model_type -> what its checkpoints call things, and what the modules do, in this order. `{delta}` stands for the
# numbers of the layers of the delta rule.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_linear": (
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        (r"^(layers\.{delta})\.self_attn\.", r"\1.linear_attn."),
        (r"\.linear_attn\.(f_[ab]_proj\.|A_log|dt_bias)", r".linear_attn.forget_gate.\1"),
        (r"\.linear_attn\.b_proj\.", ".linear_attn.in_proj_b."),
        (r"\.linear_attn\.o_norm\.", ".linear_attn.norm."),
        (r"\.linear_attn\.o_proj\.", ".linear_attn.out_proj."),
    ),
    # Its norms in the spelling of the library that trained it, which transformers writes.
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The tensors of a checkpoint, sorted by what they are for.

    language    module name -> checkpoint name, for the language model, and for its MTP head where that is wanted
    vision      the vision tower, which the engine does not run
    mtp         the multi-token-prediction head where it is not wanted
    mtp_tables  an embedding or a head of the MTP head's own, where it is wanted: the engine has no place for them
    copies      checkpoint name -> module name, for what a head that is stored as a layer repeats of the target
    tied        a stored lm_head of a model whose lm_head is its embedding
    unknown     everything else
    """

    language: dict[str, str]
    vision: tuple[str, ...]
    mtp: tuple[str, ...]
    mtp_tables: tuple[str, ...]
    copies: dict[str, str]
    tied: tuple[str, ...]
    unknown: tuple[str, ...]


def sort_names(
    names: Iterable[str],
    *,
    tied_lm_head: bool,
    mtp_wanted: bool = False,
    mtp_layers: range | None = None,
    rename: Callable[[str], str] = str,
) -> Names:
    """Sorts the tensors of a checkpoint. Raises ValueError where two of them are the same tensor of the model.

    `rename`: from the checkpoint's name, without its prefix, to the modules'; see `renaming`.

    `mtp_wanted`: the MTP head is a part of the model; its modules have the checkpoint's own names, but for a head that
    is stored as the layers `mtp_layers`.
    """
    language: dict[str, str] = {}
    copies: dict[str, str] = {}
    vision, mtp, mtp_tables, tied, unknown, clashes = [], [], [], [], [], []
    for name in names:
        match = LANGUAGE.fullmatch(name)
        if VISION.fullmatch(name):
            vision.append(name)
        elif MTP.fullmatch(name):
            if not mtp_wanted:
                mtp.append(name)
            elif MTP_TABLES.fullmatch(name):
                mtp_tables.append(name)
            else:
                language[name] = name
        elif match is not None and (of_head := _name_in_head(match[1], mtp_layers)) is not None:
            if not mtp_wanted:
                mtp.append(name)
            elif of_head in MTP_COPIES:
                copies[name] = "embed_tokens.weight" if tied_lm_head else MTP_COPIES[of_head]
            else:
                language[MTP_LAYER.get(of_head, f"mtp.layers.0.{of_head}")] = name
        elif match is None:
            unknown.append(name)
        elif tied_lm_head and match[1] == LM_HEAD:
            tied.append(name)
        elif (module := rename(match[1])) in language:
            clashes.append(f"{language[module]} and {name}")
        else:
            language[module] = name
    if clashes:
        raise ValueError(f"tensors that name one parameter twice: {abbreviate(clashes)}")
    return Names(
        language=language,
        vision=tuple(vision),
        mtp=tuple(mtp),
        mtp_tables=tuple(mtp_tables),
        copies=copies,
        tied=tuple(tied),
        unknown=tuple(unknown),
    )


def renaming(cfg: ModelConfig) -> Callable[[str], str]:
    """From what a family's checkpoints call a tensor of the language model to what the modules do."""
    numbers = "|".join(str(i) for i, kind in enumerate(cfg.layer_kinds) if kind is LayerKind.DELTA)
    table = [
        (re.compile(pattern.replace("{delta}", f"(?:{numbers})")), new)
        for pattern, new in RENAMED.get(cfg.model_type, ())
    ]

    def rename(name: str) -> str:
        for pattern, new in table:
            name = pattern.sub(new, name)
        return name

    return rename


def stored_name(name: str, mtp_layers: range | None) -> str:
    """A module name as a checkpoint has it behind its prefix: another one for a head that is stored as a layer."""
    if mtp_layers is None or not name.startswith("mtp."):
        return name
    around = {module: rest for rest, module in MTP_LAYER.items()}
    return f"layers.{mtp_layers.start}.{around.get(name, name.removeprefix('mtp.layers.0.'))}"


def _name_in_head(name: str, mtp_layers: range | None) -> str | None:
    """The rest of a module name behind the number of a layer, where that is one of the MTP head's."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return match[2] if match and mtp_layers and int(match[1]) in mtp_layers else None
