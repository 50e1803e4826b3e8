"""The engine as a model of lm-eval: registered as "gdnjax" when this module is imported."""

import dataclasses
import logging
from typing import Any

# lm-eval is an extra of its own, which the checks of this repository run without.
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from gdnjax import LLM, RequestOutput, SamplingParams

log = logging.getLogger("gdnjax")


@register_model("gdnjax")
class GdnjaxLM(TemplateLM):
    """An LLM behind lm-eval's interface.

    model            a checkpoint directory, or "tiny".
    max_gen_toks     most tokens of a completion where a task does not say.
    enable_thinking  given to the chat template where it is not None.
    options          EngineConfig's fields (max_num_seqs, dtype, max_model_len, ...) and `tokenizer`.

    lm-eval also passes batch_size, max_batch_size and device, of which it has defaults of its own (1, cuda:0). They are
    ignored: the engine batches by itself (max_num_seqs), and JAX chooses the device.
    """

    def __init__(
        self,
        model: str,
        max_gen_toks: int = 256,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        options = {"max_num_seqs": 32, "warmup": False} | options
        self.llm = LLM(str(model), **options)
        if self.llm.tokenizer is None:
            raise ValueError(f"{model}: lm-eval works with texts, and this checkpoint has no tokenizer")
        self._encode = self.llm.tokenizer.encode
        self.tokenizer = self.llm.tokenizer.hf
        self.max_gen_toks = int(max_gen_toks)
        self._template_options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its output."""
        return self.llm.max_model_len

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.llm.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is made of: the beginning of a text where the tokenizer has one, or else its end."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's request cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. One that begins with the tokenizer's BOS, as chat templates write it, gets no other."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self._encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. Without a generation prompt the last message is left open, to be continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_options,
        )

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Completions of (context, generation options), up to a stop string, greedy unless the options sample."""
        prompts, params = [], []
        for context, options in (request.args for request in requests):
            sampling = self._sampling(options)
            prompts.append(self._fit(self.tok_encode(context), sampling.max_tokens or self.max_gen_toks))
            params.append(sampling)
        outputs = self._generate(prompts, params, disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the engine's length allows."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                # A window brings its context token, and the engine needs room for an output token.
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            found = [(("", ""), *make_disjoint_window(piece)) for piece in pieces]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of (texts, context, continuation)."""
        # The log-probabilities of the prompt are what is wanted; the one output token is thrown away.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        prompts = [self._fit([*context, *continuation], 1) for _, context, continuation in requests]
        results = []
        outputs = self._generate(prompts, [params] * len(prompts), disable_tqdm)
        for (texts, _, continuation), output in zip(requests, outputs, strict=True):
            assert output.prompt_logprobs is not None
            split = len(output.prompt_token_ids) - len(continuation)
            if split < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens leaves no context in a length of {self.max_length}; "
                    "allow more with max_model_len"
                )
            pairs = zip(continuation, output.prompt_logprobs[split:], strict=True)
            entries = [entry[token] for token, entry in pairs if entry is not None]
            results.append((sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
            # Windows of a rolling text have no texts of their own; lm-eval keeps those under another key.
            if texts != ("", ""):
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _sampling(self, options: dict[str, Any]) -> SamplingParams:
        """lm-eval's generation options as SamplingParams. Raises ValueError for one that the engine does not know."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, default_max_gen_toks=self.max_gen_toks))
        max_tokens, until = given.pop("max_gen_toks"), given.pop("until")
        given.setdefault("temperature", 1.0 if given.pop("do_sample") else 0.0)
        known = {field.name for field in dataclasses.fields(SamplingParams)} - {"n", "stop", "max_tokens"}
        unknown = sorted(set(given) - known - {"do_sample"})
        if unknown:
            raise ValueError(f"unknown generation options: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        given.pop("do_sample", None)
        # As lm-eval's other models do, special tokens stay in the text: tasks stop at <|im_end|> and the like.
        given = {"skip_special_tokens": False} | given
        return SamplingParams(max_tokens=max_tokens, stop=[text for text in until if text] or None, **given)

    def _fit(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The end of a prompt that leaves room for its output, as lm-eval's other models cut it."""
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(f"{max_tokens} output tokens leave no room in max_model_len={self.max_length}")
        if len(token_ids) > room:
            log.warning(
                "a prompt of %d tokens is cut to its last %d; allow more with max_model_len", len(token_ids), room
            )
        return token_ids[-room:]

    def _generate(self, prompts: list, params: list[SamplingParams], disable_tqdm: bool) -> list[RequestOutput]:
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(texts, params, use_tqdm=not disable_tqdm)
