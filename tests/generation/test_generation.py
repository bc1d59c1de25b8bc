"""Decoding, scoring and sampling against the full forward pass."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import reference
from lavin.fast.captured_models import capture_passes
from lavin.generation.generate import decode, generate, stream
from lavin.generation.option_scoring import answer_losses, option_example, score_options
from lavin.generation.sampling import NOT_FINITE, NotFinite, sampler
from lavin.generation.session import Session
from lavin.model import pack
from lavin.runtime.errors import UserError
from lavin.tokenizer import Example
from tiny import VARIANTS, VOCAB_SIZE, greedy, greedy_logits, mixed_examples, tiny_example, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompts():
    """Prompts of different lengths, with and without images; one is a single token."""
    return [*mixed_examples(answer=0), Example([1], 1)]


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
@pytest.mark.parametrize("heads", [None, 2])
def test_each_step_has_the_logits_of_the_full_forward_pass(adapter_type, visual_type, heads):
    """Teacher forcing: each step must give the same logits as one forward pass over the complete text."""
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type, llama={"n_kv_heads": heads})
    examples, steps = prompts(), 6
    forced = torch.randint(3, 50, (steps, len(examples)), generator=torch.Generator().manual_seed(0))
    step_logits = []

    def choose(logits):
        step_logits.append(logits)
        return forced[len(step_logits) - 1]

    assert torch.equal(torch.stack(list(decode(model, examples, steps, choose))), forced)
    for i, example in enumerate(examples):
        full = Example(example.ids + forced[:-1, i].tolist(), len(example.ids), example.image)
        with torch.no_grad():
            full_logits = model.llama.output(model.hidden_states(pack([full])))
        stepwise = torch.stack([logits[i] for logits in step_logits])
        torch.testing.assert_close(stepwise, full_logits[len(example.ids) - 1:], **CLOSE)
        reference_logits = reference.logits(model, [full])[0, len(example.ids):]
        torch.testing.assert_close(stepwise, reference_logits, **CLOSE)


@pytest.fixture
def steps(monkeypatch):
    """A list that gets an entry for each decoding step."""
    steps, step = [], Session.step
    monkeypatch.setattr(Session, "step", lambda *args: steps.append(args) or step(*args))
    return steps


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("n_right", range(5))
def test_a_draft_changes_nothing_but_the_number_of_steps(n_right, captured, steps):
    """The second example's own first tokens, then other ones; in a batch, the draft is right for one sequence only."""
    model, new_tokens = tiny_model(), 6
    if captured:
        capture_passes(model)
    for examples, n_accepted in ((2 * prompts()[1:2], n_right), (prompts()[1:2], n_right), (prompts(), 0)):
        logits, ids = greedy_logits(model, examples, new_tokens), list(decode(model, examples, new_tokens, greedy))
        own = torch.stack(list(decode(model, prompts()[1:2], 4, greedy)))[:, 0].tolist()
        draft = own[:n_right] + [(token + 1) % VOCAB_SIZE for token in own[n_right:]]
        steps.clear()
        assert torch.equal(torch.stack(list(decode(model, examples, new_tokens, greedy, draft))), torch.stack(ids))
        assert len(steps) == new_tokens - 1 - n_accepted
        drafted_logits = greedy_logits(model, examples, new_tokens, draft)
        torch.testing.assert_close(drafted_logits, logits, **CLOSE)
        assert list(decode(model, examples, 1, greedy, draft))[0].tolist() == ids[0].tolist()


@pytest.mark.parametrize("n_examples, captured, n_ahead", [(1, True, 1), (2, True, 0), (1, False, 0)])
def test_a_captured_step_of_one_sequence_is_launched_before_its_ids_are_read(n_examples, captured, n_ahead, steps):
    model = tiny_model()
    if captured:
        capture_passes(model)
    for i, _ in enumerate(decode(model, prompts()[:n_examples], 4, greedy)):
        assert len(steps) == min(i + n_ahead, 3)


def test_sampling_is_the_same_with_a_draft(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    sampled = partial(generate, model, tokenizer, prompts()[:1] * 2, 8, temperature=2.0, seeds=[3, 3])
    draft = tokenizer.encode(sampled()[0])[:3]
    assert draft and sampled() == sampled(draft=draft) != sampled(seeds=[4, 4], draft=draft)


def test_answers_do_not_depend_on_the_batch(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    examples = prompts()

    def answer(indices, temperature, top_p):
        return generate(model, tokenizer, [examples[i] for i in indices], 8, temperature=temperature, top_p=top_p,
                        seeds=[100 + i for i in indices])

    for sampling in [(0.0, 1.0), (1.0, 0.9), (3.0, 1.0)]:
        together = answer(range(5), *sampling)
        assert together == answer([4, 3, 2, 1, 0], *sampling)[::-1] == [answer([i], *sampling)[0] for i in range(5)]
        assert len(set(together)) > 1 and all(together)


def test_sampling_depends_on_the_seed(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    example = tiny_example(1, 5, 0)
    texts = [generate(model, tokenizer, [example], 8, temperature=3.0, seeds=[seed])[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_nucleus_and_temperature():
    """The nucleus is the smallest set of most likely tokens that reaches top_p; temperature rescales the logits."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    n = 4000
    logits = p.log().expand(n, 4)

    def frequencies(temperature, top_p):
        ids = sampler(temperature, top_p, list(range(n)))(logits)
        return torch.bincount(ids, minlength=4) / n

    torch.testing.assert_close(frequencies(1.0, 1.0), p, atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(1.0, 0.79), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03, rtol=0)
    assert frequencies(1.0, 0.81)[0] > 0.1
    assert frequencies(1.0, 0.0)[1] == 1
    tempered = p.square() / p.square().sum()
    torch.testing.assert_close(frequencies(0.5, 1.0), tempered, atol=0.03, rtol=0)
    assert sampler(0.0, 0.5, [0])(p[None]).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-320])
def test_logits_that_are_not_finite_give_no_token(temperature):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    expected = sampler(temperature, 0.9, list(range(5)))(logits)
    logits[1, 7], logits[2], logits[3, 9], logits[4, :20] = torch.nan, -torch.inf, torch.inf, -torch.inf
    ids = sampler(temperature, 0.9, list(range(5)))(logits)
    assert ids[0] == expected[0] and ids[1:4].tolist() == [NOT_FINITE] * 3 and ids[4] >= 20


def test_a_sequence_with_nan_is_named_unless_it_is_complete(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    examples = [Example([1, 5, 6], 3), Example([1, 9, 6], 3), Example([1, 9], 2)]
    expected = generate(model, tokenizer, examples[:1], 4)
    model.llama.tok_embeddings.weight.data[9] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFinite) as caught:
            generate(model, tokenizer, examples, 4, temperature=temperature)
        assert caught.value.indices == [1, 2]
        with pytest.raises(NotFinite):
            list(stream(model, tokenizer, examples[2], 4, temperature))
    with pytest.raises(NotFinite) as caught:
        list(score_options(model, [[(example, [3, 4]) for example in examples]]))
    assert caught.value.indices == [1, 2]
    assert generate(model, tokenizer, examples[:1], 4) == expected
    steps = decode(model, examples, 3, sampler(0.0, 1.0, []))  # goes on with what nobody reads
    assert [ids.tolist()[1:] for ids in steps] == [[NOT_FINITE] * 2] * 3


def mock_decode(monkeypatch, tokenizer, texts, steps=None):
    """Make decode yield the tokens of `texts`; appends each step taken to `steps`."""
    token_ids = [tokenizer.encode(text, eos=True) for text in texts]

    def decode(model, examples, max_new_tokens, choose, draft):
        for step in range(max_new_tokens):
            if steps is not None:
                steps.append(step)
            yield torch.tensor([ids[step] if step < len(ids) else 5 for ids in token_ids])

    monkeypatch.setattr("lavin.generation.generate.decode", decode)


def test_generation_stops_at_eos_or_when_complete(monkeypatch, tokenizer):
    model, steps = tiny_model(), []
    texts = ["The pond.", "The answer is B. BECAUSE: it is deep.", "The map"]
    mock_decode(monkeypatch, tokenizer, texts, steps)
    answers = generate(model, tokenizer, prompts()[:3], 60, is_complete=lambda text: text.endswith("B."))
    assert answers == ["The pond.", "The answer is B.", "The map"]
    assert len(steps) < 30  # stops when the last sequence is done
    mock_decode(monkeypatch, tokenizer, texts)
    assert generate(model, tokenizer, prompts()[:3], 2) == [tokenizer.decode(tokenizer.encode(t)[:2]) for t in texts]


def test_option_scores_equal_the_full_forward_pass(tokenizer):
    """The options differ in one token; the reference takes its log-probability from a pass over prompt and answer."""
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    pixels = tiny_example(1, 1, image=True).image
    asked = [("Which pond?\nResponse:", "ABC", None), ("Which map is it? Look.\nResponse:", "ABCDE", pixels)]
    questions = [option_example(tokenizer, prompt, [f"The answer is {o}." for o in letters], image=image, n_prompt=6)
                 for prompt, letters, image in asked]
    batches = list(score_options(model, [[questions[0]], questions]))  # starts a batch before reading the previous one
    assert batches[0][0] == pytest.approx(batches[1][0])
    for (prompt, letters, image), scores in zip(asked, batches[1], strict=True):
        examples = [tokenizer.example(prompt, f"The answer is {letter}.", image) for letter in letters]
        at = len(examples[0].ids) - 3  # the letter is followed by a full stop and EOS
        assert [tokenizer.decode(e.ids[at:at + 1]).strip() for e in examples] == list(letters)
        expected = torch.stack([reference.logits(model, [e])[0, at].log_softmax(-1)[e.ids[at]] for e in examples])
        torch.testing.assert_close(torch.tensor(scores), expected.log_softmax(0), **CLOSE)  # normalized over options


def test_options_that_do_not_differ_in_one_token(tokenizer):
    with pytest.raises(UserError, match="apart by one token"):
        option_example(tokenizer, "Response:", ["north pond", "north pond", "south pond"])


def test_answer_losses_are_those_of_training():
    model, examples = tiny_model(), [*mixed_examples(), tiny_example(5, 6, 7)]
    with torch.no_grad():
        expected = [model(pack([example])).item() / (len(example.ids) - example.answer_start) for example in examples]
    found = answer_losses(model, examples)
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)


def test_an_answer_is_likeliest_where_greedy_decoding_writes_it():
    model, prompts, answers = tiny_model(), mixed_examples(answer=0), []
    for ids in itertools.islice(decode(model, prompts, 4, greedy), 4):
        answers.append(ids.tolist())
    for i, prompt in enumerate(prompts):
        written = [ids[i] for ids in answers]
        other = [*written[:1], (written[1] + 1) % VOCAB_SIZE, *written[2:]]
        examples = [Example([*prompt.ids, *answer], len(prompt.ids), prompt.image) for answer in (written, other)]
        assert [is_likeliest for _, is_likeliest in answer_losses(model, examples)] == [True, False]


def test_answer_losses_rank_options_as_option_scores_do(tokenizer):
    """The losses of answers that differ in their last token alone say as much as the log-probabilities."""
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    options = [f"The answer is {letter}" for letter in "ABCD"]
    for image in (None, tiny_example(1, 2, image=True).image):
        examples = [tokenizer.example("Which pond?\nResponse:", option, image) for option in options]
        examples = [replace(example, ids=example.ids[:-1]) for example in examples]
        sums = [-loss * (len(example.ids) - example.answer_start)
                for (loss, _), example in zip(answer_losses(model, examples), examples, strict=True)]
        question = option_example(tokenizer, "Which pond?\nResponse:", options, image=image, n_prompt=6)
        [[scores]] = score_options(model, [[question]])
        assert torch.tensor(sums).log_softmax(-1).tolist() == pytest.approx(scores, abs=1e-4)


def test_answer_losses_that_are_not_finite_are_refused():
    model = tiny_model()
    model.llama.output.weight.data[:] = float("nan")
    with pytest.raises(NotFinite):
        answer_losses(model, mixed_examples())


def test_greedy_generation_equals_the_padded_reference(tokenizer):
    """End to end, token by token."""
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    example = tiny_example(2, 9, 0, image=True)
    ids = list(example.ids)
    for _ in range(6):
        token = reference.logits(model, [Example(ids, len(ids), example.image)])[0, -1].argmax().item()
        ids.append(token)
    expected = list(itertools.takewhile(lambda token: token != tokenizer.eos_id, ids[len(example.ids):]))
    assert generate(model, tokenizer, [example], 6) == [tokenizer.decode(expected)]


def test_the_whole_model_answers_in_eval_mode_and_is_not_walked_where_it_is(monkeypatch, tokenizer):
    """Setting the mode of every module takes 2 ms for 7B, at each answer."""
    def answer():
        generate(model, tokenizer, [tiny_example(1, 5, 0)], 1)
        list(stream(model, tokenizer, tiny_example(1, 5, 0), 1))
        list(score_options(model, [[(tiny_example(1, 5, 0), [3, 4])]]))

    model = tiny_model()
    model.train()
    answer()
    assert not any(module.training for module in model.modules())
    monkeypatch.setattr(model, "train", None)  # eval calls it
    answer()
