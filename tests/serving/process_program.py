"""One of two processes that share a small model: `process_program.py JOB PORT ID DIRECTORY`. Process 0 prints JSON."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from gdnjax import (
    LLM,
    EngineConfig,
    SamplingParams,
    StructuredOutputsParams,
    abstract_params,
    build_model,
    distributed,
    follow_model,
    sharding,
)
from gdnjax.config import MlpKind
from gdnjax.models import partition
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with
from tests.micro import MICRO, A, D
from tests.serving.structures import tokenizer_of

DEVICES, PROCESSES = 4, 2

MODEL = {"layer_kinds": (D, A), "mlp_kinds": (MlpKind.MOE, MlpKind.DENSE)}
CONFIG = EngineConfig(
    tensor_parallel_size=DEVICES, max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
    decode_buckets=(4,), num_kv_blocks=64, max_model_len=256, max_logprobs=2, warmup=False,
)  # fmt: skip
PROMPTS = [np.random.default_rng(i).integers(0, MICRO.vocab_size, 30 + i).tolist() for i in range(3)]
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=8, logprobs=2),
    SamplingParams(temperature=0.8, top_k=9, seed=3, max_tokens=8, logit_bias={5: 2.0}),
    SamplingParams(
        temperature=1.0,
        repetition_penalty=1.2,
        seed=4,
        max_tokens=8,
        logprobs=1,
        structured_outputs=StructuredOutputsParams(regex="[0-9]{2,}"),
    ),
]


def model_and_params(_: EngineConfig | None = None, *, hidden_size: int = MICRO.hidden_size):
    """The model of all ranks, and its parameters, of which a process makes its own part."""
    config = dataclasses.replace(MICRO, mtp_layers=0, hidden_size=hidden_size, **MODEL)
    abstract = abstract_params(config, DEVICES, "float32")
    shardings = partition.shardings_of(abstract, sharding.make_mesh(DEVICES))
    rng = np.random.default_rng(0)

    def made(leaf, place):
        values = rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, place, values.__getitem__)

    return build_model(config, "float32", DEVICES), jax.tree.map(made, abstract, shardings)


def generate(llm: LLM) -> list[list[int]]:
    """The tokens of all requests."""
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, SAMPLING, use_tqdm=False)]


def engine() -> LLM:
    return LLM.from_model(*model_and_params(), CONFIG, max_model_len=256, tokenizer=tokenizer_of())


def serve(again: bool) -> None:
    """Tokens; tokens after a turn that was cut off behind a step that all have taken; and steps without end, of the
    same engine or, `again`, of a second one.
    """
    with engine() as llm:
        say(generate(llm))
        runner = llm.engine.runner
        whole, calls = runner._run, []

        def cut_off(call):
            result = whole(call)
            calls.append(call.step)
            if calls.count("decode") == 3:
                raise KeyboardInterrupt
            return result

        runner._run = cut_off
        try:
            generate(llm)
        except KeyboardInterrupt:
            say(calls)
        runner._run = whole
        say(generate(llm))
        for refused in (engine, lambda: llm.save_state("nowhere"), lambda: llm.restore("nowhere")):
            try:
                refused()
            except RuntimeError as error:
                say(str(error))
        if not again:
            run_on(llm)
    with engine() as llm:
        llm.generate(PROMPTS, SAMPLING, use_tqdm=False)
        run_on(llm)


def run_on(llm: LLM) -> None:
    """Steps without end."""
    say("running")
    while True:
        llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, logprobs=1))


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def main(job: str, port: str, process: int, cache: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process, timeout=60)
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR):
        run(job, process)


def run(job: str, process: int) -> None:
    if process == 0:
        if job.startswith("serve"):
            serve(job == "serve again")
        else:
            with engine() as llm:
                run_on(llm)
    elif job == "other":
        follow_model(functools.partial(model_and_params, hidden_size=64))
    else:
        try:
            LLM.from_model(*model_and_params(), CONFIG, max_model_len=256)
        except RuntimeError as error:
            print(error, file=sys.stderr)
        while follow_model(model_and_params):
            pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
