"""What measures the small model measures what it says, the model is as good as it must be, and its card is true."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import measure_tiny
import numpy as np
import pytest
from measuring import documents, faults, half_lives, recall, tables
from measuring.drafts import Drafter, acceptance, overlap
from measuring.faults import INTACT, MISSING_RESET
from measuring.forcing import Feeder, Piece

from gdnjax import ModelConfig
from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.loading import load_model
from gdnjax.models import build_model, random_params

ROOT = pathlib.Path(__file__).parents[2]
TINY = model_directory(EMBEDDED_MODEL)
CARD = TINY / "README.md"
STORED = TINY / "measurements.json"
ROWS, LONGEST, TOKENS = 20, 448, 1024
MOST = 128
PICTURE_BYTES = 60_000

STATE_FAULTS = ("all states zeroed", "stale layout bit", "wrong slot", "another request's state")
MTP_FAULTS = ("one MTP row stale", "another request's MTP KV")

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def loaded():
    return load_model(EMBEDDED_MODEL, dtype="float32", mtp=True)


@pytest.fixture(scope="module")
def tokenizer():
    return documents.load_tokenizer(TINY)


@pytest.fixture(scope="module")
def feeder(loaded):
    model, params = loaded
    return Feeder(model, params, rows=ROWS, longest=LONGEST, tokens=TOKENS, stops=model.config.eos_token_ids)


@pytest.fixture(scope="module")
def recall_texts(tokenizer):
    texts = documents.encode(tokenizer, documents.fresh_documents("recall", 3 * ROWS))
    # Those that say most, since a fault shows in what stands far back.
    return sorted((text for text in texts if text.values and len(text.ids) < LONGEST), key=lambda t: -len(t.ids))[:ROWS]


@pytest.fixture(scope="module")
def on_problems(feeder, tokenizer):
    return faults.on_problems(feeder, tokenizer, ROWS, MOST, names=(INTACT, MISSING_RESET, *STATE_FAULTS, *MTP_FAULTS))


@pytest.fixture(scope="module")
def on_recall(feeder, recall_texts):
    return faults.on_recall(feeder, recall_texts)


@pytest.fixture(scope="module")
def drafter(loaded):
    return Drafter(*loaded)


def texts_of(tokenizer, domain, count):
    return documents.encode(tokenizer, documents.documents_of(domain, count))


# Half-lives


@pytest.mark.parametrize("tokens", [0.5, 1.0, 20.0, 500.0])
@pytest.mark.parametrize("a_log", [-1.0, 0.0, 2.0])
def test_half_life_is_that_of_the_decay(tokens, a_log):
    dt_bias = math.log(math.expm1(math.log(2) / tokens / math.exp(a_log)))
    g = half_lives.log_decay(a_log, dt_bias)
    assert float(jnp.exp(tokens * g)) == pytest.approx(0.5, rel=1e-5)
    assert float(half_lives.half_life(g)) == pytest.approx(tokens, rel=1e-5)


def test_decays_over_text_are_those_of_the_parameters_where_the_input_adds_nothing():
    raw = json.loads((TINY / "config.json").read_text())
    kinds = ["linear_attention", "full_attention"]
    config = ModelConfig.from_hf(raw | {"num_hidden_layers": len(kinds), "layer_types": kinds})
    model = build_model(config, "float32")
    params = random_params(config, 1, "float32", jax.random.key(0))
    params["layers"][0]["linear_attn"]["in_proj_a"]["weight"] *= 0
    feeder = Feeder(model, params, rows=2, longest=64, tokens=64)
    g = half_lives.over_texts(feeder, [documents.Text([5, 6, 7], [True] * 3), documents.Text([8, 9], [True] * 2)])
    assert g.shape == (1, 5, 4)
    expected = half_lives.at_zero(model, params)
    np.testing.assert_allclose(half_lives.half_life(g), np.broadcast_to(expected[:, None], g.shape), rtol=1e-5)


# Drafts


def test_acceptance_of_equal_distributions_is_one_and_of_disjoint_ones_zero():
    noise = jax.random.gumbel(jax.random.key(0), (500, 8))
    logits = jax.random.normal(jax.random.key(1), (8,))
    assert acceptance(logits, logits, noise) == 1
    assert overlap(logits, logits) == pytest.approx(1)
    low = jnp.arange(8) < 4
    one, other = jnp.where(low, logits, -jnp.inf), jnp.where(low, -jnp.inf, logits)
    assert acceptance(one, other, noise) == 0
    assert overlap(one, other) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_acceptance_lies_between_its_bounds(scale):
    draws = 20_000
    keys = jax.random.split(jax.random.key(2), 3)
    target = jax.random.normal(keys[0], (6, 16))
    draft = target + scale * jax.random.normal(keys[1], (6, 16))
    accepted = np.asarray(acceptance(target, draft, jax.random.gumbel(keys[2], (draws, 6, 16))))
    distance = 1 - np.asarray(overlap(target, draft))
    # Four standard deviations of a share at most.
    slack = 4 * 0.5 / math.sqrt(draws)
    assert (accepted >= (1 - distance) / (1 + distance) - slack).all()
    assert (accepted <= 1 - distance + slack).all()


def test_drafts_reach_their_thresholds(drafter, tokenizer):
    on_problems = drafter.measure(texts_of(tokenizer, "problems", ROWS))
    on_stories = drafter.measure(texts_of(tokenizer, "story", 5))
    assert on_problems["argmax"][0] >= 0.95
    assert 0.7 <= on_stories["acceptance"][0] < 1
    assert on_problems["tokens"] > 300
    for found in (on_problems, on_stories):
        assert len(found["argmax"]) == len(found["acceptance"]) == len(found["overlap"]) == 3


# Forcing


def test_scores_after_a_cut_are_those_of_the_whole(feeder, recall_texts):
    """A prompt may end anywhere; 1e-4 is far above float32's error in the log-probabilities, far below any fault's."""
    pieces = [Piece(1 + i, text.ids) for i, text in enumerate(recall_texts)]
    _, whole = feeder.feed(feeder.pools(), pieces)
    cuts = [1 + 7 * i % (len(piece.ids) - 1) for i, piece in enumerate(pieces)]
    pairs = list(zip(pieces, cuts, strict=True))
    pools, _ = feeder.feed(feeder.pools(), [Piece(p.slot, p.ids[:cut], p.ids[cut]) for p, cut in pairs])
    _, after = feeder.feed(pools, [Piece(p.slot, p.ids[cut:]) for p, cut in pairs])
    for score, rest, cut in zip(whole, after, cuts, strict=True):
        for name in ("logprob", "drafted_logprob"):
            np.testing.assert_allclose(getattr(rest, name)[:-1], getattr(score, name)[cut:-1], atol=1e-4)


def test_completions_are_greedy(feeder, tokenizer):
    """Token by token what is most probable where the completion is fed as a whole, up to a stop token."""
    prompts = [tokenizer.encode(problem.question).ids for problem in documents.held_out_problems(ROWS)]
    pools, first = faults.feed_prompts(feeder, prompts, [len(prompt) + MOST for prompt in prompts])
    completions = feeder.finish(feeder.begin(pools, first), first, MOST)
    _, scores = feeder.feed(pools, [Piece(1 + i, ids) for i, ids in enumerate(completions)])
    for completion, score in zip(completions, scores, strict=True):
        assert list(score.best[:-1]) == completion[1:]
        assert [token in feeder.stops for token in completion] == [False] * (len(completion) - 1) + [True]


# Faults


def test_no_fault_changes_nothing(on_problems, on_recall):
    for found in (on_problems[INTACT], on_recall[INTACT]):
        assert found["changed"] == found["mean_shift"] == found["max_shift"] == found["mean_draft_shift"] == 0


def test_every_fault_changes_something(on_recall):
    for name, found in on_recall.items():
        if name != INTACT:
            # Far above the rounding of float32 log-probabilities.
            assert found["max_draft_shift"] > 1e-4, name
            assert name in MTP_FAULTS or found["max_shift"] > 1e-4, name


def test_faults_show_where_they_should(on_problems, on_recall):
    """What the answers to problems hang on is the state; what recall of many facts hangs on is the KV."""
    assert on_problems[INTACT]["exact"] >= 0.9 * ROWS
    for name in STATE_FAULTS:
        assert on_problems[name]["exact"] <= 0.4 * ROWS, name
    assert on_problems[MISSING_RESET]["changed"] > 0
    for name in ("keys off by one", "another request's KV"):
        assert on_recall[name]["exact"] < 0.75 * on_recall[INTACT]["exact"], name
        assert on_recall[name]["mean_shift"] > 0.1, name


@pytest.mark.parametrize("name", MTP_FAULTS)
def test_faults_of_the_mtp_head_touch_drafts_alone(on_problems, on_recall, name):
    for found in (on_problems[name], on_recall[name]):
        assert found["changed"] == found["max_shift"] == 0 < found["max_draft_shift"]
    if name != MTP_FAULTS[0]:
        assert on_recall[name]["drafts_accepted"] < on_recall[INTACT]["drafts_accepted"] - 0.1


# Recall


def test_values_repeat_what_the_text_says(tokenizer, recall_texts):
    for text in recall_texts:
        for start, end in text.values:
            value = tokenizer.decode(text.ids[start:end]).strip()
            assert value
            assert value in tokenizer.decode(text.ids[:start], skip_special_tokens=False)
            assert all(text.learn[start:end])


def test_buckets_hold_every_value():
    found = [(context, context % 3 == 0) for context in range(0, 2000, 7)]
    rows = recall.by_context(found)
    assert sum(row["values"] for row in rows) == len(found)
    assert sum(row["right"] for row in rows) == sum(right for _, right in found)


def test_attention_helps_recall(feeder, recall_texts):
    shares = {
        attends: np.mean([right for _, right in recall.values_right(feeder, recall_texts, attends=attends)])
        for attends in (True, False)
    }
    assert shares[True] > shares[False] + 0.1


# What is stored


@pytest.fixture(scope="module")
def stored():
    return measure_tiny.read_measurements(STORED, must_exist=True)


def test_stored_measurements_reach_their_thresholds(stored):
    for name, result in stored.items():
        assert result["drafts"]["problems"]["argmax"][0] >= 0.95, name
        assert 0.7 <= result["drafts"]["story"]["acceptance"][0] < 1, name
        assert all(cell["share"] >= 0.95 for cell in result["evaluation"]), name


def test_card_says_what_was_measured(stored):
    card = CARD.read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(card)) == 1 + len(tables.OF_A_RUN)
    assert tables.render_card(card, stored) == card
    training = json.loads((TINY / "training.json").read_text())
    assert f"{training['seconds']:.0f} s by the clock" in card
    assert f"{training['parameters'] / 1e6:.2f} million parameters" in card


def test_card_that_asks_for_an_unknown_table_is_refused(stored):
    with pytest.raises(ValueError, match="the card asks for the table 'odd'"):
        tables.render_card("<!-- table: odd -->\n<!-- end of table -->", stored)


def test_card_links_to_files_that_exist():
    links = re.findall(r"\]\(([^):]+)\)", CARD.read_text(encoding="utf-8"))
    assert len(links) == 4
    for link in links:
        assert (TINY / link).exists(), link


def test_pictures_are_small(stored, tmp_path):
    # Here, as the script does: it imports matplotlib.
    from measuring import pictures

    shipped = sorted((ROOT / "docs").glob("tiny-*.png"))
    history = json.loads((TINY / "training.json").read_text())["history"]
    drawn = pictures.draw(stored[tables.SHIPPED], history, tmp_path)
    assert sorted(file.name for file in drawn) == [file.name for file in shipped]
    for file in (*shipped, *drawn):
        assert 5000 < file.stat().st_size < PICTURE_BYTES, file


# The command line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--parts", "odd"], "no part 'odd'"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--card", "README.md"], "--card needs the measurements"),
        (["--from", "no-such-file"], "no-such-file: No such file"),
        (["--from", "a", "--output", "b"], "--from measures nothing"),
        (["--output", "no-such-directory/a.json"], "no such directory"),
        (["--pictures", "no-such-directory"], "no such directory"),
        (["--model", "no-such-directory"], "no such directory"),
        (["--from", str(TINY / "config.json")], "not written by measure_tiny.py"),
        (["--from", str(STORED), "--evaluation", str(TINY / "config.json")], "not written by eval.py"),
        (["--from", str(STORED), "--run", "odd"], "no run 'odd'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, complaint, capsys):
    assert measure_tiny.main(arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_stored_measurements_are_shown_without_measuring(capsys):
    assert measure_tiny.main(["--from", str(STORED)]) == 0
    said = capsys.readouterr().out
    for title in ("Half-lives", "MTP head", "Faults", "Values recalled", "Held-out problems"):
        assert title in said


def test_numbers_are_written_as_long_as_they_mean_something():
    assert json.loads(measure_tiny.as_text({"a": {"b": [0.123456789, 7, "text"]}})) == {
        "runs": {"a": {"b": [0.12346, 7, "text"]}}
    }
