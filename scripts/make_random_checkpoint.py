"""Writes a checkpoint with random weights, so that everything can be tried without downloading a model."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import json
import math
import pathlib
from typing import Any

from gdnjax.cli.command import exit_status, prepare_environment, run_as_process
from gdnjax.config.quantization import BLOCK as SCALE_BLOCK
from gdnjax.config.quantization import WHOLE, read_quantization, without_quantization, write_quantization

DESCRIPTION = """\
Writes a complete, tiny Qwen3.5-style checkpoint with random weights: config.json, generation_config.json,
model.safetensors and a tokenizer trained on a few sentences. With --config it has the sizes of a published model, its
MTP head included, in as many layers as are asked for, and is written as fast as the disk takes it.

With --quantization projections are FP8 as published files have them: fp8, in blocks of 128 x 128, as Qwen's own; or
fp8_per_channel, with a scale for each row, as compressed-tensors' FP8_DYNAMIC. Experts are stored one by one then.

What it generates is noise. It is there to see that an installation works, to try the API, and to time the start.
"""

EXAMPLES = """\
examples:
  python scripts/make_random_checkpoint.py random-model
  python scripts/generate.py --model random-model -p "Hello"
  python scripts/make_random_checkpoint.py deeper --layers 24 --hidden-size 256    as many layers as a small real one
  python scripts/make_random_checkpoint.py big --config qwen3.5-9b --layers 4      four layers of a published model
  python scripts/make_random_checkpoint.py fp8 --config qwen3.5-9b-fp8 --layers 4  and of its FP8 file

Exit status: 0 done, 2 a bad argument (the reason is on stderr), 130 interrupted, 143 terminated.
"""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = SPECIAL_TOKENS.index("<|im_end|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

SENTENCES = (
    "The recurrent state is read once and written once in every step.",
    "One request has one slot, and one slot has one state.",
    "Three layers fold the past into a matrix; the fourth looks back at all of it.",
    "What the state forgets, attention may remember, and what attention cannot afford, the state keeps.",
    "A prompt is cut into chunks of sixty-four tokens, and the chunks are folded in order.",
    "def add(left, right):\n    return left + right\n",
    "Die Zustände werden einmal gelesen und einmal geschrieben. Ça va très bien. 你好，世界。",
)

HEAD_DIM = 32

LAYERS, HIDDEN_SIZE = 4, 64
"""Of the tiny model, where nobody says."""

BLOCK = (1 << 24) - 3
"""Random values of which large weights are repetitions. Odd, so that no two rows of a matrix are equal."""

SHARD_BYTES = 4 << 30

SCALES = {"fp8": ("_scale_inv", "bfloat16"), "fp8_per_channel": ("_scale", "float32")}
"""--quantization -> what the name of a scale ends in, and its dtype."""


def model_config(*, vocab_size: int, layers: int, hidden_size: int, dtype: str) -> dict[str, Any]:
    """config.json of a dense text model: every fourth layer is full attention, as in the published ones."""
    heads = hidden_size // HEAD_DIM
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": HEAD_DIM,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": END_OF_TURN,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }


def write_tokenizer(directory: pathlib.Path) -> int:
    """Trains a byte-level tokenizer on SENTENCES, writes its files, and returns its number of tokens."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[END_OF_TURN],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size()


def write_weights(directory: pathlib.Path, config: dict[str, Any], seed: int, quantization: str | None) -> list[str]:
    """Writes model.safetensors: gdnjax's own random parameters under the checkpoint's names. Returns the linear modules
    that are not codes.
    """
    import jax
    import numpy as np

    from gdnjax import ModelConfig, abstract_params, random_params, sharding
    from gdnjax.checkpoint.coded import usual_formats
    from gdnjax.checkpoint.fp8_dynamic import modules_left_alone
    from gdnjax.checkpoint.huggingface import write_file

    # Not under jit, which would compile every layer anew; and this generator compiles fastest.
    key = jax.random.key(seed, impl="unsafe_rbg")
    model = ModelConfig.from_hf(config)
    coded = usual_formats(abstract_params(model, 1, config["dtype"]), 1, quantization) if quantization else {}
    suffix, scale_dtype = SCALES[quantization] if quantization else ("", "")
    params = random_params(model, 1, config["dtype"], key, coded=coded)
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, part = sharding.path_name(path), np.asarray(leaf)
        name = name if name.startswith("lm_head.") else f"model.{name}"
        if name.endswith(".scale"):
            name, part = name.removesuffix(".scale") + suffix, part.astype(scale_dtype)
        tensors[name.removesuffix(".codes")] = part
    write_file(tensors, directory / "model.safetensors")
    codes = [name for name in tensors if name + suffix in tensors] if quantization else []
    return modules_left_alone({name: tensor.shape for name, tensor in tensors.items()}, codes)


def published_config(name: str, layers: int | None) -> dict[str, Any]:
    """config.json of a preset, or of the file or directory of that name, with its first `layers` layers."""
    from gdnjax.assets import config_file

    config = json.loads(config_file(name).read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    if layers is not None:
        if layers > text["num_hidden_layers"]:
            raise ValueError(f"{name} has {text['num_hidden_layers']} layers, got {layers}")
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][:layers]
    return config


def stored_quantization(config: dict[str, Any]) -> str | None:
    """Which of SCALES a config.json says, or None. Raises ValueError for another."""
    found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not found:
        return None
    stored = read_quantization(found)
    ways = {("fp8", (SCALE_BLOCK,)): "fp8", ("compressed-tensors", ((1, WHOLE),)): "fp8_per_channel"}
    if stored.codes != "float8_e4m3fn" or (stored.method, stored.grids) not in ways:
        raise ValueError(
            f"weights as its quantization_config ({stored.method}) has them are not written; allowed: --quantization "
            f"{' or '.join(SCALES)}"
        )
    return ways[stored.method, stored.grids]


class RepeatedValues:
    """A `TensorSource` of random tensors of a model's shapes, its MTP head included: repetitions of one block."""

    def __init__(self, config: dict[str, Any], seed: int, quantization: str | None = None):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from gdnjax import ModelConfig, sharding
        from gdnjax.checkpoint import coded
        from gdnjax.checkpoint.fp8_dynamic import modules_left_alone
        from gdnjax.checkpoint.mapping import origin_of
        from gdnjax.checkpoint.names import stored_name
        from gdnjax.models import abstract_params

        model = ModelConfig.from_hf(config)
        params = abstract_params(model, 1, model.dtype, mtp=model.mtp_layers > 0)
        self._tensors: dict[str, jax.ShapeDtypeStruct] = {}
        leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
        origins = {
            name: origin_of(name, leaf.shape, model, 1, experts_apart=quantization is not None)
            for name, leaf in leaves.items()
        }
        of_modules = coded.tensors_of(origins, coded.usual_formats(params, 1, quantization) if quantization else ())
        codes = []
        for name, origin in origins.items():
            for part in origin.parts:
                stored = stored_name(part.tensor, model.mtp_layer_names)
                stored = stored if stored.startswith(("lm_head.", "mtp.")) else f"model.{stored}"
                self._tensors[stored] = jax.ShapeDtypeStruct(part.shape, leaves[name].dtype)
                # Published in blocks, too, though it is absorbed and never held as codes.
                if part.tensor in of_modules or (quantization == "fp8" and ".kv_b_proj." in part.tensor):
                    codes.append(stored)
        self.left_alone = modules_left_alone({name: tensor.shape for name, tensor in self._tensors.items()}, codes)
        random = np.random.default_rng(seed)
        self._block = random.standard_normal(BLOCK, np.float32) * np.float32(0.02)
        self._cast: dict[Any, Any] = {}
        self._scale = np.zeros(0)
        if quantization is None:
            return
        largest = np.abs(self._block).max() / np.float32(448)
        self._scale = random.uniform(0.7, 1.3, 1021).astype(np.float32) * largest
        self._cast[np.dtype(jnp.float8_e4m3fn)] = (self._block / largest).astype(jnp.float8_e4m3fn)
        suffix, scale_dtype = SCALES[quantization]
        for name in dict.fromkeys(codes):
            rows, columns = self._tensors[name].shape
            shape = (-(-rows // 128), -(-columns // 128)) if quantization == "fp8" else (rows, 1)
            self._tensors[name] = jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn)
            self._tensors[name + suffix] = jax.ShapeDtypeStruct(shape, scale_dtype)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> Any:
        import numpy as np

        tensor = self._tensors[name]
        if name.endswith(("_scale", "_scale_inv")):
            return np.resize(self._scale, tensor.shape).astype(tensor.dtype)[index]
        if tensor.dtype not in self._cast:
            self._cast[tensor.dtype] = self._block.astype(tensor.dtype)
        # Cut first: np.resize copies all that it is given, and what it returns would keep that alive.
        values = self._cast[tensor.dtype][: math.prod(tensor.shape)]
        return np.resize(values, tensor.shape)[index]

    def __enter__(self) -> "RepeatedValues":
        return self

    def __exit__(self, *exception: object) -> None:
        self._cast.clear()


def write_checkpoint(
    directory: pathlib.Path,
    *,
    config: str | None = None,
    layers: int | None = None,
    hidden_size: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    quantization: str | None = None,
) -> None:
    """Writes the whole checkpoint into a new or empty directory: of the sizes of `config`, or a tiny one. Weights are
    stored as `quantization`, a name of SCALES, or else the quantization_config of `config` says.

    Host memory holds a shard of SHARD_BYTES, or the largest tensor.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: exists and is not an empty directory; name a new one or empty it")
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, got {seed}")
    if layers is not None and layers < 1:
        raise ValueError(f"a model needs at least 1 layer, got {layers}")
    if config is not None:
        if hidden_size is not None or dtype is not None:
            raise ValueError("--config says sizes and dtype; --hidden-size and --dtype are for the tiny model")
        content = published_config(config, layers)
        quantization = quantization or stored_quantization(content)
        content = without_quantization(content)
    hidden_size = HIDDEN_SIZE if hidden_size is None else hidden_size
    if hidden_size < 2 * HEAD_DIM or hidden_size % HEAD_DIM:
        raise ValueError(
            f"a hidden size must be a multiple of {HEAD_DIM} and at least {2 * HEAD_DIM}, got {hidden_size}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(directory)
    if config is not None:
        from gdnjax.checkpoint.huggingface import write_safetensors

        values = RepeatedValues(content, seed, quantization)
        write_safetensors(values, directory, shard_bytes=SHARD_BYTES, progress=True)
        left_alone = values.left_alone
    else:
        content = model_config(
            vocab_size=vocab_size, layers=layers or LAYERS, hidden_size=hidden_size, dtype=dtype or "float32"
        )
        left_alone = write_weights(directory, content, seed, quantization)
    if quantization is not None:
        content["quantization_config"] = write_quantization(quantization, left_alone)
    # What the published models recommend, so that a run without sampling flags takes the same steps as with them.
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20, "eos_token_id": END_OF_TURN}
    _write_json(directory / "generation_config.json", sampling)
    # Last, so that an interrupted run leaves nothing that passes for a checkpoint.
    _write_json(directory / "config.json", content)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path, help="a directory to create; one that exists must be empty")
    parser.add_argument("--config", metavar="NAME|PATH", help="sizes of a preset or a config.json (default: tiny ones)")
    parser.add_argument("--layers", type=int, help=f"decoder layers (default: {LAYERS}, or those of --config)")
    parser.add_argument("--hidden-size", type=int, help=f"a multiple of {HEAD_DIM} (default: {HIDDEN_SIZE})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, or that of --config")
    parser.add_argument(
        "--quantization", choices=tuple(SCALES), help="store projections as FP8 (default: as --config says, or not)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return exit_status("make_random_checkpoint.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    prepare_environment()
    write_checkpoint(**vars(arguments))
    print(f"wrote {arguments.directory}: random weights; what they generate is noise")
    return 0


if __name__ == "__main__":
    import jax

    # Little is computed here; an accelerator would only be taken from those who need it.
    jax.config.update("jax_platforms", "cpu")
    run_as_process(main)
