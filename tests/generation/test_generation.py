"""Decoding, scoring and sampling against the full forward pass."""

import itertools

import pytest
import torch

import reference
from lavin.generation.generate import decode, generate
from lavin.generation.option_scoring import option_example, score_options
from lavin.generation.sampling import sampler
from lavin.model import pack
from lavin.runtime.errors import UserError
from lavin.tokenizer import Example
from tiny import VARIANTS, mixed_examples, tiny_example, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompts():
    """Ragged prompts, with and without pictures; one is a single token."""
    return [*mixed_examples(answer=0), Example([1], 1)]


@pytest.mark.parametrize("kind, visual", VARIANTS)
@pytest.mark.parametrize("heads", [None, 2])
def test_each_step_has_the_logits_of_the_full_forward(kind, visual, heads):
    """Teacher forced: step k is fed token k of each continuation, and must foretell what the whole text foretells."""
    model = tiny_model(adapter_type=kind, visual_adapter_type=visual, llama={"n_kv_heads": heads})
    examples, steps = prompts(), 6
    forced = torch.randint(3, 50, (steps, len(examples)), generator=torch.Generator().manual_seed(0))
    seen = []

    def choose(logits):
        seen.append(logits)
        return forced[len(seen) - 1]

    assert torch.equal(torch.stack(list(decode(model, examples, steps, choose))), forced)
    for i, example in enumerate(examples):
        whole = Example(example.ids + forced[:-1, i].tolist(), len(example.ids), example.image)
        with torch.no_grad():
            full = model.llama.output(model.hidden_states(pack([whole])))
        stepwise = torch.stack([logits[i] for logits in seen])
        torch.testing.assert_close(stepwise, full[len(example.ids) - 1:], **CLOSE)
        independent = reference.logits(model, [whole])[0, len(example.ids):]
        torch.testing.assert_close(stepwise, independent, **CLOSE)


def test_answers_do_not_depend_on_batch_mates(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    examples = prompts()
    for temperature, top_p in [(0.0, 1.0), (1.0, 0.9), (3.0, 1.0)]:
        def answer(which):
            return generate(model, tokenizer, [examples[i] for i in which], 8, temperature=temperature, top_p=top_p,
                            seeds=[100 + i for i in which])
        together = answer(range(5))
        assert together == answer([4, 3, 2, 1, 0])[::-1] == [answer([i])[0] for i in range(5)]
        assert len(set(together)) > 1 and all(together)


def test_sampling_draws_anew_by_seed(tokenizer):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    example = tiny_example(1, 5, 0)
    texts = [generate(model, tokenizer, [example], 8, temperature=3.0, seeds=[seed])[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_nucleus_and_temperature():
    """The nucleus is the fewest likeliest tokens that reach top_p; within it, draws follow the tempered distribution."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    n = 4000
    rows = p.log().expand(n, 4)

    def frequencies(temperature, top_p):
        ids = sampler(temperature, top_p, list(range(n)))(rows)
        return torch.bincount(ids, minlength=4) / n

    torch.testing.assert_close(frequencies(1.0, 1.0), p, atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(1.0, 0.79), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03, rtol=0)
    assert frequencies(1.0, 0.81)[0] > 0.1
    assert frequencies(1.0, 0.0)[1] == 1
    tempered = p.square() / p.square().sum()
    torch.testing.assert_close(frequencies(0.5, 1.0), tempered, atol=0.03, rtol=0)
    assert sampler(0.0, 0.5, [0])(p[None]).tolist() == [1]


def scripted(monkeypatch, tokenizer, texts, steps=None):
    """Replaces the model's choices by the tokens of `texts`; counts the steps taken in `steps`."""
    rows = [tokenizer.encode(text, eos=True) for text in texts]

    def decode(model, examples, max_new_tokens, choose):
        for step in range(max_new_tokens):
            if steps is not None:
                steps.append(step)
            yield torch.tensor([row[step] if step < len(row) else 5 for row in rows])

    monkeypatch.setattr("lavin.generation.generate.decode", decode)


def test_generation_ends_at_eos_or_when_complete(monkeypatch, tokenizer):
    model, steps = tiny_model(), []
    texts = ["The pond.", "The answer is B. BECAUSE: it is deep.", "The map"]
    scripted(monkeypatch, tokenizer, texts, steps)
    answers = generate(model, tokenizer, prompts()[:3], 60, is_complete=lambda text: text.endswith("B."))
    assert answers == ["The pond.", "The answer is B.", "The map"]
    assert len(steps) < 30  # nobody is waited for any longer
    scripted(monkeypatch, tokenizer, texts)
    assert generate(model, tokenizer, prompts()[:3], 2) == [tokenizer.decode(tokenizer.encode(t)[:2]) for t in texts]


def test_option_scores_equal_the_full_forward(tokenizer):
    """The options' texts part at one token; its log-probability is read off the full pass of prompt and answer."""
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    picture = tiny_example(1, 1, image=True).image
    asked = [("Which pond?\nResponse:", "ABC", None), ("Which map is it? Look.\nResponse:", "ABCDE", picture)]
    questions = [option_example(tokenizer, prompt, [f"The answer is {o}." for o in letters], image=image, n_prompt=6)
                 for prompt, letters, image in asked]
    batches = list(score_options(model, [[questions[0]], questions]))  # of several sizes; each is read after the next began
    assert batches[0][0] == pytest.approx(batches[1][0])
    for (prompt, letters, image), scores in zip(asked, batches[1]):
        examples = [tokenizer.example(prompt, f"The answer is {letter}.", image) for letter in letters]
        at = len(examples[0].ids) - 3  # letter, full stop, EOS
        assert [tokenizer.decode(e.ids[at:at + 1]).strip() for e in examples] == list(letters)
        full = torch.stack([reference.logits(model, [e])[0, at].log_softmax(-1)[e.ids[at]] for e in examples])
        torch.testing.assert_close(torch.tensor(scores), full.log_softmax(0), **CLOSE)  # among the options


def test_options_that_one_token_cannot_tell_apart(tokenizer):
    with pytest.raises(UserError, match="apart by one token"):
        option_example(tokenizer, "Response:", ["north pond", "north pond", "south pond"])


def test_generated_greedy_text_is_the_likeliest_token_each_step(tokenizer):
    """End to end against the padded reference, token by token."""
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    example = tiny_example(2, 9, 0, image=True)
    ids = list(example.ids)
    for _ in range(6):
        token = reference.logits(model, [Example(ids, len(ids), example.image)])[0, -1].argmax().item()
        ids.append(token)
    expected = list(itertools.takewhile(lambda token: token != tokenizer.eos_id, ids[len(example.ids):]))
    assert generate(model, tokenizer, [example], 6) == [tokenizer.decode(expected)]
