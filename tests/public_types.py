# pyright: strict
# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Every public name as a user's strict type checker sees it. For pyright alone: nothing here is ever run."""

import asyncio

import jax

import gdnjax
from gdnjax import (
    LLM,
    AsyncLLM,
    BatchOutput,
    CompletionOutput,
    EngineConfig,
    LayerKind,
    Logprob,
    ModelConfig,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StreamOutput,
    StructuredOutputsParams,
    abstract_params,
    batch_generate,
    build_model,
    draft_logits,
    follow,
    follow_model,
    full_logits,
    load_model,
    random_params,
)

# A name that there is not is an error here, though the package finds names at their first use.
assert gdnjax.no_such_name  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

config = EngineConfig(max_num_seqs=4, decode_buckets=(4,))
params = SamplingParams(temperature=0.0, logit_bias={3: 1.0}, structured_outputs=StructuredOutputsParams(regex="a+"))
with LLM("tiny", config) as llm:
    outputs = llm.generate(["a", "b"], params)
    one: RequestOutput = outputs[0]
    sample: CompletionOutput = one.outputs[0]
    metrics: RequestMetrics | None = one.metrics
    entries = sample.logprobs
    if entries is not None:
        entry: Logprob = entries[0][sample.token_ids[0]]
        print(entry.logprob, entry.rank, entry.decoded_token)
    for piece in llm.stream("a", params):
        print(piece.text, piece.token_ids, piece.finish_reason)
    (answer,) = llm.chat([{"role": "user", "content": "x"}], params)
    group = llm.submit("a", params, priority=1, timeout=2.0)
    while llm.step():
        pass
    print(group.output().outputs[0].text, answer, metrics)
    llm.update_weights(llm.params)
    tokenizer = llm.tokenizer
    if tokenizer is not None:
        ends: tuple[int, ...] = tokenizer.eos_token_ids
        print(ends, tokenizer.added_token_ids["<think>"] in tokenizer.special_token_ids)
    print(llm.max_model_len, llm.config.max_num_seqs, llm.memory_plan.num_blocks, llm.mesh.size, llm.eos_token_ids)
    llm.save_state("x")
    restored = llm.restore("x")
    print(restored[0].finished, llm.stats()["num_running"], llm.default_sampling_params(max_tokens=3).max_tokens)
    llm.reset_prefix_cache()
    llm.abort(group)


async def main() -> None:
    async with AsyncLLM("tiny", config) as asynchronous:
        stream = asynchronous.generate("a", params)
        async for piece in stream:
            part: StreamOutput = piece
            print(part.text)
        print(await asynchronous.abort("x"), await asynchronous.stats())


asyncio.run(main())
model_config = ModelConfig.from_hf("x")
print(model_config.layer_kinds[0] is LayerKind.DELTA, model_config.vocab_size)
model, weights = load_model("tiny")
other = build_model(model_config, "float32")
shapes = abstract_params(model_config, 1, "float32")
made = random_params(model_config, 1, "float32", jax.random.key(0))


def score(tokens: jax.Array) -> None:
    found: BatchOutput = batch_generate(model, weights, tokens, None, jax.random.key(0), max_new_tokens=4)
    logits = full_logits(model, weights, tokens[0])
    target, drafts = draft_logits(model, weights, tokens[0], 2)
    print(found.tokens, found.lengths, logits.shape, target.shape, drafts.shape, shapes, made, other)


follow("x")
follow_model(lambda settings: (model, weights))
