"""Faults of one line each, over the whole engine: the short run of the tests has to notice every one of them.

`scripts/check_tests.py` puts them in, one at a time. They are not the tests' to know: nothing else imports this.
"""

import dataclasses

_SERVING, _KERNELS = "gdnjax/serving", "gdnjax/pallas_kernels"


@dataclasses.dataclass(frozen=True)
class LineFault:
    """What a programmer might have got wrong.

    name   what goes wrong.
    file   of the package.
    line   a part of one of its lines, which it has once.
    wrong  what takes its place.
    near   what is run first, the file that should notice or a test of it; then all short tests are.
    """

    name: str
    file: str
    line: str
    wrong: str
    near: str


LINE_FAULTS = (
    # Scheduler.
    LineFault(
        "a whole prompt may come from the cache",
        f"{_SERVING}/scheduler.py",
        "return request.num_tokens - 1",
        "return request.num_tokens",
        "tests/serving/test_scheduler.py",
    ),
    LineFault(
        "a state is forked while it is being computed",
        f"{_SERVING}/scheduler.py",
        "if match.pending:",
        "if match.pending and False:",
        "tests/serving/test_scheduler.py",
    ),
    LineFault(
        "prefill goes on behind the cached blocks, not behind the state",
        f"{_SERVING}/scheduler.py",
        "request.num_settled = request.num_folded = match.position",
        "request.num_settled = request.num_folded = match.seen",
        "tests/serving/test_scheduler.py",
    ),
    LineFault(
        "the first of all is preempted, not the last",
        f"{_SERVING}/scheduler.py",
        "self.preempt(self.running[-1])",
        "self.preempt(self.running[0])",
        "tests/serving/test_scheduler.py",
    ),
    LineFault(
        "what is to be folded of a speculating step is said to be",
        f"{_SERVING}/scheduler.py",
        "request.num_folded = request.num_settled if speculates else request.num_settled + count",
        "request.num_folded = request.num_settled + count",
        "tests/serving/test_scheduler.py",
    ),
    LineFault(
        "the device is told of one block too few",
        f"{_SERVING}/scheduler.py",
        "growth[row] = [Growth(i, request.blocks[i]) for i in range(request.num_placed, len(request.blocks))]",
        "growth[row] = [Growth(i, request.blocks[i]) for i in range(request.num_placed + 1, len(request.blocks))]",
        "tests/serving/test_scheduler.py",
    ),
    # Prefix cache.
    LineFault(
        "a tail matches by its first token",
        f"{_SERVING}/prefix_cache.py",
        "if rest[: len(key)] == key]",
        "if rest[:1] == key[:1]]",
        "tests/serving/test_prefix_cache.py",
    ),
    LineFault(
        "the upper part of a node that is split is nobody's",
        f"{_SERVING}/prefix_cache.py",
        "locks=node.locks,",
        "locks=0,",
        "tests/serving/test_prefix_cache.py",
    ),
    LineFault(
        "a checkpoint that the turn reads is given up",
        f"{_SERVING}/prefix_cache.py",
        "if slot not in self._busy:",
        "if True:",
        "tests/serving/test_prefix_cache.py",
    ),
    LineFault(
        "blocks may be evicted under somebody who shares them",
        f"{_SERVING}/prefix_cache.py",
        "            node.locks -= 1",
        "            node.locks = 0",
        "tests/serving/test_prefix_cache.py",
    ),
    LineFault(
        "a node that was shortened says that it ends where it did",
        f"{_SERVING}/prefix_cache.py",
        "node.end -= count * self.block_size",
        "node.end -= 0 * self.block_size",
        "tests/serving/test_prefix_cache.py",
    ),
    # Steps and their contexts.
    LineFault(
        "a request that has ended goes on",
        "gdnjax/step.py",
        "active = (slot != NULL_SLOT) & ~state.slots.done[slot]",
        "active = slot != NULL_SLOT",
        "tests/test_forks.py::test_done_rows_write_no_hidden_state",
    ),
    LineFault(
        "drafts may come to the end of the context",
        "gdnjax/step.py",
        "return state.slots.max_length[slot] - 2 - length",
        "return state.slots.max_length[slot] - 1 - length",
        "tests/serving/test_speculation_ledger.py::test_no_query_comes_to_the_end_of_the_context",
    ),
    LineFault(
        "a checkpoint takes as many rows as are pending behind it",
        "gdnjax/step.py",
        "count = batch.position - (length - pending)",
        "count = jnp.minimum(pending, batch.position - (length - pending) + 1)",
        "tests/test_forks.py::test_state_is_sealed_at_every_position_of_its_pending_rows",
    ),
    LineFault(
        "a row of a decode step is said to be stored as prefill stores it",
        "gdnjax/step.py",
        "write, layout = context.write_slot, layout_of(options.state_layout, LAYOUT_VK)",
        "write, layout = context.write_slot, layout_of(options.state_layout, LAYOUT_KV)",
        "tests/test_forks.py::test_sealed_decode_serves_forks",
    ),
    LineFault(
        "a fresh row reads what its slot holds",
        "gdnjax/models/context.py",
        "fresh=before == 0,",
        "fresh=before < 0,",
        "tests/test_forks.py::test_checkpoint_is_what_the_piece_that_ends_there_leaves",
    ),
    LineFault(
        "blocks that are shared are written again",
        "gdnjax/models/context.py",
        "stored &= position >= batch.kv_start[batch.token_row]",
        "stored &= position >= 0",
        "tests/test_forks.py::test_fork_from_before_its_cached_blocks_leaves_those_as_they_are",
    ),
    # Sampling and speculation.
    LineFault(
        "a repetition is made more likely",
        "gdnjax/sampling.py",
        "jnp.where(logits > 0, logits / repetition, logits * repetition)",
        "jnp.where(logits > 0, logits * repetition, logits / repetition)",
        "tests/test_sampling.py",
    ),
    LineFault(
        "top_p is a part of the largest mass, not of the sum",
        "gdnjax/sampling.py",
        "wanted = top_p * sharding.psum(mass.sum(-1), vocab.tp)",
        "wanted = top_p * sharding.psum(mass.max(-1), vocab.tp)",
        "tests/test_sampling.py",
    ),
    LineFault(
        "a rank in the vocabulary counts the token itself",
        "gdnjax/sampling.py",
        "above = sharding.psum(jnp.sum(logits > value[:, None], axis=-1), vocab.tp)",
        "above = sharding.psum(jnp.sum(logits >= value[:, None], axis=-1), vocab.tp)",
        "tests/test_sampling.py",
    ),
    LineFault(
        "a draft that nobody has checked is kept",
        "gdnjax/speculative.py",
        "keep &= jnp.arange(keep.shape[1]) < valid[:, None]",
        "keep &= jnp.arange(keep.shape[1]) <= valid[:, None]",
        "tests/test_speculative.py",
    ),
    LineFault(
        "a draft is kept the more, the less likely it is",
        "gdnjax/speculative.py",
        "lucky = jnp.log(chance) < log_p - log_q",
        "lucky = jnp.log(chance) < log_q - log_p",
        "tests/test_speculative.py",
    ),
    # Kernels.
    LineFault(
        "a row that is not pending is folded",
        f"{_KERNELS}/gated_delta_rule/recurrent.py",
        "pending = [] if count_ref is None else [j < count_ref[row] for j in range(rows - new)]",
        "pending = [] if count_ref is None else [j <= count_ref[row] for j in range(rows - new)]",
        f"tests/{_KERNELS[7:]}/test_pending_rows.py::test_delta_rule_of_verified_rows_equals_the_recurrence",
    ),
    LineFault(
        "the output of a row is without its own key",
        f"{_KERNELS}/gated_delta_rule/recurrent.py",
        "inside(keep, q)) + written * jnp.sum(k * q))",
        "inside(keep, q)))",
        f"tests/{_KERNELS[7:]}/test_gated_delta_rule.py::test_decode_equals_the_recurrence",
    ),
    LineFault(
        "a query sees the key behind it",
        f"{_KERNELS}/paged_attention/softmax.py",
        "scores = jnp.where(there[None, :] & (key[None, :] <= position[:, None]), scores, -jnp.inf)",
        "scores = jnp.where(there[None, :] & (key[None, :] <= position[:, None] + 1), scores, -jnp.inf)",
        f"tests/{_KERNELS[7:]}/test_paged_attention.py::test_prefill_tiles_are_causal",
    ),
    LineFault(
        "a window forgets what stood in it before a short piece",
        f"{_KERNELS}/causal_conv1d/kernels.py",
        "from_window = plgpu.load(window_ref.at[row, offset + width, channel], mask=there & (offset < 0), other=0)",
        "from_window = plgpu.load(window_ref.at[row, offset + width, channel], mask=there & (offset < -1), other=0)",
        f"tests/{_KERNELS[7:]}/test_windows.py::test_pieces_and_steps_equal_one_pass",
    ),
    LineFault(
        "ranks draw by the same noise",
        f"{_KERNELS}/gumbel_argmax/kernels.py",
        "_threefry(key, (token + first_ref[0]).astype(jnp.uint32)",
        "_threefry(key, token.astype(jnp.uint32)",
        f"tests/{_KERNELS[7:]}/test_gumbel_argmax.py::test_the_best_of_logits_over_temperature_and_noise",
    ),
    # Texts and the server.
    LineFault(
        "the beginning of a stop string is lost where it is none",
        f"{_SERVING}/detokenizer.py",
        "released += self._begun_stop",
        'released += ""',
        "tests/serving/test_detokenizer.py",
    ),
    LineFault(
        "the end of thinking is seen past the budget",
        f"{_SERVING}/server/budget.py",
        "elif token == self._close and count - self._start <= self._budget:",
        "elif token == self._close:",
        "tests/serving/server/test_budget.py",
    ),
    LineFault(
        "who leaves keeps the room that he had",
        f"{_SERVING}/server/service.py",
        "            del self._runs[run]",
        "            pass",
        "tests/serving/server/test_leaving.py",
    ),
    LineFault(
        "a key may be the beginning of another",
        f"{_SERVING}/server/guards.py",
        "hmac.compare_digest(given, key) for key",
        "key.startswith(given) for key",
        "tests/serving/server/test_errors.py::test_keys_are_wanted_but_for_probes",
    ),
    LineFault(
        "an answer that is cut off is one that ended",
        f"{_SERVING}/server/service.py",
        'if piece.finish_reason != "abort":',
        'if piece.finish_reason != "aborted":',
        "tests/serving/server/test_leaving.py",
    ),
)
